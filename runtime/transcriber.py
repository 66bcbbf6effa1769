"""Recognition in a separate thread. Applications feed audio, and get results from callbacks or by iteration."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import deque
from collections.abc import Callable
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

_MAX_KEPT = 1000
"""Maximum number of results that wait for `async for`: about an hour of speech. If more wait, the program does not
iterate, which is a bug."""


class Transcriber:
    """A recogniser for one source. It runs in its own thread and passes results to callbacks.

    `feed` never waits, so audio callbacks may call it. Any thread may call it. Calls are processed in order, and the
    samples of a call stay together. Any number of transcribers can share a recogniser.

    `on_partial` receives the result of the current utterance when its text or its number of committed words changes. An
    empty text means that the utterance turned out to contain no speech. `on_final` receives each finished segment
    exactly once, in order, with times from the first sample. The callbacks run in the transcriber's thread, one at a
    time.

    `on_error` receives three kinds of errors: decoding failures, exceptions in a callback, and errors reported by the
    source. With `on_error`, only a decoding failure ends the transcriber. Without `on_error`, each of these errors ends
    the transcriber, and `close` raises it. The same applies to an exception that `on_error` raises. A transcriber that
    has ended refuses audio with StreamError.

    Within `async with`, `async for` yields the partial and final results that have no callback. It also raises the
    error that ended the transcriber, unless `on_error` received it.

    Call `close`, or use a `with` block. Both wait until all audio is recognised. If a transcriber is garbage-collected
    before it is closed, a ResourceWarning is issued. Callbacks that refer to the transcriber, such as methods of its
    owner, prevent its collection. When the interpreter exits, it waits only for the chunk in progress.

    Args:
        recognizer: the recogniser to use.
        on_partial: called with a `Result`.
        on_final: called with a `Result`.
        on_error: called with an exception.
        options: decoding options; None: the recogniser's options. Without endpoint rules, the bundle's rules apply.
        hotwords: phrases to prefer; None: the recogniser's hotwords.
        max_queue_s: maximum seconds of audio that may wait to be recognised. If more would wait, `feed` raises
            AudioOverflowError.

    Raises:
        StreamError: the bundle cannot stream, or does not support `options`.
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
        self._is_closed = True  # for `__del__` if an error occurs below
        max_queue_s = checked_number("max_queue_s", max_queue_s, above=0, unit="seconds")
        for name, callback in {"on_partial": on_partial, "on_final": on_final, "on_error": on_error}.items():
            if callback is not None and not callable(callback):
                raise ValueError(f"{name} must be a function, got {callback!r}")
        options = checked_options("options", options, recognizer.options)
        options = dataclasses.replace(options, endpoint=options.endpoint or recognizer.default_endpoint)
        self._thread = TranscriberThread(recognizer, recognizer.create_stream(options, hotwords=hotwords), max_queue_s)
        self._thread.on_partial, self._thread.on_final, self._thread.on_error = on_partial, on_final, on_error
        self._kept: _KeptResults | None = None
        self._is_closed = False

    def feed(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of one channel, without waiting for recognition. If the call fails, no samples are appended.

        Args:
            sample_rate: sample rate in Hz; must be the same in every call.
            samples: float32 in [-1, 1] or int16 [n]. They are copied.

        Raises:
            AudioOverflowError: the queue is full. The caller may drop the samples or feed them later.
            AudioError: the samples or the sample rate are invalid.
            StreamError: the transcriber is closed, or was ended by an error, which is then the `__cause__`.
        """
        self._thread.feed(checked_rate(sample_rate), as_samples(samples))

    def report(self, error: Exception) -> None:
        """Report an error of the source. `on_error` receives it once all audio fed earlier is recognised.

        If a thousand reports are waiting, further reports are dropped.

        Raises:
            StreamError: the transcriber is closed or has ended.
            ValueError: `error` is not an exception.
        """
        if not isinstance(error, Exception):
            raise ValueError(f"error must be an exception, got {error!r}")  # noqa: TRY004 - invalid arguments raise ValueError
        self._thread.report(error)

    def input_finished(self) -> None:
        """Finish the input without waiting for recognition. After the last segment, `async for` ends.

        Raises:
            StreamError: the input is already finished, or the transcriber is closed or has ended.
        """
        with self._thread.open():
            self._thread.finish()

    def close(self) -> None:
        """Wait until all audio is recognised and all callbacks have returned.

        A call in a callback returns at once. Idempotent.

        Raises:
            Exception: the error that ended the transcriber, if `on_error` did not receive it.
        """
        self._is_closed = True
        self._thread.finish()
        self._thread.join()

    @property
    def sample_rate(self) -> float:
        """Sample rate of the input in Hz. Before the first input, the model's sample rate."""
        return self._thread.sample_rate

    @property
    def duration(self) -> float:
        """Seconds of audio fed so far."""
        return self._thread.num_fed / self.sample_rate

    @property
    def queued_s(self) -> float:
        """Seconds of audio waiting to be recognised."""
        return self._thread.num_queued / self.sample_rate

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # an error in the block matters more to the caller
                raise

    def __del__(self) -> None:
        if not self._is_closed:
            warnings.warn(f"unclosed transcriber {self!r}", ResourceWarning, stacklevel=2, source=self)
            self._thread.finish()  # the remaining audio is recognised, just as closing a file writes its buffers

    # The methods below are for programs with an event loop.

    async def __aenter__(self) -> Self:
        import asyncio  # noqa: PLC0415 - programs without an event loop do not need this slow import

        with self._thread.changed:
            if self._thread.num_fed:
                raise StreamError("enter `async with` before feeding: earlier results went to callbacks or were lost")
            self._kept = _KeptResults(self._thread, asyncio.get_running_loop(), asyncio.Event())
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import asyncio  # noqa: PLC0415

        await asyncio.to_thread(self.__exit__, kind, error, trace)

    async def feed_async(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of any length, like `feed`. Wait while the queue is full.

        If the task is cancelled, some of the samples may already have been appended.
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
            raise StreamError("`feed_async` and `async for` work only within `async with`")
        return self._kept


class _KeptResults:
    """Results of a thread that `async for` has not taken yet. The event `news` wakes waiting tasks."""

    def __init__(self, thread: TranscriberThread, loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
        self.news = news
        self.results: deque[Result] = deque()
        self._lock, self._loop, self._on_final = thread.changed, loop, thread.on_final
        thread.on_partial = thread.on_partial or self.keep
        thread.on_final, thread.on_change = self.keep, self.announce

    def keep(self, result: Result) -> None:
        """Store a result, or call the program's `on_final`. If the last waiting result is partial, discard it."""
        with self._lock:
            if self.results and not self.results[-1].is_final:
                self.results.pop()
            if result.is_final and self._on_final is not None:
                callback = self._on_final
            elif len(self.results) >= _MAX_KEPT:
                raise StreamError(f"{_MAX_KEPT} results are waiting: iterate over the results while feeding")
            else:
                callback = self.results.append
        callback(result)
        self.announce()

    def announce(self) -> None:
        """Wake the tasks that wait for space in the queue, for a result, or for the end of the stream."""
        with contextlib.suppress(RuntimeError):  # if the loop is closed, no task is waiting
            self._loop.call_soon_threadsafe(self.news.set)
