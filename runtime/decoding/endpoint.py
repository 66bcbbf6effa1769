"""Ends utterances by Kaldi's rules, with CTC blanks as silence.

With full context, pauses in the audio also end utterances. If an utterance ends within speech, `alignment.find_cut`
decides where to cut it.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from u2moe.runtime.decoding.ctc import Hypothesis
from u2moe.runtime.decoding.feature_extractor import FeatureExtractor
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.pauses import first_pause
from u2moe.runtime.options import EndpointConfig

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
