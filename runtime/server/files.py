"""Uploaded files, recognised in separate threads, a few at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from u2moe.runtime.audio.reading import duration_of
from u2moe.runtime.server.errors import StoppingError, TooLargeError, UnavailableError
from u2moe.runtime.server.log import Incidents

if TYPE_CHECKING:
    from u2moe.runtime.decoding.context import ContextGraph
    from u2moe.runtime.recognizer import Recognizer
    from u2moe.runtime.result import Result
    from u2moe.runtime.server.metrics import Metrics
    from u2moe.runtime.server.options import Limits

_NICENESS = 5
"""Niceness of the threads that recognise files: live streams have priority."""


class _AbandonedError(Exception):
    """The client is no longer waiting for the file."""


class FileQueue:
    """Recognises files of any length, in the order of arrival.

    Attributes:
        is_stopping: whether new files are refused.
    """

    def __init__(self, recognizer: Recognizer, metrics: Metrics, limits: Limits, *, threads: int, places: int) -> None:
        self.is_stopping = False
        self._recognizer = recognizer
        self._metrics = metrics
        self._incidents = Incidents(metrics)
        self._limits = limits
        self._places = places
        self._num_taken = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="u2moe-files", initializer=_be_nice)

    @property
    def num_taken(self) -> int:
        """Number of occupied places."""
        return self._num_taken

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, from the first byte of an upload to the last byte of the response.

        Raises:
            UnavailableError: none is free, or the server is about to stop.
        """
        if self.is_stopping:
            self._incidents.refuse("stopping")
            raise StoppingError
        if self._num_taken >= self._places:
            self._incidents.refuse("full")
            raise UnavailableError(f"the server is full: it takes {self._places} files at a time")
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def recognize(self, file: Path, hotwords: ContextGraph | None) -> FileTask:
        """Recognise a file when its turn comes."""
        return FileTask(self._recognizer, self._pool, file, hotwords, self._limits.duration_s, self._metrics)

    def stop(self) -> None:
        """Start no more files; running ones continue in their threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _change(self, number: int) -> None:
        self._num_taken += number
        self._metrics.set("files", self._num_taken)


class FileTask:
    """A file being recognised: iterate over its segments as they are found; afterwards `duration` is known.

    Raises:
        AudioError: the file cannot be read as audio.
        TooLargeError: it is too long.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        pool: ThreadPoolExecutor,
        file: Path,
        hotwords: ContextGraph | None,
        max_duration_s: float,
        metrics: Metrics,
    ) -> None:
        self.duration = 0.0
        self._recognizer = recognizer
        self._file = file
        self._hotwords = hotwords
        self._max_duration_s = max_duration_s
        self._metrics = metrics
        self._results: asyncio.Queue[Result | Exception | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._is_abandoned = threading.Event()
        pool.submit(self._work)

    async def __aiter__(self) -> AsyncIterator[Result]:
        try:
            while (item := await self._results.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self._is_abandoned.set()

    # The rest runs in a thread.

    def _work(self) -> None:
        begin = time.perf_counter()
        try:
            self._check(0.0)
            if duration_of(self._file) > self._max_duration_s:
                self._refuse()
            for segment in self._recognizer.segments(self._file, hotwords=self._hotwords, on_progress=self._check):
                self._tell(segment)
                self._metrics.count("results", "final")
            self._tell(None)
        except Exception as error:  # noqa: BLE001 - raised again where the file is awaited
            self._tell(error)
        self._metrics.count("audio_seconds", "file", self.duration)
        self._metrics.count("compute_seconds", "file", time.perf_counter() - begin)

    def _check(self, seconds: float) -> None:
        self.duration = seconds
        if self._is_abandoned.is_set():
            raise _AbandonedError
        if seconds > self._max_duration_s:
            self._refuse()

    def _refuse(self) -> None:
        raise TooLargeError(f"the audio of a file may last {self._max_duration_s:g} seconds", "file")

    def _tell(self, item: Result | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting
            self._loop.call_soon_threadsafe(self._results.put_nowait, item)


def _be_nice() -> None:
    """Lower the priority of this thread, if the system supports that."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
