"""One source of audio in the server. It takes samples and returns partial and final results.

Everything here runs in the event loop, except `take` and `tell`. The scheduler's thread calls these two to get samples
and to add results. `take` returns a `Round`, which the scheduler passes to `deliver` in the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.arrays import as_samples
from u2moe.runtime.recognition import LiveRecognition
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Result
from u2moe.runtime.server.errors import RecognitionError, TooLargeError
from u2moe.runtime.server.options import Limits
from u2moe.runtime.server.transport import earn
from u2moe.runtime.stream import Stream

_BUFFER_S = 0.16  # maximum seconds of audio per buffer, so that no client takes more than its share of a round
_LEAST_S = 0.005  # minimum seconds of audio in a buffer, since each buffer has a fixed cost; less audio waits for more
_ROUND_S = 2.0  # seconds of waiting audio that suffice for a round, even without a complete chunk
_MAX_UNREAD = 100  # number of unread final results at which the server stops reading the client's audio


@dataclass(kw_only=True)
class Round:
    """The audio that a round of the scheduler has taken from one stream, and the results for this stream."""

    stream: ServedStream
    number: int  # number of this round among the stream's rounds, from 1
    num_samples: int = 0
    arrival: float = 0.0  # time of arrival of the last samples
    finals: Sequence[Result] = ()
    partial: Result | None = None  # partial result of the segment after `finals`, if it has changed
    is_over: bool = False  # whether no more results follow
    error: Exception | None = None  # error that ended the stream


class ServedStream:
    """Source of audio that is recognised with endpoint rules. It ends with `finish` or `close`.

    Feed samples with `feed`, and iterate over the stream for results. Iteration yields the final result of each segment
    exactly once and in order. It yields a partial result when the text has changed; only the latest one is kept.
    Iteration ends after `finish`. The sample rate is in Hz. `wake` is called when the scheduler has work.
    """

    def __init__(
        self, recognizer: Recognizer, stream: Stream, sample_rate: float, limits: Limits, wake: Callable[[], None]
    ) -> None:
        self.recognizer, self.stream, self.sample_rate = recognizer, stream, sample_rate
        self.num_alternatives = 0  # in partial results
        self.partial_text = ""  # of the current segment
        self.is_over = self.is_closed = self.has_text = False  # closed: the stream was abandoned
        self.is_live = True  # whether the audio arrives no faster than real time
        self.num_fed = self.num_taken = 0  # samples put into the queue, and taken out by the scheduler
        self.num_rounds = self.last_round = 0  # rounds with this stream, and the scheduler's number of the last one
        self.start = time.monotonic()
        self._limits, self._wake = limits, wake
        self._live = LiveRecognition(recognizer.decode_streams, stream)
        self._buffers: deque[tuple[npt.NDArray[np.float32], float]] = deque()  # samples and their time of arrival
        self._finish_time: float | None = None  # when the client finished the input
        self._is_draining = False  # whether the stream ends after the current utterance
        self._small: list[npt.NDArray[np.float32]] = []  # samples too short for a buffer
        self._num_done = self._num_rounds_done = 0
        self._finals: deque[Result] = deque()
        self._partial: Result | None = None
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._want()

    @property
    def duration(self) -> float:
        """Seconds of audio fed."""
        return (self.num_fed + self._num_small) / self.sample_rate

    @property
    def queued_s(self) -> float:
        """Seconds of audio fed but not yet recognised."""
        return (self.num_fed - self._num_done) / self.sample_rate

    @property
    def has_work(self) -> bool:
        """Whether there is work for a round."""
        waiting_s = (self.num_fed - self.num_taken) / self.sample_rate
        return (waiting_s >= self.wanted_s and bool(self._buffers)) or self._ends

    @property
    def _ends(self) -> bool:
        """Whether no more audio will follow."""
        return self._finish_time is not None or (self._is_draining and not self._live.shown)

    def _want(self) -> None:
        """Set how many seconds of waiting audio are enough for a round."""
        self.wanted_s = min(self.stream.missing_s, _ROUND_S, self._limits.queue_s)

    async def feed(self, samples: npt.ArrayLike) -> None:
        """Append samples [n] of one channel, float32 in [-1, 1] or int16. Wait while the queue is full.

        Audio is dropped if the input is finished, or if the stream is over because the server is stopping. Raises
        AudioError for invalid samples, which are not appended, TooLargeError, or the error that ended the stream.
        """
        accepted, rate, most_s = as_samples(samples), self.sample_rate, self._limits.queue_s
        if self.duration + len(accepted) / rate > self._limits.duration_s:
            raise TooLargeError(f"a stream may have at most {self._limits.duration_s:g} seconds of audio")
        if len(accepted):  # empty arrays could accumulate without limit
            self._small.append(accepted)
        if self._num_small < _LEAST_S * rate:
            self._check()
            return
        accepted = self._take_small()
        size = max(round(_BUFFER_S * rate), 1)
        for start in range(0, len(accepted), size):
            await self._until(lambda: self.is_over or (self.queued_s < most_s and len(self._finals) < _MAX_UNREAD))
            self._check()
            if self.is_over or self._finish_time is not None:
                return
            self._put(accepted[start : start + size])
            earn(min(size, len(accepted) - start) / rate)
            if self.has_work:
                self._wake()

    @property
    def _num_small(self) -> int:
        return sum(map(len, self._small))

    def _take_small(self) -> npt.NDArray[np.float32]:
        """Return and remove the samples that are not yet in the queue."""
        small, self._small = self._small, []
        return small[0] if len(small) == 1 else np.concatenate([np.zeros(0, np.float32), *small])

    def _put(self, buffer: npt.NDArray[np.float32]) -> None:
        if len(buffer):
            self._buffers.append((buffer, time.monotonic()))
            self.num_fed += len(buffer)

    def finish(self) -> None:
        """Finish the input. All audio fed so far is still recognised. Idempotent."""
        if self._finish_time is None:
            self._put(self._take_small())
            self._finish_time = time.monotonic()
            self._wake()

    def drain(self) -> None:
        """End the stream after the current utterance, or immediately if there is none."""
        self._put(self._take_small())
        self._is_draining = True
        self._wake()

    def close(self) -> None:
        """Abandon the stream: nothing more is recognised. Idempotent."""
        self.is_over = self.is_closed = True
        self._changed.set()
        self._wake()

    async def settle(self) -> None:
        """Wait until all complete chunks are recognised or, if the input is finished, the rest too; raise an error."""
        # The order matters. A round that starts between the two checks increases `num_rounds` before it takes the work.
        await self._until(lambda: self.is_over or not (self.has_work or self._num_rounds_done != self.num_rounds))
        self._check()

    def take_finals(self) -> list[Result]:
        """Return and remove the final results that have not been taken yet."""
        finals, self._finals = list(self._finals), deque()
        self._changed.set()
        return finals

    @property
    def is_exhausted(self) -> bool:
        """Whether iteration has returned the last result."""
        return self.is_over and not self._finals and self._partial is None

    def __aiter__(self) -> ServedStream:
        return self

    async def __anext__(self) -> Result:
        await self._until(lambda: bool(self._finals) or self._partial is not None or self.is_over)
        if self._finals:
            self._changed.set()  # there is room for more
            return self._finals.popleft()
        if self._partial is not None:
            partial, self._partial = self._partial, None
            return partial
        self._check()
        raise StopAsyncIteration

    def deliver(self, outcome: Round) -> None:
        """Accept the results of a round. The scheduler calls this in the event loop.

        Results that belong to another stream or arrive out of order end this stream with an error, so that no client
        gets another client's words.
        """
        if outcome.stream is not self or outcome.number != self._num_rounds_done + 1:
            self._error = self._error or RecognitionError("a result was lost or belongs to another stream")
            self.close()
            return
        self._num_done += outcome.num_samples
        self._num_rounds_done += 1
        if outcome.finals:
            self._partial = None
            self._finals += outcome.finals
            self.partial_text = ""
        if outcome.partial is not None:
            self.partial_text = outcome.partial.text
            self._partial = outcome.partial
        self._error = self._error or outcome.error
        self.is_over = self.is_over or outcome.is_over
        self._changed.set()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Wait until `deliver` or another task makes a condition true."""
        while not holds():
            self._changed.clear()
            if not holds():
                await self._changed.wait()

    # The methods below run in the scheduler's thread.

    def take(self, number: int) -> Round:
        """Pass up to about one chunk of waiting audio to the recogniser, in round `number` of the scheduler, from 1."""
        self.last_round = number
        self.num_rounds += 1
        taken = Round(stream=self, number=self.num_rounds, arrival=self._finish_time or time.monotonic())
        buffers = []
        while self._buffers and (taken.num_samples == 0 or taken.num_samples / self.sample_rate < self.wanted_s):
            samples, taken.arrival = self._buffers.popleft()
            taken.num_samples += len(samples)
            buffers.append(samples)
        try:
            if buffers:  # passed in one call, since each call has a fixed cost
                self.stream.accept_waveform(self.sample_rate, np.concatenate(buffers))
            taken.is_over = not self._buffers and self._ends
            if taken.is_over:
                self.stream.input_finished()
        except Exception as error:  # noqa: BLE001 - the error concerns only this stream
            taken.error = error
        self.num_taken += taken.num_samples
        return taken

    def tell(self, taken: Round, *, has_failed: bool) -> None:
        """After decoding, add the results or the error to a round."""
        self._want()
        if has_failed and taken.error is None:
            taken.error = RecognitionError("recognition has failed")
        if taken.error is not None:
            taken.is_over = True
            return
        results = self._live.results(self.num_alternatives)
        taken.finals = [result for result in results if result.is_final]
        taken.partial = None if taken.is_over or len(taken.finals) == len(results) else results[-1]
