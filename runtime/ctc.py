"""CTC searches: pure functions on log-probabilities, and the incremental prefix beam search behind one of them.

The results are WeNet's (`wenet/transformer/search.py`), its quirks included: times are the peaks of the best single
alignment (viterbi), not of the sum; the viterbi score of an alignment that ends in blank is overwritten each frame.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from u2moe.runtime.context import ContextGraph

_NEVER = -math.inf

_NUM_BLOCKS = 8
"""Blocks that a frame's tokens are cut into, for each token that is sought: few enough to save work."""

_Times = tuple["_Times", int, float] | None
"""Peaks of a prefix' tokens as a chain from the last to the first: frame, and log-probability there. Prefixes share."""


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """What a search found.

    Attributes:
        tokens: token ids, without blank, sos and eos.
        score: log-probability: of all alignments (prefix beam search), or of the best one (greedy search); with
            hotwords, what they add is part of it.
        times: encoder frame of each token, where it peaks (prefix beam search) or begins (greedy search).
        context_score: the part of `score` that hotwords added.
        probabilities: what the CTC head gives each token at that frame.
    """

    tokens: list[int]
    score: float
    times: list[int]
    context_score: float = 0.0
    probabilities: list[float] = field(default_factory=list)


def ctc_greedy_search(log_probs: npt.NDArray[np.float32], blank: int = 0) -> Hypothesis:
    """Most probable token of each frame, repeats joined, blanks dropped.

    Args:
        log_probs: [time, vocab].
        blank: id of the blank token.
    """
    search = GreedySearch(blank)
    search.advance(log_probs)
    return search.hypotheses()[0]


def ctc_prefix_beam_search(
    log_probs: npt.NDArray[np.float32], beam_size: int, blank: int = 0, context: ContextGraph | None = None
) -> list[Hypothesis]:
    """Most probable token sequences over all their alignments, best first, at most `beam_size`; twice with hotwords.

    Args:
        log_probs: [time, vocab].
        beam_size: prefixes kept from frame to frame, and tokens of each frame that may extend them.
        blank: id of the blank token.
        context: hotwords to prefer.
    """
    search = PrefixBeamSearch(beam_size, blank, context)
    search.advance(log_probs)
    search.finish()
    return search.hypotheses()


