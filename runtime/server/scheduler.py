"""One thread that recognises for all sessions, in rounds, each a batch of their audio."""

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
from u2moe.runtime.server.session import Inbox, RoundResult, ServerSession
from u2moe.runtime.stream import Stream

_LIVE_LEAD_S = 1.0
"""A session whose audio is more seconds ahead of the clock than this is not live."""
_MAX_AHEAD = 4
"""Number of other sessions served in one round, with the time that live ones leave."""
_REST = 0.5
"""Rest after a round of live sessions, as a multiple of the time that the round took, within `_LONGEST_PERIOD_S`."""
_LONGEST_PERIOD_S = 0.1
"""Most seconds from the start of a round to that of the next, unless the round itself takes longer."""


class Scheduler:
    """Decodes the audio of all sessions in its own thread, so that the event loop never waits for it.

    Each round takes one chunk of every session that has one and decodes them together. Sessions that send in real
    time come first. Those that send faster, like files, share a few places in each round, so that they get the
    remaining time and live ones do not wait for them.
    """

    def __init__(self, metrics: Metrics, limits: Limits) -> None:
        self._metrics = metrics
        self._limits = limits
        self.lateness = Lateness()
        self._sessions: dict[Inbox, ServerSession] = {}
        self._changed = threading.Condition()
        self._has_news = False
        self._stopping = threading.Event()
        self._round = 0
        self._may_rest = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="u2moe-scheduler", daemon=True)
        self._thread.start()

    def open(self, recognizer: Recognizer, stream: Stream, sample_rate: float) -> ServerSession:
        """A session that feeds `stream`, which `recognizer` decodes."""
        session = ServerSession(recognizer, stream, sample_rate, self._limits, self._wake)
        with self._changed:
            self._sessions[session.inbox] = session
        return session

    @property
    def sessions(self) -> list[ServerSession]:
        """The sessions that are not over."""
        with self._changed:
            return list(self._sessions.values())

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

    def _deliver(self, outcomes: list[tuple[ServerSession, RoundResult]]) -> None:
        for session, outcome in outcomes:
            session.deliver(outcome)
        self._metrics.set("queue_seconds", sum(session.queued_s for session in self.sessions if session.inbox.has_work))

    # The rest runs in the scheduler's thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news or self._stopping.is_set())
            with self._changed:
                if self._stopping.is_set():
                    return
                self._has_news = False
                for inbox in [inbox for inbox in self._sessions if inbox.is_closed]:
                    del self._sessions[inbox]
                inboxes = self._choose([inbox for inbox in self._sessions if inbox.has_work])
                self._has_news = self._has_news or bool(inboxes)
            if inboxes:
                begin = time.monotonic()
                self._serve(inboxes)
                if self._may_rest:
                    self._stopping.wait(rest_s(time.monotonic() - begin))

    def _choose(self, ready: Sequence[Inbox]) -> list[Inbox]:
        """The live ones, and the few others that have waited longest."""
        now = time.monotonic()
        live: list[Inbox] = []
        ahead: list[Inbox] = []
        for inbox in ready:
            lead_s = inbox.num_taken / inbox.sample_rate - (now - inbox.start)
            inbox.is_live = lead_s <= _LIVE_LEAD_S
            (live if inbox.is_live else ahead).append(inbox)
        self._may_rest = not ahead
        ahead.sort(key=lambda inbox: inbox.last_round)
        return live + ahead[:_MAX_AHEAD]

    def _serve(self, inboxes: list[Inbox]) -> None:
        """One round: take audio, decode it, and deliver the results."""
        begin = time.perf_counter()
        self._round += 1
        feeds = [_Feed(inbox, self._round) for inbox in inboxes]
        failed: set[Stream] = set()
        for recognizer in dict.fromkeys(inbox.recognizer for inbox in inboxes):
            own = [feed for feed in feeds if feed.error is None and feed.inbox.recognizer is recognizer]
            failed |= self._decode(recognizer, [feed.inbox.stream for feed in own])
        for feed in feeds:
            feed.inbox.want(self._limits)
        outcomes = [(self._sessions[feed.inbox], feed.outcome(feed.inbox.stream in failed)) for feed in feeds]
        now = time.monotonic()
        for feed, (_, outcome) in zip(feeds, outcomes, strict=True):
            self._count(feed, outcome, now)
            if outcome.is_over:
                with self._changed:
                    del self._sessions[feed.inbox]
        waits = [now - feed.arrival for feed in feeds if feed.num_samples and feed.inbox.is_live]
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
            if outcome.partial.text and not feed.inbox.has_text:
                feed.inbox.has_text = True
                self._metrics.observe("first_text_seconds", now - feed.inbox.start)


def rest_s(round_s: float) -> float:
    """Seconds without a round after a round of live sessions that took `round_s`: their chunks wait for each other.

    Decoding chunks together takes as little as a third of the time. With few sessions that is not needed: rounds are
    short and follow each other closely, so that results come soon. The more there is to do, the more is done together.
    """
    return min(_REST * round_s, max(_LONGEST_PERIOD_S - round_s, 0.0))


class _Feed:
    """The audio of one session in one round."""

    def __init__(self, inbox: Inbox, number: int) -> None:
        self.inbox = inbox
        self.num_samples = 0
        self.arrival = inbox.finish_time or time.monotonic()
        self.error: Exception | None = None
        inbox.last_round = number
        inbox.num_rounds += 1
        blocks = []
        while inbox.blocks and (self.num_samples == 0 or self.duration < inbox.wanted_s):
            samples, self.arrival = inbox.blocks.popleft()
            self.num_samples += len(samples)
            blocks.append(samples)
        try:
            if blocks:  # at once: each call has its costs
                inbox.stream.accept_waveform(inbox.sample_rate, np.concatenate(blocks))
            self.ends = not inbox.blocks and inbox.ends
            if self.ends:
                inbox.stream.input_finished()
        except Exception as error:  # noqa: BLE001 - of this session alone
            self.error = error
        inbox.num_taken += self.num_samples

    @property
    def duration(self) -> float:
        """Seconds of audio taken."""
        return self.num_samples / self.inbox.sample_rate

    def outcome(self, has_failed: bool) -> RoundResult:
        """The results of the round after decoding, or the error."""
        inbox = self.inbox
        told = functools.partial(RoundResult, inbox=inbox, number=inbox.num_rounds, num_samples=self.num_samples)
        error = self.error or (RecognitionError("recognition has failed") if has_failed else None)
        if error is not None:
            return told(is_over=True, error=error)
        results = inbox.live.results(inbox.num_alternatives)
        finals = [result for result in results if result.is_final]
        partial = None if self.ends or len(finals) == len(results) else results[-1]
        return told(finals=finals, partial=partial, is_over=self.ends)
