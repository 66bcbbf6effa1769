"""Where an utterance ends: Kaldi's endpoint rules on the blanks of the CTC head. Pure arithmetic on frames."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

SILENCE_LOG_PROB = math.log(0.8)
"""A frame is silence where blank is more probable than this, as in WeNet."""
SHORTEST_PAUSE_S = 0.4
"""An utterance that ends with less silence than this may end within a word."""
PAUSE = 0
"""In the place of a rule's number: the sound itself is quiet."""


@dataclass(frozen=True, kw_only=True)
class EndpointRule:
    """A rule fires when all of it holds at once; the names are those of Kaldi and sherpa-onnx.

    Attributes:
        must_contain_nonsilence: whether there must have been a frame that is not silence.
        min_trailing_silence: seconds of silence at the end.
        min_utterance_length: seconds since the utterance began, silence included.
    """

    must_contain_nonsilence: bool = False
    min_trailing_silence: float = 0.0
    min_utterance_length: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_trailing_silence", "min_utterance_length"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of seconds, at least 0, got {value}")
        if self.min_trailing_silence == 0 == self.min_utterance_length:
            raise ValueError("an endpoint rule needs min_trailing_silence or min_utterance_length above 0")


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An utterance ends when any rule fires. Defaults are those of sherpa-onnx; None switches a rule off.

    Attributes:
        rule1: nothing was said for long.
        rule2: something was said, and then nothing for a while.
        rule3: the utterance has become too long.
        pause: with full context, seconds of quiet in the sound itself at which a recording of more than 30 s is cut
            before it is encoded, so that nobody is heard beside others; at least 0.4, as words hold shorter ones.
            Without rules it cuts nothing.
    """

    rule1: EndpointRule | None = field(default_factory=lambda: EndpointRule(min_trailing_silence=2.4))
    rule2: EndpointRule | None = field(
        default_factory=lambda: EndpointRule(must_contain_nonsilence=True, min_trailing_silence=1.2)
    )
    rule3: EndpointRule | None = field(default_factory=lambda: EndpointRule(min_utterance_length=20.0))
    pause: float | None = 0.5

    def __post_init__(self) -> None:
        if self.pause is not None and not SHORTEST_PAUSE_S <= self.pause < math.inf:
            raise ValueError(f"pause must be a number of seconds, at least {SHORTEST_PAUSE_S}, got {self.pause}")

    @property
    def rules(self) -> tuple[tuple[int, EndpointRule], ...]:
        """The rules that are on, with their numbers."""
        rules = enumerate((self.rule1, self.rule2, self.rule3), start=1)
        return tuple((number, rule) for number, rule in rules if rule is not None)

    @property
    def min_pause(self) -> float | None:
        """Seconds of quiet that end an utterance with full context; None: none does."""
        return self.pause if self.rules else None


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """That an utterance ended.

    Attributes:
        num_frames: frames of those just given that belong to it: it ends after them.
        rule: number of the rule that fired, the smallest if several did, or `PAUSE`.
        trailing_silence: frames of silence at its end.
    """

    num_frames: int
    rule: int
    trailing_silence: int


class Endpointer:
    """Finds the first frame at which a rule fires, whatever portions the frames come in."""

    def __init__(self, config: EndpointConfig, frame_s: float, blank: int = 0) -> None:
        """Start an utterance of frames `frame_s` seconds apart."""
        self._blank = blank
        # Seconds as whole frames: 1.2 s of 40 ms is 30 frames although 30 * 0.04 < 1.2 in floating point.
        self._rules = [
            (number, rule.must_contain_nonsilence, _frames(rule.min_trailing_silence, frame_s),
             _frames(rule.min_utterance_length, frame_s))
            for number, rule in config.rules
        ]  # fmt: skip
        self.reset()

    def reset(self) -> None:
        """Begin the next utterance."""
        self._num_frames = 0
        self._num_silent = 0
        self._has_speech = False

    @property
    def trailing_silence(self) -> int:
        """Frames of silence at the end so far."""
        return self._num_silent

    def advance(self, log_probs: npt.NDArray[np.float32]) -> Endpoint | None:
        """Go on through log-probabilities [time, vocab]; None while no rule fires.

        Once one fires the utterance is over: `reset`, and give the frames after `Endpoint.num_frames` again.
        """
        for index, silent in enumerate((log_probs[:, self._blank] > SILENCE_LOG_PROB).tolist(), start=1):
            self._num_frames += 1
            self._num_silent = self._num_silent + 1 if silent else 0
            self._has_speech = self._has_speech or not silent
            for number, needs_speech, silence, length in self._rules:
                if (
                    self._num_silent >= silence
                    and self._num_frames >= length
                    and (self._has_speech or not needs_speech)
                ):
                    return Endpoint(num_frames=index, rule=number, trailing_silence=self._num_silent)
        return None


def _frames(seconds: float, frame_s: float) -> int:
    return math.ceil(round(seconds / frame_s, 6))
