"""Prefix beam search, frame by frame: prefixes as a tree, their alignments, and pruning.

Prefixes are ranked by the log-probability of their alignments plus the score of a language model, if there is one.

The results are WeNet's (`wenet/transformer/search.py`), including its quirks: times are the peaks of the single best
(Viterbi) alignment, not of the sum, and the Viterbi score of an alignment ending in blank is overwritten each frame.
"""

from __future__ import annotations

import math
import weakref
from heapq import heappushpop
from operator import itemgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from u2moe.runtime.decoding.context import ContextGraph
    from u2moe.runtime.decoding.fusion import Fusion, FusionState

_NEVER = -math.inf

_Times = tuple["_Times", int, float] | None
"""Peaks of a prefix's tokens, (frame, log-probability), as a linked list from the last token, shared by prefixes."""


_Candidate = tuple[float, int, int, int, float]
"""An extension: minus its score, order, index of the prefix, rank of the token, log-probability of its alignments."""


class Prefix:
    """A token sequence as a node of a tree. Equal sequences share one node while any beam needs it.

    `state` is the hotword state after it, `earned` the bonus of complete hotwords, and `bonus` the bonus for ranking,
    which includes the share of an incomplete one. `language`, `spoken` and `language_score` are the same for the
    language model: its state, the score of complete words, and the score for ranking. `extra` is what the search adds
    to the log-probability of its alignments.
    """

    __slots__ = (
        "__weakref__", "bonus", "earned", "extra", "language", "language_score", "parent", "spoken", "state", "token",
    )  # fmt: skip

    def __init__(self, parent: Prefix | None, token: int, state: int = 0, language: FusionState | None = None) -> None:
        self.parent = parent
        self.token = token
        self.state = state
        self.language = language
        self.earned = self.bonus = self.spoken = self.language_score = self.extra = 0.0

    def tokens(self) -> list[int]:
        """Token ids from the first to the last."""
        result = []
        node = self
        while node.parent is not None:
            result.append(node.token)
            node = node.parent
        return result[::-1]


class Beam:
    """A prefix and the log-probability of its alignments with the frames so far.

    `blank` sums the alignments that end in blank, `token` those that end in the prefix's last token, `total` both;
    `rank` is the total plus what the search adds for the prefix. `best_blank` and `best_token` are those of the single
    best alignment, `blank_times` and `token_times` its peaks.
    """

    __slots__ = (
        "best_blank", "best_token", "blank", "blank_times", "order", "prefix", "rank", "token", "token_times", "total",
    )  # fmt: skip

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.blank = self.token = self.total = self.rank = self.best_blank = self.best_token = _NEVER
        self.blank_times: _Times = None
        self.token_times: _Times = None
        self.order = 0

    def add_blank(self, score: float) -> None:
        """Extend all alignments only by blank, with log-probability `score`."""
        if not self.best_blank > self.best_token:
            self.best_blank, self.blank_times = self.best_token, self.token_times
        self.best_blank += score
        self.blank = self.total = self.total + score
        self.rank = self.total + self.prefix.extra
        self.token = self.best_token = _NEVER
        self.token_times = None

    @property
    def best(self) -> float:
        """Log-probability of the single best alignment."""
        return max(self.best_token, self.best_blank)

    @property
    def times(self) -> _Times:
        """Peaks of the single best alignment."""
        return self.blank_times if self.best_blank > self.best_token else self.token_times

    def peaks(self) -> tuple[list[int], list[float]]:
        """Frames where the tokens peak in that alignment, and their probabilities there."""
        frames, probabilities = [], []
        times = self.times
        while times is not None:
            times, frame, score = times
            frames.append(frame)
            probabilities.append(min(math.exp(score), 1.0))
        return frames[::-1], probabilities[::-1]


