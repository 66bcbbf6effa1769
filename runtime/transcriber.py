"""Events for apps: sound is fed from anywhere, a thread recognises it, and calls back or is iterated over."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import threading
from collections import deque
from typing import TYPE_CHECKING

from u2moe.runtime.audio import Resampler, as_samples
from u2moe.runtime.endpoint import EndpointConfig
from u2moe.runtime.errors import AudioError, AudioOverflowError, StreamError
from u2moe.runtime.validation import checked_number

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    import numpy as np
    import numpy.typing as npt

    from u2moe.runtime.context import ContextGraph, Hotwords
    from u2moe.runtime.decoding import DecodingOptions
    from u2moe.runtime.recognizer import Recognizer
    from u2moe.runtime.result import Result

_MAX_KEPT = 1000
"""Results that wait for `async for`: an hour of speech. That nobody takes them is a mistake in the program."""
_MAX_REPORTS = 1000
"""Reports that wait to be told."""
_LONGEST_EXIT_S = 5.0
"""Seconds that an interpreter that exits without `close` waits for the chunk at hand."""


class Transcriber:
    """Recognises one source in a thread of its own, and tells what it hears.

    `feed` takes samples and never waits, so that it may be called from an audio callback. `on_partial` gets what is
    recognised of the utterance at hand whenever its text has changed (and an empty text where it turns out that nothing
    was said); `on_final` gets each finished segment exactly once, in order, with times from the first sample. Both are
    called in the transcriber's thread, one after the other.

    `on_error` gets what fails: decoding (which ends the transcriber), what a callback raises and what a source reports
    (after which it goes on). An error that cannot be told, because there is no `on_error` or it raises itself, ends the
    transcriber too, and `close` raises it. A transcriber that has ended refuses audio with StreamError.

    Within `async with`, what has no callback is for `async for`: partial and final results, and errors are raised.

    Close it, or use it in a `with` block: it first recognises what it was fed. An interpreter that exits without that
    waits for the chunk at hand only. Any number of transcribers share a recogniser; any threads may feed one, each
    `feed` as a whole, in the order of the calls.

    Args:
        recognizer: whose model to use.
        on_partial: called with a `Result`.
        on_final: called with a `Result`.
        on_error: called with an exception.
        options: how to decode; None: the recogniser's. Utterances always end by endpoints, if none are set by those of
            `EndpointConfig`.
        hotwords: phrases to prefer; None: the recogniser's.
        max_queue_s: seconds of audio that may wait to be recognised. Beyond that, `feed` raises AudioOverflowError.

    Raises:
        StreamError: the bundle cannot stream, or not decode as `options` ask.
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
        options = options or recognizer.options
        options = dataclasses.replace(options, endpoint=options.endpoint or EndpointConfig())
        self._recognizer = recognizer
        self._stream = recognizer.create_stream(options, hotwords=hotwords)
        self._on_partial, self._on_final, self._on_error = on_partial, on_final, on_error
        self._max_queue_s = checked_number("max_queue_s", max_queue_s, above=0, unit="seconds")
        self._changed = threading.Condition()
        self._items: deque[npt.NDArray[np.float32] | Exception] = deque()
        self._sample_rate: float | None = None
        self._num_queued = 0
        self._num_reports = 0
        self._num_fed = 0
        self._input_finished = False
        self._is_abandoned = False
        self._has_ended = False
        self._error: BaseException | None = None
        self._is_told = False
        self._shown = ""
        self._kept: deque[Result] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._work, name="u2moe-transcriber", daemon=True)
        self._thread.start()
        atexit.register(self._abandon)

    def feed(self, samples: npt.ArrayLike, sample_rate: float | None = None) -> None:
        """Append samples of one channel: all of them or, with an error, none. Never waits for recognition.

        Args:
            samples: float32 in [-1, 1] or int16 [n]; they are copied.
            sample_rate: in Hz, the same throughout; None: the model's.

        Raises:
            AudioOverflowError: too much is waiting; the samples are still the caller's, to feed later or to drop.
            AudioError: samples or rate that cannot be used.
            StreamError: the transcriber is closed, or has ended by an error, which is the cause of this one.
        """
        accepted = as_samples(samples)
        with self._changed:
            self._check_open()
            rate = self._check_rate(sample_rate)
            queued_s, new_s = self._num_queued / rate, len(accepted) / rate
            if queued_s + new_s > self._max_queue_s:
                raise AudioOverflowError(
                    f"{queued_s:.2f} s of audio are waiting to be recognised: {new_s:.2f} s more would be above the "
                    f"limit of {self._max_queue_s:g} s",
                    new_s,
                )
            if len(accepted) == 0:
                return
            self._items.append(accepted)
            self._num_queued += len(accepted)
            self._num_fed += len(accepted)
            self._changed.notify()

    def report(self, error: Exception) -> None:
        """Have `on_error` told of trouble at the source, when what was fed before is recognised.

        Where a thousand wait already it is forgotten: a queue must end somewhere, and these say enough.

        Raises:
            StreamError: the transcriber is closed or has ended.
        """
        with self._changed:
            self._check_open()
            if self._num_reports < _MAX_REPORTS:
                self._items.append(error)
                self._num_reports += 1
                self._changed.notify()

    def input_finished(self) -> None:
        """Say that no samples follow; waits for nothing. The last segment comes, and `async for` ends.

        Raises:
            StreamError: it was said before, or the transcriber is closed or has ended.
        """
        with self._changed:
            self._check_open()
            self._input_finished = True
            self._changed.notify()

    def close(self) -> None:
        """Recognise what was fed, to the last event. From within a callback it does not wait for that. Twice is once.

        Raises:
            Exception: the error that ended the transcriber, if it could not be told.
        """
        with self._changed:
            self._input_finished = True
            self._changed.notify()
        if threading.current_thread() is self._thread:
            return
        self._thread.join()
        if self._error is not None and not self._is_told:
            self._is_told = True
            raise self._error

    @property
    def sample_rate(self) -> float:
        """In Hz, of what is fed; the model's before there is any."""
        return self._sample_rate or self._recognizer.bundle.manifest.features.sample_rate

    @property
    def duration(self) -> float:
        """Seconds of audio fed."""
        return self._num_fed / self.sample_rate

    @property
    def queued_s(self) -> float:
        """Seconds of audio that wait to be recognised."""
        return self._num_queued / self.sample_rate

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # else what went wrong in the block is what its caller must know
                raise

    # What follows is for programs with an event loop.

    async def __aenter__(self) -> Self:
        import asyncio  # noqa: PLC0415 - programs without an event loop need not wait for its import

        with self._changed:
            if self._num_fed:
                raise StreamError("enter `async with` before feeding: results were called back or dropped")
            self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
            self._on_partial = self._on_partial or self._keep
            self._on_final = self._on_final or self._keep
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import asyncio  # noqa: PLC0415

        await asyncio.to_thread(self.__exit__, kind, error, trace)

    async def feed_async(self, samples: npt.ArrayLike, sample_rate: float | None = None) -> None:
        """Append samples of any length, waiting where too much is queued already; else as `feed`.

        If the task is cancelled, some of the samples may have been taken.
        """
        accepted = as_samples(samples)
        news = self._async_news()
        with self._changed:
            rate = self._check_rate(sample_rate)
        size = max(int(min(self._max_queue_s / 2, 1.0) * rate), 1)
        for start in range(0, len(accepted) or 1, size):
            while True:
                news.clear()
                try:
                    self.feed(accepted[start : start + size], sample_rate)
                    break
                except AudioOverflowError:
                    await news.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Result:
        news = self._async_news()
        while True:
            news.clear()
            with self._changed:
                if self._kept:
                    return self._kept.popleft()
                if self._has_ended:
                    break
            await news.wait()
        if self._error is not None and not self._is_told:
            self._is_told = True
            raise self._error
        raise StopAsyncIteration

    def _async_news(self) -> asyncio.Event:
        if self._news is None:
            raise StreamError("this needs `async with` around it")
        return self._news

    def _keep(self, result: Result) -> None:
        """Keep a result for `async for`; of partial ones only the last."""
        with self._changed:
            if self._kept and not self._kept[-1].is_final:
                self._kept.pop()
            if len(self._kept) >= _MAX_KEPT:
                raise StreamError(f"{_MAX_KEPT} results wait, and nobody takes them: iterate while you feed")
            self._kept.append(result)
        self._announce()

    def _announce(self) -> None:
        """Wake what awaits room in the queue, a result or the end."""
        if self._loop is not None and self._news is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._news.set)

    # What follows runs under the lock.

    def _check_open(self) -> None:
        if self._error is not None:
            raise StreamError(f"this transcriber was ended by an error: {self._error}") from self._error
        if self._input_finished:
            raise StreamError("the input of this transcriber is finished: create another")

    def _check_rate(self, sample_rate: float | None) -> float:
        model_rate = self._recognizer.bundle.manifest.features.sample_rate
        rate = model_rate if sample_rate is None else sample_rate
        if self._sample_rate is None:
            Resampler(rate, model_rate)  # refuses what is no rate here, not in the thread
            self._sample_rate = rate
        if rate != self._sample_rate:
            raise AudioError(f"sample rate changed from {self._sample_rate} to {rate} Hz")
        return rate

    # What follows runs in the transcriber's thread.

    def _work(self) -> None:
        error: BaseException | None = None
        try:
            self._recognize()
        except BaseException as caught:  # noqa: BLE001 - of whatever kind: it is raised again by `close`
            error = caught
        atexit.unregister(self._abandon)
        with self._changed:
            self._error = error
            self._has_ended = self._input_finished = True
            self._items.clear()
            self._num_queued = 0
        self._announce()

    def _recognize(self) -> None:
        while (item := self._take()) is not None:
            if isinstance(item, Exception):
                self._fail(item)
            else:
                self._stream.accept_waveform(self.sample_rate, item)
                self._decode()
        if not self._is_abandoned:
            self._stream.input_finished()
            self._decode()

    def _take(self) -> npt.NDArray[np.float32] | Exception | None:
        """What was fed or reported next; None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._input_finished)
            if not self._items:
                return None
            item = self._items.popleft()
            if isinstance(item, Exception):
                self._num_reports -= 1
            else:
                self._num_queued -= len(item)
        self._announce()
        return item

    def _decode(self) -> None:
        """Do the work that is ready, and tell what is new."""
        try:
            self._recognizer.decode_streams([self._stream])
        except Exception as error:
            self._tell_segments()
            self._fail(error)
            self._is_told = True
            raise
        self._tell_segments()
        result = self._stream.get_result()
        text = "" if result.is_final else result.text
        if text != self._shown:
            self._shown = text
            self._call(self._on_partial, dataclasses.replace(result, is_final=False))

    def _tell_segments(self) -> None:
        for segment in self._stream.take_segments():
            self._shown = ""
            self._call(self._on_final, segment)

    def _call(self, callback: Callable[[Result], object] | None, result: Result) -> None:
        if callback is not None:
            try:
                callback(result)
            except Exception as error:  # noqa: BLE001 - the app's own; recognition goes on where the app can be told
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Tell of an error, or raise it where it cannot be told."""
        if self._on_error is None:
            raise error
        self._on_error(error)

    def _abandon(self) -> None:
        """Let go of the interpreter: it must not end while the thread runs in onnxruntime."""
        with self._changed:
            self._is_abandoned = self._input_finished = True
            self._items.clear()
            self._changed.notify()
        self._thread.join(_LONGEST_EXIT_S)
