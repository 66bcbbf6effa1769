"""Streams of audio in the server, and the scheduler: one thread recognises all streams, in rounds of one batch each.

Clients' tasks in the event loop feed a stream and read its results. The scheduler's thread takes samples from it and
passes the results back, as a `Round`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.arrays import as_samples
from u2moe.runtime.errors import U2moeError
from u2moe.runtime.recognition import LiveRecognition
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Result
from u2moe.runtime.server.accounts import CLIENT, Lateness
from u2moe.runtime.server.errors import RecognitionError, TooLargeError
from u2moe.runtime.server.log import LOGGER, Metrics
from u2moe.runtime.server.options import Limits
from u2moe.runtime.stream import Stream

_BUFFER_S = 0.16  # maximum seconds of audio per buffer, so that no client takes more than its share of a round
_LEAST_S = 0.005  # minimum seconds of audio in a buffer, since each buffer has a fixed cost; less audio waits for more
_ROUND_S = 2.0  # seconds of waiting audio that suffice for a round, even without a complete chunk
_MAX_UNREAD = 100  # number of unread final results at which the server stops reading the client's audio
_LIVE_LEAD_S = 1.0  # a stream whose audio is ahead of the clock by more seconds is not live
_MAX_AHEAD = 4  # maximum number of non-live streams in a round
_REST = 0.5  # rest after a round of several live streams, relative to its duration; `_LONGEST_PERIOD_S` limits it
_LONGEST_PERIOD_S = 0.1  # maximum seconds between the starts of rounds, unless a round itself takes longer


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
        self.must_be_whole = False  # whether it is useful only if all its audio is recognised, even if the server stops
        self.num_fed = self.num_taken = 0  # samples put into the queue, and taken out by the scheduler
        self.num_rounds = self.last_round = 0  # rounds with this stream, and the scheduler's number of the last one
        self.start = time.monotonic()
        self._limits, self._wake = limits, wake
        self._live = LiveRecognition(recognizer.decode_streams, stream)
        self._buffers: deque[tuple[npt.NDArray[np.float32], float]] = deque()  # samples and their time of arrival
        self._finish_time: float | None = None  # when the client finished the input
        self._is_draining = False  # whether the stream ends after the current utterance
        self._small = np.zeros(0, np.float32)  # samples too short for a buffer
        self._num_done = self._num_rounds_done = 0
        self._finals: deque[Result] = deque()
        self._partial: Result | None = None
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._want()

    @property
    def duration(self) -> float:
        """Seconds of audio fed."""
        return (self.num_fed + len(self._small)) / self.sample_rate

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
        self._small = np.concatenate([self._small, accepted]) if len(self._small) else accepted
        if len(self._small) < _LEAST_S * rate:
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
            CLIENT.get().earn(min(size, len(accepted) - start) / rate)
            if self.has_work:
                self._wake()

    def _take_small(self) -> npt.NDArray[np.float32]:
        """Return and remove the samples that are not yet in the queue."""
        small, self._small = self._small, np.zeros(0, np.float32)
        return small

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

    async def __aiter__(self) -> AsyncIterator[Result]:
        while not self.is_exhausted:
            await self._until(lambda: bool(self._finals) or self._partial is not None or self.is_over)
            if self._finals:
                self._changed.set()  # there is room for more
                yield self._finals.popleft()
            elif self._partial is not None:
                partial, self._partial = self._partial, None
                yield partial
        self._check()

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
            taken.is_over = self._ends and not self._buffers  # in this order: the last audio precedes the end
            if taken.is_over:
                self.stream.input_finished()
        except Exception as error:  # noqa: BLE001 - the error concerns only this stream
            taken.error = error
        self.num_taken += taken.num_samples
        return taken

    def tell(self, taken: Round, *, has_failed: bool) -> None:
        """After decoding, add the results or the error to a round."""
        self._want()
        taken.error = taken.error or (RecognitionError("recognition has failed") if has_failed else None)
        try:
            results = self._live.results(self.num_alternatives) if taken.error is None else []
        except Exception as error:  # noqa: BLE001 - the error concerns only this stream
            taken.error, results = error, []
        taken.is_over = taken.is_over or taken.error is not None
        taken.finals = [result for result in results if result.is_final]
        taken.partial = None if taken.is_over or len(taken.finals) == len(results) else results[-1]


class Scheduler:
    """Decodes all streams in a separate thread, so that it never blocks the event loop.

    Each round takes one chunk from every live stream that has one, and decodes the chunks together. Streams that are
    faster than real time share a few places in each round, so that live streams do not wait for them.
    """

    def __init__(self, metrics: Metrics, limits: Limits) -> None:
        self._metrics, self._limits = metrics, limits
        self.lateness = Lateness()
        self._streams: dict[ServedStream, None] = {}  # in the order in which they were opened
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._has_news = self.is_decoding = False
        self._round = 0
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="u2moe-scheduler", daemon=True)
        self._thread.start()

    def open(self, recognizer: Recognizer, stream: Stream, sample_rate: float) -> ServedStream:
        """Return a served stream that feeds a client's audio to `stream`, which `recognizer` decodes."""
        served = ServedStream(recognizer, stream, sample_rate, self._limits, self._wake)
        with self._changed:
            self._streams[served] = None
        return served

    @property
    def streams(self) -> list[ServedStream]:
        """All streams that have not ended."""
        with self._changed:
            return list(self._streams)

    def stop(self) -> None:
        """Stop the thread after the current round, and wait for it."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
        self._thread.join()

    def _wake(self) -> None:
        if self._has_news:  # the thread resets this before it looks for work, so it will see the change
            return
        with self._changed:
            self._has_news = True
            self._changed.notify()

    def _deliver(self, outcomes: list[Round]) -> None:
        for outcome in outcomes:
            outcome.stream.deliver(outcome)
        self._metrics.set("queue_seconds", sum(stream.queued_s for stream in self.streams if stream.has_work))

    # The methods below run in the scheduler's thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news or self._stopping.is_set())
                if self._stopping.is_set():
                    return
                self._has_news = False
                self._streams = {stream: None for stream in self._streams if not stream.is_closed}
                streams = self._choose([stream for stream in self._streams if stream.has_work])
                self._has_news = self._has_news or bool(streams)
            if streams:
                begin, self.is_decoding = time.monotonic(), True
                self._serve(streams)
                self.is_decoding = False
                if all(stream.is_live for stream in streams):
                    self._stopping.wait(rest_s(time.monotonic() - begin, len(streams)))

    def _choose(self, ready: Sequence[ServedStream]) -> list[ServedStream]:
        """Choose all live streams, and a few others: those that have waited longest."""
        now = time.monotonic()
        for stream in ready:
            stream.is_live = stream.num_taken / stream.sample_rate - (now - stream.start) <= _LIVE_LEAD_S
        ahead = sorted((stream for stream in ready if not stream.is_live), key=lambda stream: stream.last_round)
        return [stream for stream in ready if stream.is_live] + ahead[:_MAX_AHEAD]

    def _serve(self, streams: list[ServedStream]) -> None:
        """Run a round: take audio, decode it, and deliver the results."""
        begin = time.perf_counter()
        self._round += 1
        rounds = [stream.take(self._round) for stream in streams]
        failed: set[Stream] = set()  # streams that have lost audio
        for recognizer in dict.fromkeys(stream.recognizer for stream in streams):
            own = [each.stream.stream for each in rounds if each.error is None and each.stream.recognizer is recognizer]
            try:
                recognizer.decode_streams(own)
            except Exception as error:  # noqa: BLE001 - other streams continue
                LOGGER.error("recognition failed: %s", type(error).__name__, exc_info=not isinstance(error, U2moeError))
                failed |= {stream for stream in own if stream.failure is not None} or set(own)
        now = time.monotonic()
        for each in rounds:
            each.stream.tell(each, has_failed=each.stream.stream in failed)
            self._count(each, now)
            if each.is_over:
                with self._changed:
                    del self._streams[each.stream]
        waits = [now - each.arrival for each in rounds if each.num_samples and each.stream.is_live]
        for seconds in waits:
            self._metrics.observe("lateness_seconds", seconds)
        if waits:
            self.lateness.observe(max(waits))
        self._metrics.count("compute_seconds", "stream", time.perf_counter() - begin)
        try:
            self._loop.call_soon_threadsafe(self._deliver, rounds)
        except RuntimeError:  # the loop is closed, so no client waits
            self._stopping.set()

    def _count(self, taken: Round, now: float) -> None:
        self._metrics.count("audio_seconds", "stream", taken.num_samples / taken.stream.sample_rate)
        if taken.finals:
            self._metrics.observe("final_latency_seconds", now - taken.arrival)
            self._metrics.count("results", "final", len(taken.finals))
        if taken.partial is not None:
            self._metrics.observe("partial_latency_seconds", now - taken.arrival)
            self._metrics.count("results", "partial")
            if taken.partial.text and not taken.stream.has_text:
                taken.stream.has_text = True
                self._metrics.observe("first_text_seconds", now - taken.stream.start)


def rest_s(round_s: float, num_streams: int) -> float:
    """Return how many seconds to rest after a round of live streams that took `round_s` seconds.

    During the rest, more chunks arrive. Decoding them together can take a third of the time of separate decoding.
    A round of one stream shows that chunks seldom coincide, so there is no rest, and results arrive soon.
    """
    if num_streams == 1:
        return 0.0
    return min(_REST * round_s, max(_LONGEST_PERIOD_S - round_s, 0.0))
