"""One utterance: the audio from one endpoint to the next while it is being recognised, from its encoder frames on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from u2moe.runtime.result import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from u2moe.runtime.ctc import GreedySearch, Hypothesis, PrefixBeamSearch
    from u2moe.runtime.endpoint import Endpoint, Endpointer
    from u2moe.runtime.text import Vocabulary


class State(Enum):
    """How far an utterance is on its way from audio to its result; see `Source` for what leads from one to the next."""

    RECEIVING = "receiving"
    """Too little audio for the next window of features."""
    WINDOWS = "windows"
    """At least one window waits for the encoder."""
    SEARCHED = "searched"
    """It has ended, and its last frame is through the first pass: the second pass is missing."""
    CONCLUDED = "concluded"
    """It has its final result, and nothing follows in its source."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """Encoder frames: output [time, dim] and log-probabilities of the CTC head [time, vocab]."""

    output: npt.NDArray[np.float32]
    log_probs: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.output)

    def before(self, end: int) -> Frames:
        """The frames before number `end`."""
        return Frames(output=self.output[:end], log_probs=self.log_probs[:end])

    def after(self, start: int) -> Frames:
        """The frames from number `start` on."""
        return Frames(output=self.output[start:], log_probs=self.log_probs[start:])

    def followed_by(self, others: Frames) -> Frames:
        """These frames, and then others."""
        return Frames(
            output=np.concatenate([self.output, others.output]),
            log_probs=np.concatenate([self.log_probs, others.log_probs]),
        )


class Utterance:
    """What is known of an utterance.

    Attributes:
        number: of its segment, if it gets words.
        start: encoder frame of the source with which it begins.
        num_frames: its encoder frames so far.
        endpoint: by which it ended, if it did.
        surplus: frames after its end, with which the next one begins; None: there are none.

    Args:
        number: see above.
        start: see above.
        new_search: makes the first pass.
        output_size: width of the encoder output.
        keeps_output: whether `encoder_out` will be asked for.
    """

    def __init__(
        self,
        number: int,
        start: int,
        new_search: Callable[[], GreedySearch | PrefixBeamSearch],
        *,
        output_size: int,
        keeps_output: bool,
    ) -> None:
        self.number = number
        self.start = start
        self.num_frames = 0
        self.endpoint: Endpoint | None = None
        self.surplus: Frames | None = None
        self._new_search = new_search
        self._search = new_search()
        self._keeps_output = keeps_output
        self._outputs = [np.zeros((0, output_size), np.float32)]
        self._result: Result | None = Result(text="", is_final=False, segment=number)

    @property
    def end(self) -> int:
        """Encoder frame of the source before which it ends, so far."""
        return self.start + self.num_frames

    def advance(self, frames: Frames, endpointer: Endpointer | None) -> None:
        """Take over frames and search them, up to where the rules of `endpointer` end the utterance."""
        if endpointer is not None:
            self.endpoint = endpointer.advance(frames.log_probs)
        if self.endpoint is not None:
            self.surplus = frames.after(self.endpoint.num_frames)
            frames = frames.before(self.endpoint.num_frames)
        self.num_frames += len(frames)
        if self._keeps_output:
            self._outputs.append(frames.output)
        self._search.advance(frames.log_probs)
        self._result = None

    def shorten(self, num_frames: int, log_probs: npt.NDArray[np.float32]) -> None:
        """End it after `num_frames` of its frames: those after are surplus.

        Args:
            num_frames: how many are left.
            log_probs: of the CTC head [time, vocab], for all frames so far.
        """
        frames = Frames(output=self.encoder_out(), log_probs=log_probs)
        surplus = frames.after(num_frames)
        self.surplus = surplus if self.surplus is None else surplus.followed_by(self.surplus)
        self.num_frames = num_frames
        self._outputs = [frames.output[:num_frames]]
        self._search = self._new_search()
        self._search.advance(log_probs[:num_frames])
        self._result = None

    def hypotheses(self, limit: int | None = None) -> list[Hypothesis]:
        """Hypotheses of the first pass so far, best first; times from its first frame."""
        return self._search.hypotheses(limit)

    def finish_search(self) -> list[Hypothesis]:
        """The same, now that no frames follow."""
        self._search.finish()
        return self._search.hypotheses()

    def encoder_out(self) -> npt.NDArray[np.float32]:
        """Encoder output [time, dim]."""
        return np.concatenate(self._outputs)

    def result(self, vocabulary: Vocabulary, frame_s: float) -> Result:
        """The partial result, or the final one once it is concluded.

        Args:
            vocabulary: turns tokens into text.
            frame_s: seconds from one encoder frame to the next.
        """
        if self._result is None:
            best = next(iter(self._search.hypotheses(1)), None)
            self._result = Result(
                text=vocabulary.text(best.tokens) if best else "",
                is_final=False,
                segment=self.number,
                tokens=best.tokens if best else [],
                times=[round((self.start + time) * frame_s, 3) for time in best.times] if best else [],
                score=best.score if best else 0.0,
            )
        return self._result

    @property
    def is_concluded(self) -> bool:
        """Whether its result is final."""
        return self._result is not None and self._result.is_final

    def conclude(self, result: Result) -> None:
        """Make `result` the final one, and let go of what it was made from."""
        self._result = result
        self._outputs = [self._outputs[0][:0]]