class BeamSearch:
    """The best prefixes from frame to frame; `ctc.PrefixBeamSearch` runs one or two of these.

    The work per frame depends on its likely tokens. Extensions of a prefix are tried in order of probability until they
    fall below the worst prefix that is kept anyway. If blank is so probable that all of them would, as in most frames,
    none is tried (`_nothing_grows`). The result equals that of the full search. Both take into account by how much an
    extension is lifted at most by a language model (`Fusion.most_gain`), and by hotwords if they affect the ranking
    (`ContextGraph.most_gain`).

    Attributes:
        beams: the best prefixes, best first.
    """

    def __init__(
        self,
        beam_size: int,
        blank: int,
        context: ContextGraph | None = None,
        fusion: Fusion | None = None,
        *,
        ranks_by_bonus: bool = False,
    ) -> None:
        self.beam_size = beam_size
        self.blank = blank
        self.num_frames = 0
        self.context = context
        self.fusion = fusion
        self._ranking = context if ranks_by_bonus else None
        self._most_bonus = 0.0 if self._ranking is None else self._ranking.most_gain
        self._most_gain = self._most_bonus + (0.0 if fusion is None else fusion.most_gain)
        state, language = 0 if context is None else context.start, None if fusion is None else fusion.start
        root = Beam(Prefix(None, -1, state, language))
        root.blank = root.total = root.rank = root.best_blank = root.best_token = 0.0
        self.beams = [root]
        # A prefix may leave the beam and return while longer prefixes survive: it must then be the same node.
        self._prefixes: weakref.WeakValueDictionary[tuple[Prefix, int], Prefix] = weakref.WeakValueDictionary()

    def advance(self, tokens: list[int], scores: list[float]) -> None:
        """Process one frame: its most probable tokens and their log-probabilities, in descending order."""
        if self._nothing_grows(tokens, scores):
            self._stay_all(tokens, scores)
        else:
            self._advance_frame(tokens, scores)
        self.num_frames += 1

    def finish(self) -> None:
        """Keep only the earned bonus, and score the last word by the language model."""
        for beam in self.beams:
            prefix = beam.prefix
            if self.context is not None:
                prefix.bonus = prefix.earned + self.context.finish(prefix.state)
            if self.fusion is not None and prefix.language is not None and prefix.parent is not None:
                prefix.language_score = prefix.spoken + self.fusion.finish(prefix.language)

    def _nothing_grows(self, tokens: list[int], scores: list[float]) -> bool:
        """Whether all prefixes stay and no new one can enter the beam.

        This holds if the best prefix, extended by the second most probable token, scores below the worst one extended
        by blank, the most probable: no extension exceeds the former, and every prefix that stays reaches the latter.
        (With a language model or hotwords, an extension gains something, which is bounded.)
        """
        beams = self.beams
        if tokens[0] != self.blank or len(beams) < self.beam_size:
            return False
        least = beams[-1].rank + scores[0]
        if len(scores) < 2 or beams[0].rank + scores[1] + self._most_gain < least:
            return True
        least -= self._most_bonus
        return self.fusion is not None and not _may_grow(self.fusion, beams, tokens, scores, least)

    def _stay_all(self, tokens: list[int], scores: list[float]) -> None:
        """`_advance_frame` when nothing grows: most prefixes only add blank, which keeps their order."""
        beams = self.beams
        rank_of = {token: rank for rank, token in enumerate(tokens)}
        moved = []
        for index, beam in enumerate(beams):
            rank = rank_of.get(beam.prefix.token)
            if rank is not None:
                parent = next((i for i, other in enumerate(beams) if other.prefix is beam.prefix.parent), None)
                moved.append((index, self._stay(index, parent, rank, 0, scores)))
        for beam in beams:
            beam.add_blank(scores[0])
        for index, beam in moved:
            beams[index] = beam
        if moved:
            beams.sort(key=lambda beam: -beam.rank)

    def _advance_frame(self, tokens: list[int], scores: list[float]) -> None:
        beams = self.beams
        rank_of = {token: rank for rank, token in enumerate(tokens)}
        index_of = {beam.prefix: index for index, beam in enumerate(beams)}
        kept: list[Beam] = []
        merged: set[tuple[int, int]] = set()
        for index, beam in enumerate(beams):
            parent = index_of.get(beam.prefix.parent) if beam.prefix.parent is not None else None
            rank = rank_of.get(beam.prefix.token)
            if parent is not None and rank is not None:
                merged.add((parent, rank))
            stayed = self._stay(index, parent, rank, rank_of.get(self.blank), scores)
            if stayed.total > _NEVER:
                kept.append(stayed)

        self.beams = self._prune(kept, self._extensions(kept, merged, tokens, scores), tokens, scores)

    def _extensions(
        self, kept: list[Beam], merged: set[tuple[int, int]], tokens: list[int], scores: list[float]
    ) -> list[_Candidate]:
        """The extensions that may be among the `beam_size` best, beside the prefixes that stay.

        `merged` are those, as index of the prefix and rank of the token, that lead to a prefix that stays.
        """
        fusion = self.fusion
        # The best so far, as a heap. What is below the least of them is not among the best. (What equals it may be: the
        # order decides.)
        best = sorted([_NEVER] * self.beam_size + [beam.rank for beam in kept])[-self.beam_size :]
        gains = [] if fusion is None else [fusion.gains[token] for token in tokens]
        ends = [] if fusion is None else [fusion.ends_word[token] for token in tokens]
        candidates: list[_Candidate] = []
        width = 2 * len(self.beams)
        for index, beam in enumerate(self.beams):
            prefix = beam.prefix
            if beam.rank + self._most_gain + scores[0] < best[0]:
                continue
            losses = (0.0, 0.0) if fusion is None else fusion.losses(prefix.language)
            for rank, token in enumerate(tokens):
                if beam.rank + self._most_gain + scores[rank] < best[0]:
                    break
                if token == self.blank or (index, rank) in merged:
                    continue
                total = (beam.blank if token == prefix.token else beam.total) + scores[rank]
                score = total if self._ranking is None else total + self._bonus(prefix, token)
                if fusion is not None and prefix.language is not None:
                    if score + (prefix.language_score + gains[rank] + losses[ends[rank]]) < best[0]:
                        continue
                    state, earned = prefix.language.moves.get(token) or fusion.advance(prefix.language, token)
                    score = total + (prefix.spoken + earned + state.open + self._bonus(prefix, token))
                if score >= best[0] and total > _NEVER:
                    heappushpop(best, score)
                    candidates.append((-score, rank * width + 2 * index + 1, index, rank, total))
        return candidates

    def _stay(
        self, index: int, parent: int | None, rank: int | None, blank_rank: int | None, scores: list[float]
    ) -> Beam:
        """Prefix `index` after this frame.

        Its alignments add blank, repeat its last token, or extend those of its `parent`, if that is in the beam, too.

        `order` is the point at which WeNet would first meet the prefix, which breaks ties.
        """
        old = self.beams[index]
        new = Beam(old.prefix)
        width = 2 * len(self.beams)
        new.order = width * len(scores)
        if blank_rank is not None:
            new.blank = old.total + scores[blank_rank]
            new.best_blank = old.best + scores[blank_rank]
            new.blank_times = old.times
            new.order = blank_rank * width + 2 * index
        if rank is not None:
            score = scores[rank]
            repeats = old.best_token + score
            if parent is not None and parent < index:
                self._grow(new, self.beams[parent], score)
                new.order = min(new.order, rank * width + 2 * parent + 1)
            new.token = _log_add(new.token, old.token + score)
            if new.best_token < repeats:
                # The peak moves to this frame, unless the token was already reached from the parent in this frame.
                if new.best_token == _NEVER and old.token_times is not None:
                    new.token_times = (old.token_times[0], self.num_frames, score)
                new.best_token = repeats
            if parent is not None and parent > index:
                self._grow(new, self.beams[parent], score)
            new.order = min(new.order, rank * width + 2 * index)
        new.total = _log_add(new.blank, new.token)
        new.rank = new.total + old.prefix.extra
        return new

    def _grow(self, new: Beam, parent: Beam, score: float) -> None:
        """Add to `new` the alignments of `parent` extended by a token with log-probability `score` in this frame."""
        if parent.prefix.token == new.prefix.token:  # the same token again: only after a blank
            total, best, times = parent.blank, parent.best_blank, parent.blank_times
        else:
            total, best, times = parent.total, parent.best, parent.times
        new.token = _log_add(new.token, total + score)
        if new.best_token < best + score:
            new.best_token = best + score
            new.token_times = (times, self.num_frames, score)

    def _prune(
        self,
        kept: list[Beam],
        candidates: list[_Candidate],
        tokens: list[int],
        scores: list[float],
    ) -> list[Beam]:
        """The best `beam_size` of the prefixes that stay and the extensions (-score, order, beam, rank, total)."""
        ranked: list[_Candidate] = [(-beam.rank, beam.order, place, -1, beam.total) for place, beam in enumerate(kept)]
        ranked += candidates
        ranked.sort(key=itemgetter(0, 1))
        result = []
        for negative, _, index, rank, total in ranked[: self.beam_size]:
            if rank < 0:
                result.append(kept[index])
                continue
            parent = self.beams[index]
            new = Beam(self._prefix(parent.prefix, tokens[rank]))
            self._grow(new, parent, scores[rank])
            new.total, new.rank = total, -negative
            result.append(new)
        return result

    def _bonus(self, prefix: Prefix, token: int) -> float:
        """What hotwords add to the rank of a prefix extended by a token."""
        if self._ranking is None:
            return 0.0
        state, earned = self._ranking.advance(prefix.state, token)
        return prefix.earned + earned + self._ranking.partial(state)

    def _prefix(self, parent: Prefix, token: int) -> Prefix:
        prefix = self._prefixes.get((parent, token))
        if prefix is None:
            prefix = Prefix(parent, token)
            if self.context is not None:
                prefix.state, bonus = self.context.advance(parent.state, token)
                prefix.earned = parent.earned + bonus
                prefix.bonus = prefix.earned + self.context.partial(prefix.state)
            if self.fusion is not None and parent.language is not None:
                prefix.language, score = self.fusion.advance(parent.language, token)
                prefix.spoken = parent.spoken + score
                prefix.language_score = prefix.spoken + prefix.language.open
            prefix.extra = prefix.language_score + (0.0 if self._ranking is None else prefix.bonus)
            self._prefixes[parent, token] = prefix
        return prefix


def _may_grow(fusion: Fusion, beams: list[Beam], tokens: list[int], scores: list[float], least: float) -> bool:
    """Whether the bounds of the language model let an extension reach the score `least`; the first token is blank."""
    for beam in beams:
        most = beam.rank + fusion.most_gain
        if most + scores[1] < least:
            return False
        losses = fusion.losses(beam.prefix.language)
        for token, score in zip(tokens[1:], scores[1:], strict=True):
            if most + score < least:
                break
            if beam.rank + score + fusion.gains[token] + losses[fusion.ends_word[token]] >= least:
                return True
    return False


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))
