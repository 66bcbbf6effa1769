"""One thread that recognises for all streams, in rounds, each a batch of their audio."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Sequence

import numpy as np

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.server.admission import Lateness
from u2moe.runtime.server.errors import RecognitionError
from u2moe.runtime.server.log import LOGGER
from u2moe.runtime.server.metrics import Metrics
from u2moe.runtime.server.options import Limits
from u2moe.runtime.server.served_stream import AudioQueue, RoundResult, ServedStream
from u2moe.runtime.stream import Stream

_LIVE_LEAD_S = 1.0
"""A stream whose audio is more seconds ahead of the clock than this is not live."""
_MAX_AHEAD = 4
"""Number of other streams served in one round, with the time that live ones leave."""
_REST = 0.5
"""Rest after a round of live streams, as a multiple of the time that the round took, within `_LONGEST_PERIOD_S`."""
_LONGEST_PERIOD_S = 0.1
"""Most seconds from the start of a round to that of the next, unless the round itself takes longer."""


class Scheduler:
    """Decodes the audio of all streams in its own thread, so that the event loop never waits for it.

    Each round takes one chunk of every stream that has one and decodes them together. Those that send in real
    time come first. Others, like files, share a few places in each round, so that they get the
    remaining time and live ones do not wait for them.
    """

    def __init__(self, metrics: Metrics, limits: Limits) -> None:
        self._metrics = metrics
        self._limits = limits
        self.lateness = Lateness()
        self._streams: dict[AudioQueue, ServedStream] = {}
        self._changed = threading.Condition()
        self._has_news = False
        self._stopping = threading.Event()
        self._round = 0
        self._may_rest = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="u2moe-scheduler", daemon=True)
        self._thread.start()

    def open(self, recognizer: Recognizer, stream: Stream, sample_rate: float) -> ServedStream:
        """A stream of a client that feeds `stream`, which `recognizer` decodes."""
        served = ServedStream(recognizer, stream, sample_rate, self._limits, self._wake)
        with self._changed:
            self._streams[served.queue] = served
        return served

    @property
    def streams(self) -> list[ServedStream]:
        """The streams that are not over."""
        with self._changed:
            return list(self._streams.values())

    def stop(self) -> None:
        """End the thread after the current round, and wait for it."""
        with self._changed:
            self._stopping.set()
            self._changed.notify()
        self._thread.join()

    def _wake(self) -> None:
        if self._has_news:  # set back before the thread looks for news: what is put there before this is seen
            return
        with self._changed:
            self._has_news = True
            self._changed.notify()

    def _deliver(self, outcomes: list[tuple[ServedStream, RoundResult]]) -> None:
        for stream, outcome in outcomes:
            stream.deliver(outcome)
        self._metrics.set("queue_seconds", sum(stream.queued_s for stream in self.streams if stream.queue.has_work))

    # The rest runs in the scheduler's thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news or self._stopping.is_set())
            with self._changed:
                if self._stopping.is_set():
                    return
                self._has_news = False
                for queue in [queue for queue in self._streams if queue.is_closed]:
                    del self._streams[queue]
                queues = self._choose([queue for queue in self._streams if queue.has_work])
                self._has_news = self._has_news or bool(queues)
            if queues:
                begin = time.monotonic()
                self._serve(queues)
                if self._may_rest:
                    self._stopping.wait(rest_s(time.monotonic() - begin))

    def _choose(self, ready: Sequence[AudioQueue]) -> list[AudioQueue]:
        """The live ones, and the few others that have waited longest."""
        now = time.monotonic()
        live: list[AudioQueue] = []
        ahead: list[AudioQueue] = []
        for queue in ready:
            lead_s = queue.num_taken / queue.sample_rate - (now - queue.start)
            queue.is_live = lead_s <= _LIVE_LEAD_S
            (live if queue.is_live else ahead).append(queue)
        self._may_rest = not ahead
        ahead.sort(key=lambda queue: queue.last_round)
        return live + ahead[:_MAX_AHEAD]

    def _serve(self, queues: list[AudioQueue]) -> None:
        """One round: take audio, decode it, and deliver the results."""
        begin = time.perf_counter()
        self._round += 1
        feeds = [_Feed(queue, self._round) for queue in queues]
        failed: set[Stream] = set()
        for recognizer in dict.fromkeys(queue.recognizer for queue in queues):
            own = [feed for feed in feeds if feed.error is None and feed.queue.recognizer is recognizer]
            failed |= self._decode(recognizer, [feed.queue.stream for feed in own])
        for feed in feeds:
            feed.queue.want(self._limits)
        outcomes = [(self._streams[feed.queue], feed.outcome(feed.queue.stream in failed)) for feed in feeds]
        now = time.monotonic()
        for feed, (_, outcome) in zip(feeds, outcomes, strict=True):
            self._count(feed, outcome, now)
            if outcome.is_over:
                with self._changed:
                    del self._streams[feed.queue]
        waits = [now - feed.arrival for feed in feeds if feed.num_samples and feed.queue.is_live]
        for seconds in waits:
            self._metrics.observe("lateness_seconds", seconds)
        if waits:
            self.lateness.observe(max(waits))
        self._metrics.count("compute_seconds", "stream", time.perf_counter() - begin)
        try:
            self._loop.call_soon_threadsafe(self._deliver, outcomes)
        except RuntimeError:  # the loop is closed: nobody waits
            self._stopping.set()

    def _decode(self, recognizer: Recognizer, streams: list[Stream]) -> set[Stream]:
        """Decode streams; returns those that have failed and lost audio."""
        try:
            recognizer.decode_streams(streams)
        except Exception as error:  # noqa: BLE001 - the others continue
            LOGGER.error("recognition failed: %s", type(error).__name__, exc_info=not isinstance(error, U2moeError))
            return {stream for stream in streams if stream.failure is not None} or set(streams)
        return set()

    def _count(self, feed: _Feed, outcome: RoundResult, now: float) -> None:
        self._metrics.count("audio_seconds", "stream", feed.duration)
        if outcome.finals:
            self._metrics.observe("final_latency_seconds", now - feed.arrival)
            self._metrics.count("results", "final", len(outcome.finals))
        if outcome.partial is not None:
            self._metrics.observe("partial_latency_seconds", now - feed.arrival)
            self._metrics.count("results", "partial")
            if outcome.partial.text and not feed.queue.has_text:
                feed.queue.has_text = True
                self._metrics.observe("first_text_seconds", now - feed.queue.start)


def rest_s(round_s: float) -> float:
    """Seconds without a round after a round of live streams that took `round_s`: their chunks wait for each other.

    Decoding chunks together takes as little as a third of the time. With few streams that is not needed: rounds are
    short and follow each other closely, so that results come soon. The more there is to do, the more is done together.
    """
    return min(_REST * round_s, max(_LONGEST_PERIOD_S - round_s, 0.0))


class _Feed:
    """The audio of one stream in one round."""

    def __init__(self, queue: AudioQueue, number: int) -> None:
        self.queue = queue
        self.num_samples = 0
        self.arrival = queue.finish_time or time.monotonic()
        self.error: Exception | None = None
        queue.last_round = number
        queue.num_rounds += 1
        buffers = []
        while queue.buffers and (self.num_samples == 0 or self.duration < queue.wanted_s):
            samples, self.arrival = queue.buffers.popleft()
            self.num_samples += len(samples)
            buffers.append(samples)
        try:
            if buffers:  # at once: each call has its costs
                queue.stream.accept_waveform(queue.sample_rate, np.concatenate(buffers))
            self.ends = not queue.buffers and queue.ends
            if self.ends:
                queue.stream.input_finished()
        except Exception as error:  # noqa: BLE001 - of this stream alone
            self.error = error
        queue.num_taken += self.num_samples

    @property
    def duration(self) -> float:
        """Seconds of audio taken."""
        return self.num_samples / self.queue.sample_rate

    def outcome(self, has_failed: bool) -> RoundResult:
        """The results of the round after decoding, or the error."""
        queue = self.queue
        told = functools.partial(RoundResult, queue=queue, number=queue.num_rounds, num_samples=self.num_samples)
        error = self.error or (RecognitionError("recognition has failed") if has_failed else None)
        if error is not None:
            return told(is_over=True, error=error)
        results = queue.live.results(queue.num_alternatives)
        finals = [result for result in results if result.is_final]
        partial = None if self.ends or len(finals) == len(results) else results[-1]
        return told(finals=finals, partial=partial, is_over=self.ends)
