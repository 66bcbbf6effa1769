"""Thread of a `Transcriber`. It processes a bounded queue of audio in order, and calls a callback for each event."""

import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import AudioError, AudioOverflowError, StreamError
from u2moe.runtime.recognition import LiveRecognition
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Result
from u2moe.runtime.stream import Stream

_MAX_REPORTS = 1000  # Maximum number of waiting errors of the source
_LONGEST_EXIT_S = 5.0  # Maximum seconds to wait for the chunk in progress, if the interpreter exits without `close`


class TranscriberThread:
    """Thread that recognises queued audio. It does not refer to its `Transcriber`, which can be garbage-collected."""

    def __init__(self, recognizer: Recognizer, stream: Stream, max_queue_s: float) -> None:
        self.on_partial: Callable[[Result], object] | None = None
        self.on_final: Callable[[Result], object] | None = None
        self.on_error: Callable[[Exception], object] | None = None
        self.on_change: Callable[[], object] = lambda: None  # called after a change of the queue and of `has_ended`
        self.changed = threading.Condition()  # its lock protects all state; it is notified when the thread has work
        self.sample_rate: float = recognizer.bundle.manifest.features.sample_rate  # until the first input
        self.max_queue_s = max_queue_s
        self.num_queued = self.num_fed = 0  # samples
        self.has_ended = False
        self.live = LiveRecognition(recognizer.decode_streams, stream)
        self._items: deque[npt.NDArray[np.float32] | Exception] = deque()
        self._input_finished = False
        self._is_abandoned = False
        self._process = os.getpid()
        self._error: BaseException | None = None
        self._is_reported = False
        self.thread = threading.Thread(target=self._work, name="u2moe-transcriber", daemon=True)
        self.thread.start()
        atexit.register(self._abandon)

    # Threads of the caller call the methods below.

    def feed(self, rate: float, samples: npt.NDArray[np.float32]) -> None:
        """Append samples to the queue; see `Transcriber.feed`."""
        with self.open():
            if self.num_fed and rate != self.sample_rate:
                raise AudioError(f"sample rate changed from {self.sample_rate} to {rate} Hz")
            queued_s, new_s = self.num_queued / rate, len(samples) / rate
            if queued_s + new_s > self.max_queue_s:
                excess = f"{new_s:.2f} s more would exceed the limit of {self.max_queue_s:g} s"
                raise AudioOverflowError(f"{queued_s:.2f} s of audio is waiting to be recognised: {excess}", new_s)
            if len(samples) == 0:
                return
            self.sample_rate = rate
            self._items.append(samples)
            self.num_queued += len(samples)
            self.num_fed += len(samples)
            self.changed.notify()

    def report(self, error: Exception) -> None:
        """Append an error of the source to the queue; see `Transcriber.report`."""
        with self.open():
            if sum(isinstance(item, Exception) for item in self._items) < _MAX_REPORTS:
                self._items.append(error)
                self.changed.notify()

    def finish(self) -> None:
        """Finish the input without waiting. Idempotent. Does nothing in a forked process."""
        if os.getpid() != self._process:
            return
        with self.changed:
            self._input_finished = True
            self.changed.notify()

    def join(self) -> None:
        """Wait until all audio is recognised. A call in the thread itself returns at once."""
        if threading.current_thread() is not self.thread:
            self.thread.join()
            self.raise_unreported()

    def raise_unreported(self) -> None:
        """Raise the error that ended the thread. Do nothing if it was already raised or reported."""
        if self._error is not None and not self._is_reported:
            self._is_reported = True
            raise self._error

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold the lock during the block. Raises StreamError if the input is not open or a fork left the thread."""
        if os.getpid() != self._process:  # before locking, because the fork may have copied a held lock
            raise StreamError("this transcriber was created before the process forked: create a new one")
        with self.changed:
            if self._error is not None:
                raise StreamError(f"this transcriber was ended by an error: {self._error}") from self._error
            if self._input_finished:
                raise StreamError("the input of this transcriber is finished: create a new transcriber")
            yield

    # The thread itself calls the methods below.

    def _work(self) -> None:
        try:
            self._recognize()
        except BaseException as error:  # noqa: BLE001 - `join` raises it again
            self._error = error
        atexit.unregister(self._abandon)
        with self.changed:
            self.has_ended = self._input_finished = True
            self._items.clear()
            self.num_queued = 0
        self.on_change()

    def _recognize(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._items or self._input_finished)
                if not self._items:
                    break
                item = self._items.popleft()
                self.num_queued -= 0 if isinstance(item, Exception) else len(item)
            self.on_change()
            if isinstance(item, Exception):
                self._fail(item)
            else:
                self._tell(self.live.accept(self.sample_rate, item))
        if not self._is_abandoned:
            self._tell(self.live.finish())

    def _tell(self, results: Iterator[Result]) -> None:
        """Pass results to the callbacks one by one. If the iterator `results` raises an error, decoding has failed."""
        while True:
            try:
                result = next(results, None)
            except Exception as error:
                self._fail(error)
                self._is_reported = True
                raise
            if result is None:
                return
            callback = self.on_final if result.is_final else self.on_partial
            try:
                if callback is not None:
                    callback(result)
            except Exception as error:  # noqa: BLE001 - an error of the caller; recognition continues if it can be reported
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Call `on_error` with an error, or raise the error if `on_error` is None."""
        if self.on_error is None:
            raise error
        self.on_error(error)

    def _abandon(self) -> None:
        """End the thread. Wait for the chunk in progress: the interpreter must not exit while onnxruntime runs."""
        if os.getpid() != self._process:
            return
        with self.changed:
            self._is_abandoned = self._input_finished = True
            self._items.clear()
            self.changed.notify()
        self.thread.join(_LONGEST_EXIT_S)
