"""Prefix beam search, frame by frame: prefixes as a tree, their alignments, and pruning.

Prefixes are ranked by the log-probability of their alignments, plus the score of the language model, if any.

The results equal WeNet's (`wenet/transformer/search.py`). Times are the peaks of the single best (Viterbi) alignment.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from heapq import heappushpop

from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.decoding.fusion import Fusion, FusionState
from u2moe.runtime.decoding.phrases import REST_COST, PhraseGraph, PhraseState

_NEVER = -math.inf
_SURE, _SURE_AFTER = 0.99, 4
"""Conditions of `BeamSearch.decide`. Hypotheses with the phrase need at least half of the beam's probability, and at
least the share `_SURE` of the probability that remains when other hypotheses with words outside the grammar are left
out. At least `_SURE_AFTER` frames must have followed the last peak of the phrase."""

_Times = tuple["_Times", int, float] | None
"""Peaks (frame, log-probability) of a prefix's tokens, as a linked list from the last token to the first. Prefixes that
begin alike share nodes."""
_Candidate = tuple[float, int, int, int]
"""A candidate for the beam: negative `Beam.rank`, order, index of the prefix, index of the new token in the frame (-1:
none). Ties are broken by the order in which WeNet meets the candidates."""


class Prefix:
    """A token sequence as a node of a tree. Equal sequences share a node while any beam needs it.

    For hotwords, `state` is the state of the automaton and `earned` the bonus of complete hotwords. `bonus` also
    includes the share of an incomplete hotword. For the language model, `language` is the state and `spoken` the score
    of complete words. `language_score` also includes the best completion of the last word. `phrase` is the state of the
    grammar. `extra` is added to the log-probability of the alignments when prefixes are ranked.
    """

    __slots__ = (
        "__weakref__", "bonus", "depth", "earned", "extra", "language", "language_score", "parent", "phrase", "spoken",
        "state", "token",
    )  # fmt: skip

    def __init__(self, parent: Prefix | None, token: int, state: int = 0, language: FusionState | None = None) -> None:
        self.parent = parent
        self.token = token
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.state = state
        self.language = language
        self.phrase: PhraseState | None = None
        self.earned = self.bonus = self.spoken = self.language_score = self.extra = 0.0

    def tokens(self, begin: int = 0) -> list[int]:
        """Return the token ids from position `begin` on."""
        result, node = [], self
        while node.parent is not None and node.depth > begin:
            result.append(node.token)
            node = node.parent
        return result[::-1]

    def ancestor(self, depth: int) -> Prefix | None:
        """Return the prefix of the first `depth` tokens; None if there are fewer."""
        node: Prefix | None = self if self.depth >= depth else None
        while node is not None and node.depth > depth:
            node = node.parent
        return node


class Beam:
    """A prefix and the log-probability of its alignments with the frames so far.

    `blank` is the log-probability of all alignments that end in blank, `token` that of alignments that end in the last
    token, and `total` that of both kinds. `rank` is the total plus the prefix's `extra`. `best_blank` and `best_token`
    are the scores of the best single alignment of each kind. `blank_times` and `token_times` are the peaks of the
    tokens in these two alignments. `best` and `times` are the score and the peaks of the better one.
    """

    __slots__ = (
        "best", "best_blank", "best_token", "blank", "blank_times", "prefix", "rank", "times", "token", "token_times",
        "total",
    )  # fmt: skip

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.blank = self.token = self.total = self.rank = self.best = self.best_blank = self.best_token = _NEVER
        self.times: _Times = None
        self.blank_times: _Times = None
        self.token_times: _Times = None

    def add_blank(self, score: float) -> None:
        """Extend all alignments by a blank, which has log-probability `score`."""
        self.best = self.best_blank = self.best + score
        self.blank = self.total = self.total + score
        self.rank = self.total + self.prefix.extra
        self.blank_times = self.times
        self.token = self.best_token = _NEVER
        self.token_times = None

    def earliest_peak(self, number: int) -> float:
        """Return the first frame where the token at index `number` peaks in a best alignment; infinity if in none."""
        earliest = math.inf
        for times in (self.blank_times, self.token_times):
            node = times
            for _ in range(self.prefix.depth - 1 - number):
                node = node and node[0]
            if node is not None and number < self.prefix.depth:
                earliest = min(earliest, node[1])
        return earliest

    def peaks(self) -> tuple[list[int], list[float]]:
        """Return the frames where the tokens peak in the best alignment, and the tokens' probabilities there."""
        frames, probabilities = [], []
        times = self.times
        while times is not None:
            times, frame, score = times
            frames.append(frame)
            probabilities.append(min(math.exp(score), 1.0))
        return frames[::-1], probabilities[::-1]


