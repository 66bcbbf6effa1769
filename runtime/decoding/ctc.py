"""CTC searches over log-probabilities: greedy search, and prefix beam search, whose beam is in `beam_search`."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import numpy as np
import numpy.typing as npt

from u2moe.runtime.decoding.beam_search import Beam, BeamSearch
from u2moe.runtime.decoding.commitment import Commitment
from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.phrases import MIN_TOKENS, REST_PENALTY, PhraseGraph

_NUM_BLOCKS = 8  # the vocabulary is divided into this many blocks per wanted token


@dataclass(frozen=True, kw_only=True)
class Hypothesis:
    """The result of a search.

    Attributes:
        tokens: token ids, without blank, sos and eos.
        score: log-probability of all alignments (prefix beam search) or of the best one (greedy search), including
            the bonus of hotwords and the score of the language model.
        times: encoder frame where each token peaks (prefix beam search) or begins (greedy search).
        context_score: part of `score` that is the bonus of hotwords.
        probabilities: CTC probability of each token at its frame in `times`.
        language_score: part of `score` that comes from the language model. Before `finish`, it includes the best
            completion of the last word.
    """

    tokens: list[int]
    score: float
    times: list[int]
    context_score: float = 0.0
    probabilities: list[float] = field(default_factory=list)
    language_score: float = 0.0


def penalize_blank(log_probs: npt.NDArray[np.float32], penalty: float, blank: int = 0) -> npt.NDArray[np.float32]:
    """Return log-probabilities as they would be if the blank's logit were lower by `penalty`.

    Equals WeNet's `ctc_logprobs` with `blank_penalty` up to the rounding of log-probabilities, 6e-8 x exp(penalty).
    The array is [time, vocab]. The penalty is at least 0; 0 returns `log_probs` itself.
    """
    if penalty == 0:
        return log_probs
    # `math` calls the C library, as the C++ runtime does, so that all runtimes round in the same way.
    lost = math.expm1(-penalty)
    totals = [math.log1p(lost * math.exp(min(score, 0.0))) for score in log_probs[:, blank].tolist()]
    result = log_probs - np.array(totals, np.float32)[:, np.newaxis]
    result[:, blank] -= np.float32(penalty)
    return result


def ctc_greedy_search(log_probs: npt.NDArray[np.float32], blank: int = 0, *, blank_penalty: float = 0.0) -> Hypothesis:
    """Return the most probable token of each frame of log-probabilities [time, vocab].

    Repeats are merged, and blanks (id `blank`) removed. `blank_penalty` is that of `penalize_blank`.
    """
    search = GreedySearch(blank, blank_penalty=blank_penalty)
    search.advance(log_probs)
    return search.best()


def ctc_prefix_beam_search(
    log_probs: npt.NDArray[np.float32],
    beam_size: int,
    blank: int = 0,
    context: ContextGraph | None = None,
    fusion: Fusion | None = None,
    *,
    grammar: PhraseGraph | None = None,
    blank_penalty: float = 0.0,
) -> list[Hypothesis]:
    """Return the most probable token sequences, best first. The probability of each is the sum over all alignments.

    Returns at most `beam_size` sequences, or 2 * `beam_size` with hotwords.

    Args:
        log_probs: [time, vocab].
        beam_size: number of prefixes kept from frame to frame, and number of tokens per frame that may extend them.
        blank: id of the blank token.
        context: hotwords to prefer.
        fusion: language model.
        grammar: grammar to which hypotheses are restricted.
        blank_penalty: see `penalize_blank`.
    """
    search = PrefixBeamSearch(beam_size, blank, context, fusion, grammar=grammar, blank_penalty=blank_penalty)
    search.advance(log_probs)
    search.finish()
    return search.hypotheses()


@dataclass(eq=False)
class GreedySearch:
    """`ctc_greedy_search` frame by frame. The result does not depend on how frames are split across calls."""

    blank: int = 0
    _: KW_ONLY
    blank_penalty: float = 0.0

    def __post_init__(self) -> None:
        self.num_frames = self._num_committed = 0
        self._last, self._score = -1, 0.0
        self._tokens, self._times, self._probabilities = list[int](), list[int](), list[float]()

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Continue the search with log-probabilities [time, vocab]."""
        check_log_probs(log_probs, self.blank)
        if not len(log_probs):
            return
        log_probs = penalize_blank(log_probs, self.blank_penalty, self.blank)
        best = log_probs.argmax(axis=1)
        starts = np.flatnonzero((best != self.blank) & (best != np.concatenate(([self._last], best[:-1]))))
        self._tokens += best[starts].tolist()
        self._times += (starts + self.num_frames).tolist()
        self._probabilities += np.exp(log_probs[starts, best[starts]]).clip(max=1).tolist()
        self._last = int(best[-1])
        # Scores are added one by one, because the split into calls must not change the rounding.
        for score in log_probs[np.arange(len(best)), best].tolist():
            self._score += score
        self.num_frames += len(best)

    def finish(self) -> None:
        """End the input. This has no effect in this search."""

    def best(self) -> Hypothesis:
        """Return the hypothesis so far; this search has only one."""
        tokens, times, probabilities = [*self._tokens], [*self._times], [*self._probabilities]
        return Hypothesis(tokens=tokens, score=self._score, times=times, probabilities=probabilities)

    def settled(self, _word_starts: bytes) -> tuple[list[int], bool]:
        """Return the tokens after the committed ones, and False, because their last word may still continue."""
        return self._tokens[self._num_committed :], False

    def commit(self, tokens: Sequence[int]) -> None:
        """Commit further settled tokens."""
        self._num_committed += len(tokens)

    def next_peak(self) -> int:
        """Return the frame of the first token that is not committed; if there is none, the number of frames."""
        return self._times[self._num_committed] if self._num_committed < len(self._times) else self.num_frames

    def hypotheses(self, limit: int | None = None) -> list[Hypothesis]:
        """Return the only hypothesis so far, in a list."""
        return [self.best()][:limit]


