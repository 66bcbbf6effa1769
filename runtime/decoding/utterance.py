"""An utterance during recognition: the encoder frames from one endpoint to the next, and the rules that end it.

Utterances end by Kaldi's rules, with CTC blanks as silence. With full context, pauses in the audio also end utterances.
If an utterance ends within speech, `alignment.find_cut` decides where to cut it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.manifest import Calibration
from u2moe.runtime.decoding.ctc import GreedySearch, Hypothesis, PrefixBeamSearch
from u2moe.runtime.decoding.feature_extractor import FeatureExtractor
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.native_search import NativeSearch
from u2moe.runtime.decoding.pauses import first_pause
from u2moe.runtime.decoding.phrases import REST_COST, REST_PENALTY, PhraseGraph
from u2moe.runtime.decoding.rescoring import word_confidence
from u2moe.runtime.model.device import Value, joined
from u2moe.runtime.options import EndpointConfig
from u2moe.runtime.result import PhraseResult, Result
from u2moe.runtime.text.vocabulary import Vocabulary
from u2moe.runtime.text.word_errors import num_revised

Search = GreedySearch | PrefixBeamSearch | NativeSearch
"""A search of the first pass."""
SILENCE_LOG_PROB = math.log(0.8)
"""A frame is silent if blank is more probable than this, as in WeNet."""
PAUSE = 0
"""Value of `Endpoint.rule` for a pause in the audio."""

_SILENT_BEFORE_CUT_S = 0.12
"""A pause is taken for quiet speech if a token lies within this many seconds before the middle of the pause."""
_EARLY, _LATE = 0.5, 1.5
"""Factors for the minimum silence of rule 2: the first if the sentence has probably ended, else the second."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The end of an utterance, which has the first `num_frames` frames of the latest call.

    `rule` is the number of the rule that fired (the lowest if several did), or `PAUSE`. `trailing_silence` is the
    number of silent frames at the end.
    """

    num_frames: int
    rule: int
    trailing_silence: int


class Endpointer:
    """Finds the first frame at which a rule fires. The split of frames into calls does not matter.

    With `EndpointConfig.turn`, it checks once in each silence whether a sentence has ended. It does so when the silence
    is long enough for an early end. The probability of an end is averaged over all first-pass hypotheses, so it is high
    only if the hypotheses agree. `trailing_silence` is the number of silent frames at the end of those so far.
    """

    def __init__(self, config: EndpointConfig, frame_s: float, blank: int = 0, fusion: Fusion | None = None) -> None:
        """Start an utterance whose frames are `frame_s` seconds apart. `fusion` is used for `EndpointConfig.turn`."""
        self._blank = blank
        self._fusion = fusion if config.turn and fusion and fusion.ngrams.end is not None else None
        self._turn = config.turn or 1.0

        def in_frames(seconds: float) -> int:
            # Whole frames: 1.2 s are 30 frames of 40 ms, although 30 * 0.04 < 1.2 in floating point.
            return math.ceil(min(round(seconds / frame_s, 6), sys.maxsize))  # infinite silence is never reached

        def rules(factor: float) -> list[tuple[int, bool, int, int]]:
            """Return the rules with times in frames. The minimum silence of rule 2 is multiplied by `factor`."""
            return [
                (number, rule.must_contain_nonsilence,
                 in_frames(rule.min_trailing_silence * (factor if number == 2 else 1)),
                 in_frames(rule.min_utterance_length))
                for number, rule in config.rules
            ]  # fmt: skip

        self._early, self._late = (rules(factor if self._fusion else 1) for factor in (_EARLY, _LATE))
        self._num_asked = next((silence for number, _, silence, _ in self._early if number == 2), 0)
        self.reset()

    def reset(self) -> None:
        """Start the next utterance."""
        self._num_frames = 0
        self.trailing_silence = 0
        self._has_speech = False
        self._rules = self._late

    def advance(
        self, log_probs: npt.NDArray[np.float32], search_to: Callable[[int], Sequence[Hypothesis]] | None = None
    ) -> Endpoint | None:
        """Process the next log-probabilities [time, vocab]. Return the endpoint if a rule fires, otherwise None.

        When a rule fires, the utterance has ended: call `reset`, and pass the frames after the first
        `Endpoint.num_frames` again. For `EndpointConfig.turn`, `search_to(n)` returns the hypotheses after the first n
        of the new frames. It is called with increasing n.
        """
        for index, silent in enumerate((log_probs[:, self._blank] > SILENCE_LOG_PROB).tolist(), start=1):
            self._num_frames += 1
            self.trailing_silence = self.trailing_silence + 1 if silent else 0
            self._has_speech = self._has_speech or not silent
            if not silent:
                self._rules = self._late
            elif search_to and self._fusion and self.trailing_silence == self._num_asked:
                is_over = end_probability(search_to(index), self._fusion) >= self._turn
                self._rules = self._early if is_over else self._late
            for number, needs_speech, silence, length in self._rules:
                is_long = self.trailing_silence >= silence and self._num_frames >= length
                if is_long and (self._has_speech or not needs_speech):
                    return Endpoint(num_frames=index, rule=number, trailing_silence=self.trailing_silence)
        return None


def end_probability(hypotheses: Sequence[Hypothesis], fusion: Fusion) -> float:
    """Return the probability that a sentence ends here, averaged over a beam. `hypotheses` are sorted, best first."""
    shares = [math.exp(each.score - hypotheses[0].score) for each in hypotheses]
    ends = (share * fusion.end_probability(each.tokens) for share, each in zip(shares, hypotheses, strict=True))
    return sum(ends) / sum(shares)


class PauseRule:
    """With full context, ends a window and its utterance in the middle of the first pause in the window.

    This takes two steps, because tokens are known only after a window is encoded. First, `shorten_window` finds the
    pause by its loudness. Then, `endpoint` confirms it unless the CTC head has found tokens there. A recording that
    fits into one window is encoded as a whole, as in WeNet.

    A pause lasts at least `min_pause` seconds; None: windows do not end at pauses. `frame_s` and `level_s` are seconds
    per encoder frame and per loudness frame. Each recording needs a rule of its own.
    """

    def __init__(self, min_pause: float | None, frame_s: float, level_s: float) -> None:
        self._min_pause, self._frame_s, self._level_s = min_pause, frame_s, level_s
        self._is_long = False
        self._rejected_until = 0  # encoder frame up to which pauses were quiet speech
        self._pause_len = 0  # encoder frames of the pause in which the last window ends, if any

    def shorten_window(self, extractor: FeatureExtractor, start: int) -> None:
        """End the last window in the middle of its first pause. Encoder frame `start` is the first of the window."""
        self._pause_len = 0
        self._is_long |= extractor.window_is_full
        if self._min_pause is None or not self._is_long:
            return
        levels = extractor.levels(len(extractor.window))
        pause = first_pause(levels, self._level_s, self._min_pause, (self._rejected_until - start) * self._frame_s)
        if pause is None or (extractor.is_exhausted and pause[1] >= len(levels) * self._level_s):
            return
        self._pause_len = int((pause[1] - pause[0]) / self._frame_s)
        extractor.shorten_window(int(sum(pause) / 2 / self._frame_s))

    def endpoint(self, num_frames: int, trailing_silence: int) -> Endpoint | None:
        """Return the end of the utterance if the window ends in a pause where the CTC head found no tokens.

        `num_frames` and `trailing_silence` count the encoder frames of the recording so far, and its last silent ones.
        """
        pause_len, self._pause_len = self._pause_len, 0
        if not pause_len:
            return None
        if trailing_silence * self._frame_s < _SILENT_BEFORE_CUT_S:
            self._rejected_until = num_frames
            return None
        return Endpoint(num_frames=0, rule=PAUSE, trailing_silence=pause_len)


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """Encoder frames: output [time, dim] and log-probabilities of the CTC head [time, vocab]."""

    output: Value
    log_probs: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.output)

    def __getitem__(self, part: slice) -> Frames:
        return Frames(output=self.output[part], log_probs=self.log_probs[part])


@dataclass(eq=False)
class Utterance:
    """An utterance during recognition.

    `number` is the number that its segment will have, if any words are recognised. It begins at encoder frame `start`
    of the source, and has `num_frames` frames so far. `endpoint` ended it, if any. `surplus` are frames after its end,
    at first `nothing`; the next utterance begins with them. `new_search` creates its first-pass search, whose times
    count from `start`. `keeps_output`: `encoder_out` will be needed. `commits`: words are committed, which is possible
    only if its frames are never encoded again. `is_concluded`: it has its final result.
    """

    number: int
    start: int
    new_search: Callable[[], Search]
    nothing: Frames
    _: KW_ONLY
    keeps_output: bool
    commits: bool
    grammar: PhraseGraph | None = None
    num_frames: int = 0
    endpoint: Endpoint | None = None
    is_concluded: bool = False

    def __post_init__(self) -> None:
        self.search = self.new_search()
        self.surplus = self.nothing
        self._outputs: list[Value] = [self.nothing.output]
        self._result: Result | None = None
        self._committed: list[int] = []
        self._num_committed = 0
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
            return self.search.hypotheses()

        if endpointer is not None:
            self.endpoint = endpointer.advance(frames.log_probs, search_to)
        if self.endpoint is not None:
            self.surplus = frames[self.endpoint.num_frames :]
            frames = frames[: self.endpoint.num_frames]
        self.num_frames += len(frames)
        if self.keeps_output:
            self._outputs.append(frames.output)
        self._advance(frames.log_probs[num_searched:])
        self._result = None

    def shorten(self, num_frames: int, log_probs: npt.NDArray[np.float32]) -> None:
        """End the utterance after `num_frames` frames; the rest is surplus. The partial result does not change.

        `log_probs` are the CTC log-probabilities [time, vocab] of all frames so far.
        """
        output = self.encoder_out()
        self._outputs = [output[:num_frames]]
        rest = np.concatenate([log_probs[num_frames:], self.surplus.log_probs])
        self.surplus = Frames(output=joined([output[num_frames:], self.surplus.output], 0), log_probs=rest)
        self.num_frames = num_frames
        self._committed = self._committed[: sum(time < num_frames for time in self.search.best().times)]
        self._phrases = [each for each in self._phrases if each[1] <= len(self._committed)]
        self.commits = False
        self.search, self._loudest = self.new_search(), []
        self._advance(log_probs[:num_frames])

    def encoder_out(self) -> Value:
        """Return the encoder output [time, dim]."""
        return joined(self._outputs, 0)

    def heard(self, found: Hypothesis) -> tuple[Hypothesis, list[int]]:
        """Replace each `rest` of a grammar in a hypothesis by the most probable tokens of its frames.

        Also returns, for each original token, its position in the new hypothesis. The new hypothesis has no times
        or probabilities. Its `context_score` contains the penalties and costs of `rest`. A hypothesis without `rest` is
        returned unchanged.
        """
        rest = None if self.grammar is None else self.grammar.rest
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
        self.search.advance(log_probs)
        if self.grammar is not None and self.grammar.rest is not None and len(log_probs):
            blank = self.grammar.blank
            words = log_probs.copy()
            words[:, blank] = -np.inf
            best = words.argmax(axis=1)
            self._loudest += np.where(words.max(axis=1) > log_probs[:, blank], best, ~best).tolist()

    def result(
        self, vocabulary: Vocabulary, frame_s: float, clock: Callable[[float], float], calibration: Calibration | None
    ) -> Result:
        """Return the partial or final result. `frame_s`: seconds per frame; `clock`: see `StreamState.clock`."""
        if self._result is None:
            best = self.search.best()
            settled = self.search.next_peak() if self.commits else 0
            phrases = [
                PhraseResult(
                    phrase=vocabulary.text(self._committed[begin:end]),
                    start=clock((self.start + best.times[begin]) * frame_s),
                    end=clock((self.start + best.times[end - 1] + 1) * frame_s),
                    confidence=word_confidence([probability], calibration),
                )
                for begin, end, probability in self._phrases
            ]
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
                phrases=phrases,
            )
        return self._result

    def num_revised(self, vocabulary: Vocabulary, tokens: Sequence[int]) -> int:
        """Return how many committed words the final tokens revise (`Result.revised`): after a cut, of those before."""
        committed, final = vocabulary.words(self._committed), vocabulary.words(tokens)
        return num_revised([word.text for word in committed], [word.text for word in final])

    def commit(self, vocabulary: Vocabulary) -> None:
        """Commit the words that no later partial result changes. Called after every chunk."""
        if self.commits:
            tokens, ends = self.search.settled(vocabulary.word_starts)
            words = vocabulary.complete_words(tokens, ends=ends)
            if words:
                self.search.commit(tokens[: words[-1].end])
                self._committed += tokens[: words[-1].end]
                self._num_committed += len(words)
                if self.grammar is not None:
                    probabilities = self.search.best().probabilities
                    phrases = self.grammar.phrases(self._committed, is_final=False)[len(self._phrases) :]
                    self._phrases += [(begin, end, min(probabilities[begin:end])) for begin, end in phrases]

    def conclude(self, result: Result) -> None:
        """Set the final result, and release the data from which it was computed."""
        self._result, self.is_concluded = result, True
        self._outputs = [self._outputs[0][:0]]