class BeamSearch:
    """Keeps the best prefixes from frame to frame; `ctc.PrefixBeamSearch` runs one or two such searches.

    Extensions of a prefix are tried in order of probability, until one cannot be among the `beam_size` best candidates,
    whatever the language model (`Fusion.losses`) and hotwords (`ContextGraph.most_gain`) add to it. The result
    therefore equals that of a full search. Unextended prefixes are also candidates. In most frames of speech, blank is
    so probable that no extension is tried. `beams` are the best prefixes, best first.
    """

    def __init__(
        self,
        beam_size: int,
        blank: int,
        context: ContextGraph | None,
        fusion: Fusion | None,
        *,
        grammar: PhraseGraph | None = None,
        ranks_by_bonus: bool = False,
    ) -> None:
        self.beam_size, self.blank = beam_size, blank
        self.num_frames = 0
        self.context, self.fusion, self._grammar = context, fusion, grammar
        self._rest = None if grammar is None else grammar.rest
        self._rest_start = _NEVER
        self._ranking = context if ranks_by_bonus else None
        self._most_bonus = 0.0 if self._ranking is None else self._ranking.most_gain
        self._most_gain = self._most_bonus + (0.0 if fusion is None else fusion.most_gain)
        state, language = 0 if context is None else context.start, None if fusion is None else fusion.start
        root = Beam(Prefix(None, -1, state, language))
        root.prefix.phrase = None if grammar is None else grammar.start
        root.blank = root.total = root.rank = root.best = root.best_blank = root.best_token = 0.0
        self.beams = [root]
        # If a prefix leaves the beam and returns while longer prefixes survive, it must be the same node again.
        self._prefixes: weakref.WeakValueDictionary[tuple[Prefix, int], Prefix] = weakref.WeakValueDictionary()

    def advance(self, tokens: list[int], scores: list[float], rest_start: float = _NEVER) -> None:
        """Process a frame: its best tokens, best first, and their log-probabilities. `rest_start`: that of `rest`."""
        self._rest_start = rest_start
        beams = self.beams
        rank_of = dict(zip(tokens, range(len(tokens)), strict=True))
        index_of: dict[Prefix | None, int] = {beam.prefix: index for index, beam in enumerate(beams)}
        blank_rank = rank_of.get(self.blank, len(tokens))
        blank_score = scores[blank_rank] if blank_rank < len(tokens) else _NEVER
        width = 2 * len(beams)
        moved: dict[int, Beam] = {}
        merged: set[tuple[int, int]] = set()
        ranked: list[_Candidate] = []
        for index, beam in enumerate(beams):
            prefix = beam.prefix
            order = blank_rank * width + 2 * index
            total = beam.total + blank_score
            rank = rank_of.get(prefix.token)
            if rank is not None:
                parent = index_of.get(prefix.parent)
                order = min(order, rank * width + 2 * index)
                if parent is not None:
                    merged.add((parent, rank))
                    order = min(order, rank * width + 2 * parent + 1)
                if parent is not None or beam.token > _NEVER or prefix.token == self._rest:
                    moved[index] = self._stay(index, parent, scores[rank], blank_score)
                    total = moved[index].total
            if total > _NEVER:
                ranked.append((-(total + prefix.extra), order, index, -1))
        ranked += self._extensions(ranked, merged, tokens, scores)
        ranked.sort()
        del ranked[self.beam_size :]
        # Beams may change in place only after all extensions have been built from their old values.
        self.beams = [
            moved.get(index, beams[index]) if rank < 0 else self._grown(index, tokens[rank], scores[rank], -least)
            for least, _, index, rank in ranked
        ]
        for _, _, index, rank in ranked:
            if rank < 0 and index not in moved:
                beams[index].add_blank(blank_score)
        self.num_frames += 1

    def extension(self, prefix: Prefix, tokens: Iterable[int]) -> Prefix | None:
        """Return the prefix that extends `prefix` by `tokens`; None if no beam needs it."""
        node: Prefix | None = prefix
        for token in tokens:
            node = None if node is None else self._prefixes.get((node, token))
        return node

    def decide(self) -> None:
        """Keep only hypotheses that share the best prefix up to its last certain phrase, or all if it has none."""
        best = self.beams[0]
        node, times = best.prefix, best.times
        while times is not None and node.parent is not None:
            is_phrase = node.phrase and node.phrase.accepts and node.token != self._rest
            if is_phrase and times[1] + _SURE_AFTER < self.num_frames:
                kept = [beam for beam in self.beams if beam.prefix.ancestor(node.depth) is node]
                named = [beam for beam in self.beams if beam in kept or self._rest not in beam.prefix.tokens()]
                ours, phrases, all_of = (
                    sum(math.exp(each.rank - best.rank) for each in part) for part in (kept, named, self.beams)
                )
                if ours >= max(_SURE * phrases, all_of / 2):
                    self.beams = kept
                    return
            node, times = node.parent, times[0]

    def finish(self) -> None:
        """End the input: drop the bonuses of incomplete hotwords, score the last words, and drop incomplete phrases."""
        if self._grammar is not None:
            self.beams = [beam for beam in self.beams if beam.prefix.phrase and beam.prefix.phrase.accepts]
        for beam in self.beams:
            prefix = beam.prefix
            if self.context is not None:
                prefix.bonus = prefix.earned + self.context.finish(prefix.state)
            if self.fusion is not None and prefix.language is not None and prefix.parent is not None:
                prefix.language_score = prefix.spoken + self.fusion.finish(prefix.language)

    def _extensions(
        self, kept: list[_Candidate], merged: set[tuple[int, int]], tokens: list[int], scores: list[float]
    ) -> list[_Candidate]:
        """Return the extensions that may be among the `beam_size` best candidates, which include `kept`.

        `merged` contains extensions (index of prefix, index of token) that are already in the beam; they are left out.
        """
        fusion, follow = self.fusion, None if self._grammar is None else self._grammar.advance
        # The scores of the best candidates so far, as a heap. A candidate below the lowest of them cannot be among the
        # best. One with an equal score can: ties are broken by the order of candidates.
        best = sorted([_NEVER] * self.beam_size + [-stays[0] for stays in kept])[-self.beam_size :]
        first = next((score for token, score in zip(tokens, scores, strict=True) if token != self.blank), _NEVER)
        if self.beams[0].rank + self._most_gain + first < best[0]:
            return []
        likely = [
            (rank, token, score, *((0.0, False) if fusion is None else (fusion.gains[token], fusion.ends_word[token])))
            for rank, (token, score) in enumerate(zip(tokens, scores, strict=True))
            if token != self.blank
        ]
        candidates: list[_Candidate] = []
        width = 2 * len(self.beams)
        for index, beam in enumerate(self.beams):
            if not likely or beam.rank + self._most_gain + likely[0][2] < best[0]:
                break  # later beams are no better
            prefix, phrase = beam.prefix, beam.prefix.phrase
            losses = (0.0, 0.0, 0.0) if fusion is None else fusion.losses(prefix.language)
            most = beam.rank + losses[2] + self._most_bonus
            for rank, token, log_prob, gain, ends in likely:
                if most + log_prob < best[0]:
                    break
                if (index, rank) in merged or (follow and phrase and follow(phrase, token) is None):
                    continue
                total = (beam.blank if token == prefix.token else beam.total) + (
                    self._entered(prefix, token, log_prob) if follow else log_prob
                )
                score = total if self._ranking is None else total + self._bonus(prefix, token)
                if fusion is not None and prefix.language is not None:
                    if score + (prefix.language_score + gain + losses[ends]) < best[0]:
                        continue
                    state, earned = prefix.language.moves.get(token) or fusion.advance(prefix.language, token)
                    score = total + (prefix.spoken + earned + state.open + self._bonus(prefix, token))
                if score >= best[0] and total > _NEVER:
                    heappushpop(best, score)
                    candidates.append((-score, rank * width + 2 * index + 1, index, rank))
        return candidates

    def _stay(self, index: int, parent: int | None, score: float, blank_score: float) -> Beam:
        """Return the beam at `index` after a frame in which the last token of its prefix has log-probability `score`.

        Each new alignment adds blank, repeats the last token or, unless `parent` is None, extends an alignment of the
        beam at index `parent` by that token.
        """
        old = self.beams[index]
        new = Beam(old.prefix)
        goes_on = old.prefix.token == self._rest  # `rest` may repeat even after blanks
        new.blank, new.token = old.total + blank_score, (old.total if goes_on else old.token) + score
        new.best_blank, new.blank_times = old.best + blank_score, old.times
        if parent is not None and parent < index:
            self._grow(new, self.beams[parent], score)
        repeats = (old.best if goes_on else old.best_token) + score
        if new.best_token < repeats:
            # The peak moves to this frame, unless the token was already reached from the parent in this frame.
            if goes_on:
                new.token_times = old.times
            elif new.best_token == _NEVER and old.token_times is not None:
                new.token_times = (old.token_times[0], self.num_frames, score)
            new.best_token = repeats
        if parent is not None and parent > index:
            self._grow(new, self.beams[parent], score)
        new.total = _log_add(new.blank, new.token)
        new.rank = new.total + old.prefix.extra
        if new.best_blank > new.best_token:
            new.best, new.times = new.best_blank, new.blank_times
        else:
            new.best, new.times = new.best_token, new.token_times
        return new

    def _grown(self, index: int, token: int, score: float, rank: float) -> Beam:
        """Return the beam at `index`, extended by a token."""
        beam = self.beams[index]
        parent = beam.prefix
        prefix = self._prefixes.get((parent, token))
        if prefix is None:
            prefix = self._prefixes[parent, token] = Prefix(parent, token)
            if self._grammar is not None and parent.phrase is not None:
                prefix.phrase = self._grammar.advance(parent.phrase, token)
            if self.context is not None:
                prefix.state, bonus = self.context.advance(parent.state, token)
                prefix.earned = parent.earned + bonus
                prefix.bonus = prefix.earned + self.context.partial(prefix.state)
            if self.fusion is not None and parent.language is not None:
                prefix.language, score_of_words = self.fusion.advance(parent.language, token)
                prefix.spoken = parent.spoken + score_of_words
                prefix.language_score = prefix.spoken + prefix.language.open
            prefix.extra = prefix.language_score + (0.0 if self._ranking is None else prefix.bonus)
        new = Beam(prefix)
        self._grow(new, beam, score)
        new.total, new.rank, new.best, new.times = new.token, rank, new.best_token, new.token_times
        return new

    def _grow(self, new: Beam, parent: Beam, score: float) -> None:
        """Add to `new` the alignments of `parent`, extended by a token with log-probability `score` in this frame."""
        entered = self._entered(parent.prefix, new.prefix.token, score)
        if parent.prefix.token == new.prefix.token:  # a repeated token needs a blank before it
            total, best, times = parent.blank, parent.best_blank, parent.blank_times
        else:
            total, best, times = parent.total, parent.best, parent.times
        new.token = _log_add(new.token, total + entered)
        if new.best_token < best + entered:
            new.best_token = best + entered
            new.token_times = (times, self.num_frames, score)

    def _entered(self, prefix: Prefix, token: int, score: float) -> float:
        """Return the score of a token after a prefix. A `rest` token begins a word outside the grammar, at a cost."""
        if token != self._rest:
            return score
        return (score if prefix.phrase and prefix.phrase.is_apart else self._rest_start) - REST_COST

    def _bonus(self, prefix: Prefix, token: int) -> float:
        """Return the hotword bonus used to rank a prefix after it is extended by a token."""
        if self._ranking is None:
            return 0.0
        state, earned = self._ranking.advance(prefix.state, token)
        return prefix.earned + earned + self._ranking.partial(state)


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))