@dataclass(eq=False)
class PrefixBeamSearch:
    """`ctc_prefix_beam_search` frame by frame. The result does not depend on how frames are split across calls.

    The score of a language model is added to the score of the alignments.

    With hotwords, two searches run in parallel. The first ignores hotwords; the second ranks prefixes by score plus
    bonus (WeNet's second prune). The result contains all hypotheses of the first search, and those of the second that
    have a bonus. Hotwords that no hypothesis contains therefore do not change a single bit of the result. `finish`
    removes the bonus of incomplete phrases.

    With a grammar, only allowed hypotheses are searched. `finish` removes hypotheses with an incomplete phrase, so
    there may be none.
    """

    beam_size: int
    blank: int = 0
    context: ContextGraph | None = None
    fusion: Fusion | None = None
    _: KW_ONLY
    grammar: PhraseGraph | None = None
    blank_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, got {self.beam_size}")
        self.num_frames = 0
        given = (self.beam_size, self.blank, self.context, self.fusion)
        self._searches = [BeamSearch(*given, grammar=self.grammar)]
        if self.context is not None:
            self._searches.append(BeamSearch(*given, ranks_by_bonus=True))
        self._commitments = [Commitment(search) for search in self._searches]

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Continue the search with the next log-probabilities [time, vocab]."""
        check_log_probs(log_probs, self.blank)
        if len(log_probs):
            log_probs = penalize_blank(log_probs, self.blank_penalty, self.blank)
            if self.grammar is None:
                found = (*most_probable(log_probs, self.beam_size), np.full(len(log_probs), -math.inf))
            else:
                found = _of_grammar(self.grammar, log_probs, max(self.beam_size, MIN_TOKENS))
            for frame in zip(*(part.tolist() for part in found), strict=True):
                for search in self._searches:
                    search.advance(*frame)
            self.num_frames += len(log_probs)

    def finish(self) -> None:
        """End the input: complete phrases earn their bonus, and the language model scores the last word."""
        for search in self._searches:
            search.finish()

    def best(self) -> Hypothesis:
        """Return the best of `hypotheses` that begins with the committed tokens. Hotwords may promote others."""
        return _hypothesis(self._best()) if self._searches[0].beams else Hypothesis(tokens=[], score=0.0, times=[])

    def settled(self, word_starts: bytes) -> tuple[list[int], bool]:
        """Return the settled tokens after the committed ones, and whether a word begins after them.

        No later frame changes settled tokens. With a grammar, if the last phrase is certain, hypotheses without it
        are dropped first (`BeamSearch.decide`).
        """
        if self.grammar is not None:
            self._searches[0].decide()
        tokens = self._best().prefix.tokens(self._commitments[0].last.depth)
        num = min(each.num_settled(tokens, word_starts) for each in self._commitments)
        phrase = self._searches[0].beams[0].prefix.phrase if num == len(tokens) else None
        return tokens[: int(num)], num % 1 > 0 or bool(self.grammar and phrase and self.grammar.is_whole(phrase))

    def commit(self, tokens: Sequence[int]) -> None:
        """Commit further settled tokens."""
        for each in self._commitments:
            each.extend(tokens)

    def next_peak(self) -> int:
        """Return the earliest frame at which a token may follow the committed ones.

        The result never decreases: new frames only append tokens, move the last peak of an alignment to a later frame,
        or end a hypothesis.
        """
        return int(min(self.num_frames, *(each.next_peak() for each in self._commitments)))

    def hypotheses(self, limit: int | None = None) -> list[Hypothesis]:
        """Return at most `limit` hypotheses so far, best first."""
        return [_hypothesis(beam) for beam in self._beams()[:limit]]

    def _best(self) -> Beam:
        return next(beam for beam in self._beams() if any(each.holds_for(beam.prefix) for each in self._commitments))

    def _beams(self) -> list[Beam]:
        """Return the beams of the first search, and others of the second that have a bonus. The best comes first."""
        beams = self._searches[0].beams
        if self.context is not None:
            named = [beam for beam in self._searches[1].beams if beam.prefix.bonus > 0]
            known = {tuple(beam.prefix.tokens()) for beam in beams} if named else set()
            beams = [*beams, *(beam for beam in named if tuple(beam.prefix.tokens()) not in known)]
        if self.context is not None or self.fusion is not None:
            beams = sorted(beams, key=_score_of, reverse=True)
        return beams


def most_probable(
    log_probs: npt.NDArray[np.float32], num: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the best tokens of each frame and their scores, both [time, min(num, vocab)]; lower ids first if equal."""
    num_frames, vocab = log_probs.shape
    num = min(num, vocab)
    width = max(vocab // (_NUM_BLOCKS * num), 1)
    num_blocks = vocab // width
    peaks = log_probs[:, : width * num_blocks].reshape(num_frames, width, num_blocks).max(axis=1)
    if np.isnan(peaks.max()) or np.isnan(log_probs[:, width * num_blocks :]).any():
        raise ValueError("log_probs contain NaN")
    # A peak is the highest score in a block. The `num` highest peaks belong to different tokens, so at least `num`
    # tokens score no lower than the lowest of these peaks. Usually, only a few more tokens do.
    least = np.partition(peaks, num_blocks - num, axis=1)[:, num_blocks - num, np.newaxis]
    places = np.flatnonzero(log_probs >= least)
    frames, scores = places // vocab, log_probs.reshape(-1)[places]
    order = np.lexsort((-scores, frames))
    firsts = order[np.searchsorted(frames, np.arange(num_frames))[:, np.newaxis] + np.arange(num)]
    return places[firsts] % vocab, scores[firsts]


def _of_grammar(
    grammar: PhraseGraph, log_probs: npt.NDArray[np.float32], num: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return each frame's `num` best tokens of a grammar, their scores, and that of `rest` at the start of a word."""
    tokens, rows, starts = grammar.tokens, log_probs[:, grammar.tokens], np.full(len(log_probs), -np.inf, np.float32)
    if grammar.rest is not None:
        words = log_probs - np.float32(REST_PENALTY)
        words[:, grammar.blank] = -np.inf
        rows = np.concatenate([rows, words.max(axis=1, keepdims=True)], axis=1)
        tokens, starts = np.append(tokens, grammar.rest), words[:, grammar.word_starts].max(axis=1)
    places, scores = most_probable(rows, num)
    return tokens[places], scores, starts


def _hypothesis(beam: Beam) -> Hypothesis:
    times, probabilities = beam.peaks()
    return Hypothesis(
        tokens=beam.prefix.tokens(),
        score=_score_of(beam),
        times=times,
        context_score=beam.prefix.bonus,
        probabilities=probabilities,
        language_score=beam.prefix.language_score,
    )


def _score_of(beam: Beam) -> float:
    return beam.total + beam.prefix.bonus + beam.prefix.language_score


def check_log_probs(log_probs: npt.NDArray[np.float32], blank: int) -> None:
    """Raise ValueError unless log-probabilities are [time, vocab] and `blank` is an id below vocab."""
    if log_probs.ndim != 2 or not 0 <= blank < log_probs.shape[1]:
        raise ValueError(f"log_probs must be [time, vocab] with vocab > blank ({blank}), got {log_probs.shape}")
