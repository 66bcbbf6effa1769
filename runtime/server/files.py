"""Uploaded files, recognised in threads of their own, a few at a time."""

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

from u2moe.runtime.audio import duration_of
from u2moe.runtime.server.errors import StoppingError, TooLargeError, UnavailableError

if TYPE_CHECKING:
    from u2moe.runtime.context import ContextGraph
    from u2moe.runtime.recognizer import Recognizer
    from u2moe.runtime.result import Result
    from u2moe.runtime.server.metrics import Metrics
    from u2moe.runtime.server.options import Limits

_NICENESS = 5
"""Of the threads that recognise files: live streams come first."""


class _AbandonedError(Exception):
    """Nobody waits for the file any more."""


class FileQueue:
    """Recognises files of any length, in the order in which they come.

    Attributes:
        is_stopping: whether no more are taken.
    """

    def __init__(self, recognizer: Recognizer, metrics: Metrics, limits: Limits, *, threads: int, places: int) -> None:
        self.is_stopping = False
        self._recognizer = recognizer
        self._metrics = metrics
        self._limits = limits
        self._places = places
        self._num_taken = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="u2moe-files", initializer=_be_nice)

    @property
    def num_taken(self) -> int:
        """Files that are taken."""
        return self._num_taken

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, from the first byte of an upload to the last of the answer.

        Raises:
            UnavailableError: there is none, or the server is about to stop.
        """
        if self.is_stopping:
            self._metrics.count("refusals", "stopping")
            raise StoppingError("the server is about to stop")
        if self._num_taken >= self._places:
            self._metrics.count("refusals", "full")
            raise UnavailableError(f"the server is full: it takes {self._places} files at a time")
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def recognize(self, file: Path, hotwords: ContextGraph | None) -> FileTask:
        """Recognise a file, when its turn comes."""
        return FileTask(self._recognizer, self._pool, file, hotwords, self._limits.duration_s, self._metrics)

    def stop(self) -> None:
        """Begin no more files; those at hand go on in their threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _change(self, number: int) -> None:
        self._num_taken += number
        self._metrics.set("files", self._num_taken)


class FileTask:
    """One file on its way: iterate over it for its segments as they are found, then `duration` is known.

    Raises:
        AudioError: the file is no audio that can be read.
        TooLargeError: it is longer than it may be.
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

    # What follows runs in a thread.

    def _work(self) -> None:
        begin = time.perf_counter()
        try:
            self._check(0.0)
            if duration_of(self._file) > self._max_duration_s:
                self._refuse()
            for segment in self._recognizer.segments(self._file, hotwords=self._hotwords, on_progress=self._check):
                self._tell(segment)
            self._tell(None)
        except Exception as error:  # noqa: BLE001 - it is raised where the file is waited for
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
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._results.put_nowait, item)


def _be_nice() -> None:
    """Let other threads of the machine go first, where a thread can be told so."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
