"""An utterance during recognition: the audio from one endpoint to the next, as encoder frames."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.manifest import Calibration
from u2moe.runtime.decoding.confidence import word_confidence
from u2moe.runtime.decoding.ctc import GreedySearch, Hypothesis, PrefixBeamSearch
from u2moe.runtime.decoding.endpoint import Endpoint, Endpointer
from u2moe.runtime.decoding.native_search import NativeSearch
from u2moe.runtime.decoding.phrases import REST_COST, REST_PENALTY, PhraseGraph
from u2moe.runtime.model.device import Value, joined
from u2moe.runtime.result import PhraseResult, Result
from u2moe.runtime.text.vocabulary import Vocabulary
from u2moe.runtime.text.word_errors import num_revised

Search = GreedySearch | PrefixBeamSearch | NativeSearch
"""A search of the first pass."""


class Phase(Enum):
    """Phase of an utterance on its way from audio to result; see `StreamState` for the transitions."""

    RECEIVING = "receiving"
    """Too little audio for the next window of features."""
    WINDOWS = "windows"
    """At least one window is ready for the encoder."""
    SEARCHED = "searched"
    """The utterance has ended and the first pass is complete; the second pass is pending."""
    CONCLUDED = "concluded"
    """The utterance has its final result, and the source has ended."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """Encoder frames: output [time, dim] and log-probabilities of the CTC head [time, vocab]."""

    output: Value
    log_probs: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.output)

    def __getitem__(self, part: slice) -> Frames:
        return Frames(output=self.output[part], log_probs=self.log_probs[part])

    def followed_by(self, others: Frames) -> Frames:
        """Return these frames followed by others."""
        return Frames(
            output=joined([self.output, others.output], 0),
            log_probs=np.concatenate([self.log_probs, others.log_probs]),
        )


class Utterance:
    """An utterance during recognition.

    Attributes:
        number: number that its segment will have, if any words are recognised.
        start: encoder frame of the source at which it begins.
        num_frames: number of its encoder frames so far.
        endpoint: the endpoint that ended it, if any.
        surplus: frames after its end, if any. The next utterance begins with them.

    `new_search` creates its first-pass search. `keeps_output` states whether `encoder_out` will be needed. `commits`
    states whether to commit words, which is possible only if the utterance's frames are never encoded again. `grammar`
    is the grammar of the search, if any.
    """

    def __init__(
        self,
        number: int,
        start: int,
        new_search: Callable[[], Search],
        *,
        output_size: int,
        keeps_output: bool,
        commits: bool,
        grammar: PhraseGraph | None = None,
    ) -> None:
        self.number = number
        self.start = start
        self.num_frames = 0
        self.endpoint: Endpoint | None = None
        self.surplus: Frames | None = None
        self._new_search = new_search
        self._search = new_search()
        self._keeps_output = keeps_output
        self._outputs: list[Value] = [np.zeros((0, output_size), np.float32)]
        self._result: Result | None = None
        self._commits = commits
        self._committed: list[int] = []
        self._num_committed = 0
        self._grammar = grammar
        self._phrases: list[tuple[int, int, float]] = []  # by phrase: range of committed tokens, lowest probability
        self._loudest: list[int] = []  # by frame, the most probable token t other than blank; ~t if blank is better

    @property
    def end(self) -> int:
        """Exclusive end of the utterance so far, in encoder frames from the start of the source."""
        return self.start + self.num_frames

    def advance(self, frames: Frames, endpointer: Endpointer | None) -> None:
        """Add frames and search them, up to the point where the rules of `endpointer` end the utterance."""
        num_searched = 0

        def search_to(num_frames: int) -> list[Hypothesis]:
            nonlocal num_searched
            self._advance(frames.log_probs[num_searched:num_frames])
            num_searched = num_frames
            return self._search.hypotheses()

        if endpointer is not None:
            self.endpoint = endpointer.advance(frames.log_probs, search_to)
        if self.endpoint is not None:
            self.surplus = frames[self.endpoint.num_frames :]
            frames = frames[: self.endpoint.num_frames]
        self.num_frames += len(frames)
        if self._keeps_output:
            self._outputs.append(frames.output)
        self._advance(frames.log_probs[num_searched:])
        self._result = None

    def shorten(self, num_frames: int, log_probs: npt.NDArray[np.float32]) -> None:
        """End the utterance after `num_frames` frames; the rest is surplus. The partial result does not change.

        Args:
            num_frames: number of frames to keep.
            log_probs: CTC log-probabilities [time, vocab] of all frames so far.
        """
        frames = Frames(output=self.encoder_out(), log_probs=log_probs)
        surplus = frames[num_frames:]
        self.surplus = surplus if self.surplus is None else surplus.followed_by(self.surplus)
        self.num_frames = num_frames
        self._outputs = [frames.output[:num_frames]]
        times = self._search.best().times
        self._committed = self._committed[: sum(time < num_frames for time in times)]
        self._phrases = [each for each in self._phrases if each[1] <= len(self._committed)]
        self._commits = False
        self._search, self._loudest = self._new_search(), []
        self._advance(log_probs[:num_frames])

    def hypotheses(self, limit: int | None = None) -> list[Hypothesis]:
        """Return the first-pass hypotheses so far, best first. Times count from the first frame of the utterance."""
        return self._search.hypotheses(limit)

    def finish_search(self) -> list[Hypothesis]:
        """Finish the search; return the final hypotheses."""
        self._search.finish()
        return self._search.hypotheses()

    def encoder_out(self) -> Value:
        """Return the encoder output [time, dim]."""
        return joined(self._outputs, 0)

    def heard(self, found: Hypothesis) -> tuple[Hypothesis, list[int]]:
        """Replace each `rest` of a grammar in a hypothesis by the most probable tokens of its frames.

        Also returns, for each original token, its position in the new hypothesis. The new hypothesis has no times
        or probabilities. Its `context_score` contains the penalties and costs of `rest`. A hypothesis without `rest` is
        returned unchanged.
        """
        rest = None if self._grammar is None else self._grammar.rest
        if rest is None or rest not in found.tokens:
            return found, [*range(len(found.tokens))]
        tokens: list[int] = []
        begins, num = [], 0
        for token, begin, end in zip(found.tokens, found.times, [*found.times[1:], None], strict=True):
            begins.append(len(tokens))
            if token != rest:
                tokens.append(token)
                continue
            path = self._loudest[begin : None if end is None else end + 1]
            runs = [each for each, _ in itertools.groupby([max(path[0], ~path[0]), *path[1:]])]
            if end is not None and len(runs) > 1:
                runs.pop()  # the last run belongs to the next token
            tokens += [each for each in runs if each >= 0]
            num += len(tokens) - begins[-1]
        lost = num * REST_PENALTY + found.tokens.count(rest) * REST_COST
        return Hypothesis(tokens=tokens, score=found.score, times=[], context_score=-lost), begins

    def _advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        self._search.advance(log_probs)
        if self._grammar is not None and self._grammar.rest is not None and len(log_probs):
            blank = self._grammar.blank
            words = log_probs.copy()
            words[:, blank] = -np.inf
            best = words.argmax(axis=1)
            self._loudest += np.where(words.max(axis=1) > log_probs[:, blank], best, ~best).tolist()

    def result(
        self,
        vocabulary: Vocabulary,
        frame_s: float,
        clock: Callable[[float], float],
        calibration: Calibration | None = None,
    ) -> Result:
        """Return the partial result or, once the utterance is concluded, the final one.

        Args:
            vocabulary: converts tokens to text.
            frame_s: seconds per encoder frame.
            clock: converts seconds to times of results; see `StreamState.clock`.
            calibration: calibration of confidences.
        """
        if self._result is None:
            best = self._search.best()
            settled = self._search.next_peak() if self._commits else 0
            self._result = Result(
                text=vocabulary.text(best.tokens),
                is_final=False,
                segment=self.number,
                tokens=best.tokens,
                times=[clock((self.start + time) * frame_s) for time in best.times],
                score=best.score,
                committed=vocabulary.text(self._committed),
                num_committed=self._num_committed,
                committed_end=clock((self.start + settled) * frame_s),
                phrases=[
                    PhraseResult(
                        phrase=vocabulary.text(self._committed[begin:end]),
                        start=clock((self.start + best.times[begin]) * frame_s),
                        end=clock((self.start + best.times[end - 1] + 1) * frame_s),
                        confidence=word_confidence([probability], calibration),
                    )
                    for begin, end, probability in self._phrases
                ],
            )
        return self._result

    def num_revised(self, vocabulary: Vocabulary, tokens: Sequence[int]) -> int:
        """Return how many committed words the final tokens revise. After a cut, only the words before the cut count.

        See `Result.revised`.
        """
        committed, final = vocabulary.words(self._committed), vocabulary.words(tokens)
        return num_revised([word.text for word in committed], [word.text for word in final])

    def commit(self, vocabulary: Vocabulary) -> None:
        """Commit the words that no later partial result changes. Called after every chunk."""
        if self._commits:
            tokens, ends = self._search.settled(vocabulary.word_starts)
            words = vocabulary.complete_words(tokens, ends=ends)
            if words:
                self._search.commit(tokens[: words[-1].end])
                self._committed += tokens[: words[-1].end]
                self._num_committed += len(words)
                if self._grammar is not None:
                    probabilities = self._search.best().probabilities
                    phrases = self._grammar.phrases(self._committed, is_final=False)[len(self._phrases) :]
                    self._phrases += [(begin, end, min(probabilities[begin:end])) for begin, end in phrases]

    @property
    def is_concluded(self) -> bool:
        """Whether the utterance has its final result."""
        return self._result is not None and self._result.is_final

    def conclude(self, result: Result) -> None:
        """Set the final result, and release the data from which it was computed."""
        self._result = result
        self._outputs = [self._outputs[0][:0]]
