"""Scheduler: one thread recognises all streams, in rounds of one batch each."""

import asyncio
import threading
import time
from collections.abc import Sequence

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.server.admission import Lateness
from u2moe.runtime.server.log import LOGGER
from u2moe.runtime.server.metrics import Metrics
from u2moe.runtime.server.options import Limits
from u2moe.runtime.server.served_stream import Round, ServedStream
from u2moe.runtime.stream import Stream

_LIVE_LEAD_S = 1.0  # a stream whose audio is ahead of the clock by more seconds is not live
_MAX_AHEAD = 4  # maximum number of non-live streams in a round
_REST = 0.5  # rest after a round of live streams, relative to its duration; `_LONGEST_PERIOD_S` limits the rest
_LONGEST_PERIOD_S = 0.1  # maximum seconds between the starts of rounds, unless a round itself takes longer


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
        self._has_news = self._may_rest = False
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
                for stream in [stream for stream in self._streams if stream.is_closed]:
                    del self._streams[stream]
                streams = self._choose([stream for stream in self._streams if stream.has_work])
                self._has_news = self._has_news or bool(streams)
            if streams:
                begin = time.monotonic()
                self._serve(streams)
                if self._may_rest:
                    self._stopping.wait(rest_s(time.monotonic() - begin))

    def _choose(self, ready: Sequence[ServedStream]) -> list[ServedStream]:
        """Choose all live streams, and a few others: those that have waited longest."""
        now = time.monotonic()
        for stream in ready:
            stream.is_live = stream.num_taken / stream.sample_rate - (now - stream.start) <= _LIVE_LEAD_S
        ahead = sorted((stream for stream in ready if not stream.is_live), key=lambda stream: stream.last_round)
        self._may_rest = not ahead
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


def rest_s(round_s: float) -> float:
    """Return how many seconds to rest after a round of live streams that took `round_s` seconds.

    During the rest, more chunks arrive. Decoding them together can take a third of the time of separate decoding.
    With few streams, rounds are short and follow each other closely, so results arrive soon.
    """
    return min(_REST * round_s, max(_LONGEST_PERIOD_S - round_s, 0.0))