class GreedySearch:
    """`ctc_greedy_search`, frame by frame: any split of the frames gives the same result."""

    def __init__(self, blank: int = 0) -> None:
        self.blank = blank
        self.num_frames = 0
        self._last = -1
        self._score = 0.0
        self._tokens: list[int] = []
        self._times: list[int] = []
        self._probabilities: list[float] = []

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Search on through log-probabilities [time, vocab]."""
        _check(log_probs, self.blank)
        if len(log_probs) == 0:
            return
        best = log_probs.argmax(axis=1)
        starts = np.flatnonzero((best != self.blank) & (best != np.concatenate(([self._last], best[:-1]))))
        self._tokens += best[starts].tolist()
        self._times += (starts + self.num_frames).tolist()
        self._probabilities += np.exp(log_probs[starts, best[starts]]).clip(max=1).tolist()
        self._last = int(best[-1])
        for score in log_probs[np.arange(len(best)), best].tolist():  # in order: a split must not change the rounding
            self._score += score
        self.num_frames += len(best)

    def finish(self) -> None:
        """Say that no frames follow; changes nothing here."""

    def hypotheses(self, limit: int | None = None) -> list[Hypothesis]:
        """The one hypothesis so far."""
        best = Hypothesis(
            tokens=list(self._tokens),
            score=self._score,
            times=list(self._times),
            probabilities=list(self._probabilities),
        )
        return [best][:limit]


class _Prefix:
    """A token sequence as a node of a tree. Equal sequences are the same node for as long as any beam needs it.

    `state` is where hotwords stand after it, `earned` the bonus of those that are complete, and `bonus` what the prefix
    is ranked with: the share of an open one too.
    """

    __slots__ = ("__weakref__", "bonus", "earned", "parent", "state", "token")

    def __init__(self, parent: _Prefix | None, token: int, state: int = 0) -> None:
        self.parent = parent
        self.token = token
        self.state = state
        self.earned = self.bonus = 0.0

    def tokens(self) -> list[int]:
        result = []
        node = self
        while node.parent is not None:
            result.append(node.token)
            node = node.parent
        return result[::-1]


class _Beam:
    """A prefix and the log-probabilities of the frames so far aligned to it.

    `blank` sums the alignments that end in blank, `token` those that end in the prefix' last token; `total` is both.
    `best_blank` and `best_token` are those of the single best alignment, `blank_times` and `token_times` its peaks.
    """

    __slots__ = ("best_blank", "best_token", "blank", "blank_times", "order", "prefix", "token", "token_times", "total")

    def __init__(self, prefix: _Prefix) -> None:
        self.prefix = prefix
        self.blank = self.token = self.total = self.best_blank = self.best_token = _NEVER
        self.blank_times: _Times = None
        self.token_times: _Times = None
        self.order = 0

    def add_blank(self, score: float) -> None:
        """Let all alignments go on with blank, of log-probability `score`, and none otherwise."""
        if not self.best_blank > self.best_token:
            self.best_blank, self.blank_times = self.best_token, self.token_times
        self.best_blank += score
        self.blank = self.total = self.total + score
        self.token = self.best_token = _NEVER
        self.token_times = None

    @property
    def best(self) -> float:
        return max(self.best_token, self.best_blank)

    @property
    def times(self) -> _Times:
        return self.blank_times if self.best_blank > self.best_token else self.token_times


class PrefixBeamSearch:
    """`ctc_prefix_beam_search`, frame by frame: any split of the frames gives the same result.

    With hotwords two searches run side by side. One knows nothing of them; the other ranks prefixes by their score and
    bonus together (WeNet's second prune). Hypotheses are all of the first, and those of the second that hold a bonus.
    So hotwords of which no hypothesis holds one change nothing, to the last bit. `finish` takes back the bonus of what
    was only begun.
    """

    def __init__(self, beam_size: int, blank: int = 0, context: ContextGraph | None = None) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, got {beam_size}")
        self.beam_size = beam_size
        self.blank = blank
        self.num_frames = 0
        self.context = context
        self._searches = [_Search(beam_size, blank, context)]
        if context is not None:
            self._searches.append(_Search(beam_size, blank, context, ranks_by_bonus=True))

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Search on through log-probabilities [time, vocab]; what follows the frames before."""
        _check(log_probs, self.blank)
        if len(log_probs) == 0:
            return
        tokens, scores = _most_probable(log_probs, min(self.beam_size, log_probs.shape[1]))
        for frame_tokens, frame_scores in zip(tokens.tolist(), scores.tolist(), strict=True):
            for search in self._searches:
                search.advance(frame_tokens, frame_scores)
            self.num_frames += 1

    def finish(self) -> None:
        """Say that no frames follow: hotwords that were only begun are paid back, those complete at the end earned."""
        for search in self._searches:
            search.finish()

    def hypotheses(self, limit: int | None = None) -> list[Hypothesis]:
        """The prefixes so far, best first; at most `limit`."""
        beams = self._searches[0].beams
        if self.context is not None:
            named = [beam for beam in self._searches[1].beams if beam.prefix.bonus > 0]
            known = {tuple(beam.prefix.tokens()) for beam in beams} if named else set()
            beams = [*beams, *(beam for beam in named if tuple(beam.prefix.tokens()) not in known)]
            beams.sort(key=lambda beam: -(beam.total + beam.prefix.bonus))
        found = []
        for beam in beams[:limit]:
            times, probabilities = _peaks(beam.times)
            hypothesis = Hypothesis(
                tokens=beam.prefix.tokens(),
                score=beam.total + beam.prefix.bonus,
                times=times,
                context_score=beam.prefix.bonus,
                probabilities=probabilities,
            )
            found.append(hypothesis)
        return found


class _Search:
    """Prefixes from frame to frame.

    A frame costs what its likely tokens cost. Extensions are tried from the most probable token on, and given up for a
    prefix once they fall below the worst prefix that would be kept anyway. Where blank is so probable that all of them
    would, as in most frames, none is tried (`_nothing_grows`). Nothing that could have been kept is left out. Where the
    bonus of hotwords ranks, every extension is tried, since a bonus may lift it.

    Attributes:
        beams: the best prefixes, best first.
    """

    def __init__(
        self, beam_size: int, blank: int, context: ContextGraph | None, *, ranks_by_bonus: bool = False
    ) -> None:
        self.beam_size = beam_size
        self.blank = blank
        self.num_frames = 0
        self.context = context
        self.ranks_by_bonus = ranks_by_bonus
        root = _Beam(_Prefix(None, -1, 0 if context is None else context.start))
        root.blank = root.total = root.best_blank = root.best_token = 0.0
        self.beams = [root]
        # A prefix may leave the beam, and come back while longer prefixes live on: it must then be the same node.
        self._prefixes: weakref.WeakValueDictionary[tuple[_Prefix, int], _Prefix] = weakref.WeakValueDictionary()

    def advance(self, tokens: list[int], scores: list[float]) -> None:
        """One frame, given its most probable tokens and their log-probabilities, in descending order."""
        if self._nothing_grows(tokens, scores):
            self._stay_all(tokens, scores)
        else:
            self._advance_frame(tokens, scores)
        self.num_frames += 1

    def finish(self) -> None:
        """Count of the bonus what is earned."""
        if self.context is not None:
            for beam in self.beams:
                beam.prefix.bonus = beam.prefix.earned + self.context.finish(beam.prefix.state)

    def _nothing_grows(self, tokens: list[int], scores: list[float]) -> bool:
        """Whether all prefixes stay, and no other can come in.

        So it is if the best one, grown by the second most probable token, scores below the worst with blank, the most
        probable one: no extension scores better than the former, and every prefix that stays at least as the latter.
        """
        beams = self.beams
        if tokens[0] != self.blank or len(beams) < self.beam_size or self.ranks_by_bonus:
            return False
        grown = beams[0].total + scores[1] if len(scores) > 1 else _NEVER
        return grown < beams[-1].total + scores[0]

    def _stay_all(self, tokens: list[int], scores: list[float]) -> None:
        """`_advance_frame` where nothing grows: most prefixes only add blank, which keeps their order."""
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
            beams.sort(key=lambda beam: -beam.total)

    def _advance_frame(self, tokens: list[int], scores: list[float]) -> None:
        beams = self.beams
        rank_of = {token: rank for rank, token in enumerate(tokens)}
        index_of = {beam.prefix: index for index, beam in enumerate(beams)}
        kept: list[_Beam] = []
        merged: set[tuple[int, int]] = set()
        for index, beam in enumerate(beams):
            parent = index_of.get(beam.prefix.parent) if beam.prefix.parent is not None else None
            rank = rank_of.get(beam.prefix.token)
            if parent is not None and rank is not None:
                merged.add((parent, rank))
            stayed = self._stay(index, parent, rank, rank_of.get(self.blank), scores)
            if stayed.total > _NEVER:
                kept.append(stayed)

        if self.ranks_by_bonus:
            self.beams = self._prune_by_bonus(kept, merged, tokens, scores)
            return
        # What scores below this cannot be among the `beam_size` best. (Equal scores can: order decides.)
        limit = min(beam.total for beam in kept) if len(kept) >= self.beam_size else _NEVER
        candidates: list[tuple[float, int, int, int]] = []
        width = 2 * len(beams)
        for index, beam in enumerate(beams):
            last = beam.prefix.token
            for rank, token in enumerate(tokens):
                if beam.total + scores[rank] < limit:
                    break
                if token == self.blank or (index, rank) in merged:
                    continue
                total = (beam.blank if token == last else beam.total) + scores[rank]
                if total >= limit and total > _NEVER:
                    candidates.append((-total, rank * width + 2 * index + 1, index, rank))
        self.beams = self._prune(kept, candidates, tokens, scores)

    def _stay(
        self, index: int, parent: int | None, rank: int | None, blank_rank: int | None, scores: list[float]
    ) -> _Beam:
        """Prefix `index` after this frame.

        Its alignments are those that add blank or repeat its last token, and those by which its `parent` grows into it,
        if that is in the beam too.

        `order` becomes the place at which WeNet would have met the prefix first, which decides among equal scores.
        """
        old = self.beams[index]
        new = _Beam(old.prefix)
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
                # The peak moves to this frame, unless the same token was reached from the parent in this frame before.
                if new.best_token == _NEVER and old.token_times is not None:
                    new.token_times = (old.token_times[0], self.num_frames, score)
                new.best_token = repeats
            if parent is not None and parent > index:
                self._grow(new, self.beams[parent], score)
            new.order = min(new.order, rank * width + 2 * index)
        new.total = _log_add(new.blank, new.token)
        return new

    def _grow(self, new: _Beam, parent: _Beam, score: float) -> None:
        """Add to `new` the alignments by which `parent` grows by one token of log-probability `score` in this frame."""
        if parent.prefix.token == new.prefix.token:  # the same token again: only after a blank
            total, best, times = parent.blank, parent.best_blank, parent.blank_times
        else:
            total, best, times = parent.total, parent.best, parent.times
        new.token = _log_add(new.token, total + score)
        if new.best_token < best + score:
            new.best_token = best + score
            new.token_times = (times, self.num_frames, score)

    def _prune(
        self, kept: list[_Beam], candidates: list[tuple[float, int, int, int]], tokens: list[int], scores: list[float]
    ) -> list[_Beam]:
        """The best `beam_size` of the prefixes that stay and the candidates (-score, order, beam, rank) to grow."""
        ranked: list[tuple[float, int, int, int]] = [
            (-beam.total, beam.order, place, -1) for place, beam in enumerate(kept)
        ]
        ranked += candidates
        ranked.sort(key=itemgetter(0, 1))
        result = []
        for negative, _, index, rank in ranked[: self.beam_size]:
            if rank < 0:
                result.append(kept[index])
                continue
            parent = self.beams[index]
            new = _Beam(self._prefix(parent.prefix, tokens[rank]))
            self._grow(new, parent, scores[rank])
            new.total = -negative
            result.append(new)
        return result

    def _prune_by_bonus(
        self, kept: list[_Beam], merged: set[tuple[int, int]], tokens: list[int], scores: list[float]
    ) -> list[_Beam]:
        """The best `beam_size`, by score and bonus, of the prefixes that stay and all that can grow."""
        beams = list(kept)
        width = 2 * len(self.beams)
        for index, parent in enumerate(self.beams):
            for rank, token in enumerate(tokens):
                if token == self.blank or (index, rank) in merged:
                    continue
                new = _Beam(self._prefix(parent.prefix, token))
                self._grow(new, parent, scores[rank])
                new.total, new.order = new.token, rank * width + 2 * index + 1
                if new.total > _NEVER:
                    beams.append(new)
        beams.sort(key=lambda beam: (-(beam.total + beam.prefix.bonus), beam.order))
        return beams[: self.beam_size]

    def _prefix(self, parent: _Prefix, token: int) -> _Prefix:
        prefix = self._prefixes.get((parent, token))
        if prefix is None:
            prefix = _Prefix(parent, token)
            if self.context is not None:
                prefix.state, bonus = self.context.advance(parent.state, token)
                prefix.earned = parent.earned + bonus
                prefix.bonus = prefix.earned + self.context.partial(prefix.state)
            self._prefixes[parent, token] = prefix
        return prefix


def _check(log_probs: npt.NDArray[np.float32], blank: int) -> None:
    if log_probs.ndim != 2 or not 0 <= blank < log_probs.shape[1]:
        raise ValueError(f"log_probs must be [time, vocab] with blank {blank} below vocab, got {log_probs.shape}")


def _most_probable(
    log_probs: npt.NDArray[np.float32], num: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The `num` most probable tokens of each frame, descending, smaller ids first among equals: both [time, num]."""
    num_frames, vocab = log_probs.shape
    width = max(vocab // (_NUM_BLOCKS * num), 1)
    num_blocks = vocab // width
    peaks = log_probs[:, : width * num_blocks].reshape(num_frames, width, num_blocks).max(axis=1)
    if np.isnan(peaks.max()) or np.isnan(log_probs[:, width * num_blocks :]).any():
        raise ValueError("log_probs hold NaN")
    # `num` tokens are at least as probable as the least of the `num` highest peaks; few others are.
    least = np.partition(peaks, num_blocks - num, axis=1)[:, num_blocks - num, np.newaxis]
    places = np.flatnonzero(log_probs >= least)
    frames, scores = places // vocab, log_probs.reshape(-1)[places]
    order = np.lexsort((-scores, frames))
    firsts = order[np.searchsorted(frames, np.arange(num_frames))[:, np.newaxis] + np.arange(num)]
    return places[firsts] % vocab, scores[firsts]


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))


def _peaks(times: _Times) -> tuple[list[int], list[float]]:
    frames, probabilities = [], []
    while times is not None:
        times, frame, score = times
        frames.append(frame)
        probabilities.append(min(math.exp(score), 1.0))
    return frames[::-1], probabilities[::-1]
