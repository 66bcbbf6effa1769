"""CTC searches over log-probabilities: greedy search, and prefix beam search, whose beam is in `beam_search`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from u2moe.runtime.decoding.beam_search import Beam, BeamSearch
from u2moe.runtime.decoding.commitment import Commitment
from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.likely_tokens import most_probable
from u2moe.runtime.decoding.phrases import PhraseGraph


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
    """Return the most probable token of each frame, with repeats merged and blanks removed.

    Args:
        log_probs: [time, vocab].
        blank: id of the blank token.
        blank_penalty: see `penalize_blank`.
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


class GreedySearch:
    """`ctc_greedy_search` frame by frame. The result does not depend on how frames are split across calls."""

    def __init__(self, blank: int = 0, *, blank_penalty: float = 0.0) -> None:
        self.blank = blank
        self.blank_penalty = blank_penalty
        self.num_frames = 0
        self._last = -1
        self._score = 0.0
        self._tokens: list[int] = []
        self._times: list[int] = []
        self._probabilities: list[float] = []
        self._num_committed = 0

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Continue the search with log-probabilities [time, vocab]."""
        check_log_probs(log_probs, self.blank)
        if len(log_probs) == 0:
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

    def __init__(
        self,
        beam_size: int,
        blank: int = 0,
        context: ContextGraph | None = None,
        fusion: Fusion | None = None,
        *,
        grammar: PhraseGraph | None = None,
        blank_penalty: float = 0.0,
    ) -> None:
        if beam_size < 1:
            raise ValueError(f"beam_size must be at least 1, got {beam_size}")
        self.beam_size = beam_size
        self.blank = blank
        self.blank_penalty = blank_penalty
        self.num_frames = 0
        self.context = context
        self.fusion = fusion
        self._grammar = grammar
        self._searches = [BeamSearch(beam_size, blank, context, fusion, grammar=grammar)]
        if context is not None:
            self._searches.append(BeamSearch(beam_size, blank, context, fusion, ranks_by_bonus=True))
        self._commitments = [Commitment(search) for search in self._searches]

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Continue the search with the next log-probabilities [time, vocab]."""
        check_log_probs(log_probs, self.blank)
        if len(log_probs):
            log_probs = penalize_blank(log_probs, self.blank_penalty, self.blank)
            source = most_probable if self._grammar is None else self._grammar.most_probable
            self.advance_by(*source(log_probs, self.beam_size))

    def advance_by(self, tokens: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], *more: list[float]) -> None:
        """Continue the search with the most probable tokens of the next frames and their log-probabilities.

        `tokens` and `scores` [time, n] come from `most_probable`, after any blank penalty. `more` contains the other
        arguments of `BeamSearch.advance`, each as a list with one value per frame.
        """
        for frame in zip(tokens.tolist(), scores.tolist(), *more, strict=True):
            for search in self._searches:
                search.advance(*frame)
            self.num_frames += 1

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
        if self._grammar is not None:
            self._searches[0].decide()
        tokens = self._best().prefix.tokens(self._commitments[0].num_tokens)
        num = min(each.num_settled(tokens, word_starts) for each in self._commitments)
        phrase = self._searches[0].beams[0].prefix.phrase if num == len(tokens) else None
        return tokens[: int(num)], num % 1 > 0 or bool(self._grammar and phrase and self._grammar.is_whole(phrase))

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
