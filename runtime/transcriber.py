"""Recognition in a thread for applications, which feed audio and get results by callback or iteration."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy.typing as npt

from u2moe.runtime.audio.arrays import as_samples, checked_rate
from u2moe.runtime.decoding.context import ContextGraph, Hotwords
from u2moe.runtime.errors import AudioOverflowError, StreamError
from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Result
from u2moe.runtime.transcriber_thread import TranscriberThread
from u2moe.runtime.validation import checked_number, checked_options

if TYPE_CHECKING:
    import asyncio
    import threading

_MAX_KEPT = 1000
"""Maximum number of results that wait for `async for`: about an hour of speech. If more are waiting, the program does
not iterate, which is a bug."""


class Transcriber:
    """A recogniser of one source that runs in its own thread and passes results to callbacks.

    `feed` never waits, so audio callbacks can call it. Any thread may call it; each call is processed as a whole, in
    order. Any number of transcribers can share a recogniser.

    `on_partial` receives the result of the current utterance whenever its text changes. The text is empty if the
    utterance turns out to contain no speech. `on_final` receives each finished segment exactly once, in order, with
    times from the first sample. Both are called in the transcriber's thread, one at a time.

    `on_error` receives three kinds of errors. Decoding failures end the transcriber; after an exception from a callback
    or an error reported by the source, it continues. If there is no `on_error`, or it raises an exception, the error
    also ends the transcriber, and `close` raises it. A transcriber that has ended refuses audio with StreamError.

    Within `async with`, `async for` yields the partial and final results that have no callback, and raises errors.

    Call `close` or use a `with` block. Both wait until all audio is recognised. A transcriber that is garbage-collected
    without being closed causes a ResourceWarning. Callbacks that refer to the transcriber, such as methods of its
    owner, keep it alive. When the interpreter exits, it waits only for the chunk in progress.

    Args:
        recognizer: the recogniser to use.
        on_partial: called with a `Result`.
        on_final: called with a `Result`.
        on_error: called with an exception.
        options: decoding options; None: the recogniser's. Without endpoint rules, the bundle's rules apply.
        hotwords: phrases to prefer; None: the recogniser's.
        max_queue_s: seconds of audio that may wait to be recognised. Beyond that, `feed` raises AudioOverflowError.

    Raises:
        StreamError: the bundle cannot stream or does not support `options`.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        *,
        on_partial: Callable[[Result], object] | None = None,
        on_final: Callable[[Result], object] | None = None,
        on_error: Callable[[Exception], object] | None = None,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
        max_queue_s: float = 10.0,
    ) -> None:
        self._is_closed = True  # until there is something to close
        max_queue_s = checked_number("max_queue_s", max_queue_s, above=0, unit="seconds")
        for name, callback in {"on_partial": on_partial, "on_final": on_final, "on_error": on_error}.items():
            if callback is not None and not callable(callback):
                raise ValueError(f"{name} must be a function, got {callback!r}")
        options = checked_options("options", options, recognizer.options)
        options = dataclasses.replace(options, endpoint=options.endpoint or recognizer.default_endpoint)
        stream = recognizer.create_stream(options, hotwords=hotwords)
        self._thread = TranscriberThread(recognizer, stream, max_queue_s)
        self._thread.on_partial, self._thread.on_final, self._thread.on_error = on_partial, on_final, on_error
        self._kept: _KeptResults | None = None
        self._is_closed = False

    def feed(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of one channel. On an error, none are appended. Never waits for recognition.

        Args:
            sample_rate: sample rate in Hz, the same in every call.
            samples: float32 in [-1, 1] or int16 [n]; they are copied.

        Raises:
            AudioOverflowError: the queue is full; the caller may feed the samples later or drop them.
            AudioError: invalid samples or sample rate.
            StreamError: the transcriber is closed, or an error ended it; that error is the `__cause__`.
        """
        self._thread.feed(checked_rate(sample_rate), as_samples(samples))

    def report(self, error: Exception) -> None:
        """Call `on_error` with an error of the source once everything fed before has been recognised.

        If a thousand reports are waiting, further ones are dropped.

        Raises:
            StreamError: the transcriber is closed or has ended.
            ValueError: `error` is not an exception.
        """
        if not isinstance(error, Exception):
            raise ValueError(f"error must be an exception, got {error!r}")  # noqa: TRY004 - invalid arguments raise ValueError
        self._thread.report(error)

    def input_finished(self) -> None:
        """Finish the input without waiting. The last segment follows; then `async for` ends.

        Raises:
            StreamError: the input is already finished, or the transcriber is closed or has ended.
        """
        with self._thread.open():
            self._thread.finish()

    def close(self) -> None:
        """Wait until all audio is recognised and all callbacks have returned. Idempotent; does not wait in a callback.

        Raises:
            Exception: the error that ended the transcriber, if it could not be reported.
        """
        self._is_closed = True
        self._thread.finish()
        self._thread.join()

    @property
    def sample_rate(self) -> float:
        """Sample rate of the input in Hz; before the first input, the model's."""
        return self._thread.sample_rate

    @property
    def duration(self) -> float:
        """Seconds of audio fed."""
        return self._thread.num_fed / self.sample_rate

    @property
    def queued_s(self) -> float:
        """Seconds of audio waiting to be recognised."""
        return self._thread.num_queued / self.sample_rate

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # an error in the block is more important to the caller
                raise

    def __del__(self) -> None:
        if not self._is_closed:
            warnings.warn(f"unclosed transcriber {self!r}", ResourceWarning, stacklevel=2, source=self)
            self._thread.finish()  # recognise the remaining audio, as closing a file flushes it

    # The methods below are for programs with an event loop.

    async def __aenter__(self) -> Self:
        import asyncio  # noqa: PLC0415 - programs without an event loop do not need this slow import

        with self._thread.changed:
            if self._thread.num_fed:
                raise StreamError("enter `async with` before feeding: earlier results went to callbacks or were lost")
            self._kept = _KeptResults(self._thread.changed, asyncio.get_running_loop(), asyncio.Event())
            thread, kept = self._thread, self._kept
            thread.on_partial = thread.on_partial or kept.keep
            thread.on_final = kept.passing(thread.on_final) if thread.on_final else kept.keep
            thread.on_change = kept.announce
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import asyncio  # noqa: PLC0415

        await asyncio.to_thread(self.__exit__, kind, error, trace)

    async def feed_async(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of any length, like `feed`, but wait while the queue is full.

        If the task is cancelled, some of the samples may already be appended.
        """
        rate, accepted = checked_rate(sample_rate), as_samples(samples)
        news = self._async_kept().news
        size = max(int(min(self._thread.max_queue_s / 2, 1.0) * rate), 1)
        for start in range(0, len(accepted) or 1, size):
            while True:
                news.clear()
                try:
                    self.feed(rate, accepted[start : start + size])
                    break
                except AudioOverflowError:
                    await news.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result:
        kept = self._async_kept()
        while True:
            kept.news.clear()
            with self._thread.changed:
                if kept.results:
                    return kept.results.popleft()
                if self._thread.has_ended:
                    break
            await kept.news.wait()
        self._thread.raise_unreported()
        raise StopAsyncIteration

    def _async_kept(self) -> _KeptResults:
        if self._kept is None:
            raise StreamError("call this method within `async with`")
        return self._kept


class _KeptResults:
    """Results waiting for `async for`, protected by a lock, and the event that wakes waiting tasks."""

    def __init__(self, lock: threading.Condition, loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
        self._lock = lock
        self.news = news
        self.results: deque[Result] = deque()
        self._loop = loop

    def keep(self, result: Result) -> None:
        """Keep a result. It replaces a partial result that is still waiting."""
        with self._lock:
            if self.results and not self.results[-1].is_final:
                self.results.pop()
            if len(self.results) >= _MAX_KEPT:
                raise StreamError(f"{_MAX_KEPT} results are waiting: iterate over the results while feeding")
            self.results.append(result)
        self.announce()

    def passing(self, on_final: Callable[[Result], object]) -> Callable[[Result], object]:
        """Wrap a callback for final results, so that it also discards the outdated partial result."""

        def call(result: Result) -> None:
            with self._lock:
                self.results.clear()
            on_final(result)

        return call

    def announce(self) -> None:
        """Wake tasks that wait for space in the queue, a result or the end."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing is waiting
            self._loop.call_soon_threadsafe(self.news.set)
