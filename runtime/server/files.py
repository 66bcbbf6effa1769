"""Uploaded files, recognised in a separate thread, one at a time; no client takes all places or all room for them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import IO, Any

from u2moe.runtime.audio.decoder import FileDecoder
from u2moe.runtime.result import Result
from u2moe.runtime.server.admission import Admission
from u2moe.runtime.server.errors import StoppingError, StorageError, TooLargeError, UnavailableError
from u2moe.runtime.server.log import Incidents
from u2moe.runtime.server.metrics import Metrics
from u2moe.runtime.server.options import ServerOptions

_NICENESS = 5
"""Niceness of the thread that recognises files, and of the process that decodes them: live streams have priority."""


_LOOK_BYTES = 1 << 20
"""Bytes after which it is looked how much room is left."""


class _AbandonedError(Exception):
    """The client is no longer waiting for the file."""


@dataclass(eq=False)
class FilePlace:
    """A client's place for a file.

    Attributes:
        of_client: all places of the same client.
        num_bytes: stored so far.
    """

    of_client: list[FilePlace]
    num_bytes: int = 0

    def store(self, num_bytes: int) -> None:
        """So many bytes are stored; StorageError: several files of the client leave less room than they take."""
        before, self.num_bytes = self.num_bytes, num_bytes
        if len(self.of_client) == 1 or num_bytes // _LOOK_BYTES == before // _LOOK_BYTES:
            return
        if sum(each.num_bytes for each in self.of_client) > shutil.disk_usage(tempfile.gettempdir()).free:
            raise StorageError.of(OSError(errno.EDQUOT, "the client has its share"))


class FileQueue:
    """Recognises files of any length in the order of arrival; clients that have several take turns with others.

    Attributes:
        admission: slots in the queue, each from the first byte of an upload to the last byte of the response.
        decoder: decodes them, one at a time.
        is_cut: whether nobody may wait any more.
        running: work on files that has not ended.
    """

    def __init__(self, metrics: Metrics, incidents: Incidents, options: ServerOptions) -> None:
        self.admission = Admission(options.max_files, metrics, incidents, "files")
        self.metrics = metrics
        self.max_duration_s = options.limits.duration_s
        self.decoder = FileDecoder()
        self.pool = ThreadPoolExecutor(1, "u2moe-files", initializer=_be_nice)
        self.is_cut = threading.Event()
        self.running: set[Future[None]] = set()
        self._incidents = incidents
        self._places: defaultdict[str, list[FilePlace]] = defaultdict(list)
        self._tasks: list[FileTask] = []  # that wait
        self._served = ""
        self._waiting: set[asyncio.Task[Any]] = set()

    @contextlib.contextmanager
    def place(self, client: str) -> Iterator[FilePlace]:
        """A place for a file of a client, which may have as many as it leaves to others; "": one that is not known.

        Raises:
            UnavailableError: none is free, or the client has its share.
            StoppingError: the server is about to stop.
        """
        with self.admission.slot():
            places = self._places[client] if client else []
            if places and len(places) >= self.admission.num_slots - self.admission.num_taken:
                self._incidents.refuse("full")
                raise UnavailableError(f"you have {len(places)} files here, and others need places", code="rate_limit")
            places.append(place := FilePlace(places))
            self.pool.submit(self.decoder.start)  # while the file comes
            try:
                yield place
            finally:
                places.remove(place)
                if not places:
                    self._places.pop(client, None)

    def add(self, task: FileTask) -> None:
        """Give a task its turn when it comes."""
        self._tasks.append(task)
        future = self.pool.submit(self._take_turn)
        self.running.add(future)
        future.add_done_callback(self.running.discard)

    def _take_turn(self) -> None:
        tasks = list(self._tasks)
        task = next((each for each in tasks if each.client != self._served), tasks[0])
        self._tasks.remove(task)
        self._served = task.client
        task.work()

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """While the current task receives a file or awaits results: it is cut off if the server cannot wait for it.

        Raises:
            StoppingError: it was.
        """
        task = asyncio.current_task()
        if self.is_cut.is_set() or task is None:
            raise StoppingError
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.is_cut.is_set():
                raise
            task.uncancel()
            raise StoppingError from None
        finally:
            self._waiting.discard(task)

    def cut(self) -> None:
        """End all uploads and files with an error."""
        self.is_cut.set()
        for task in self._waiting:
            task.cancel()

    def stop(self) -> None:
        """Start no more files; running ones end as soon as they notice that nobody waits for them."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.cut()
        self.decoder.stop()
        for task in self._tasks:
            task.close()

    def join(self, seconds: float) -> bool:
        """Wait for running files; whether all have ended in time."""
        return not wait(list(self.running), seconds).not_done


class FileTask:
    """A file that is recognised when its turn comes, and closed. Its owner calls `leave` at the end.

    Args:
        queue: the files that are to be recognised.
        client: who has sent it.
        file: the open file.
        recognize: decodes it and returns its segments, given the option `on_progress`.

    Attributes:
        client: as above.
        duration: seconds recognised so far; in the end, of the whole file.
        whole_s: its seconds, by its header; 0: not known, or not yet.
    """

    def __init__(
        self, queue: FileQueue, client: str, file: IO[bytes], recognize: Callable[..., Iterator[Result]]
    ) -> None:
        self.client = client
        self.duration = self.whole_s = 0.0
        self._arrival = time.perf_counter()
        self._queue = queue
        self._recognize = recognize
        self._results: asyncio.Queue[Result | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._is_abandoned = threading.Event()
        self.close = file.close
        queue.add(self)

    async def segments(self, first_s: float, later_s: float) -> AsyncIterator[Result | None]:
        """Its segments as they are found, and None whenever there was none for `first_s`, later for `later_s` seconds.

        Raises:
            AudioError: the file cannot be read as audio.
            TooLargeError: it is too long.
            StoppingError: the server cannot wait for it.
        """
        seconds = first_s
        while True:
            try:
                with self._queue.wait():
                    async with asyncio.timeout(seconds):
                        item = await self._results.get()
            except TimeoutError:
                item = None
            if isinstance(item, StopAsyncIteration):
                return
            if isinstance(item, Exception):
                raise item
            yield item
            seconds = later_s

    def leave(self) -> None:
        """Abandon it, unless it is done."""
        self._is_abandoned.set()

    # The rest runs in a thread.

    def work(self) -> None:
        """Recognise it, and close it."""
        begin, queue = time.perf_counter(), self._queue
        queue.metrics.observe("file_wait_seconds", begin - self._arrival)
        try:
            self._check(0.0)
            for segment in self._recognize(on_progress=self._check):
                self._tell(segment)
                queue.metrics.count("results", "final")
            self._tell(StopAsyncIteration())
        except Exception as error:  # noqa: BLE001 - raised again where the file is awaited
            self._tell(error)
        self.close()
        queue.metrics.count("audio_seconds", "file", self.duration)
        queue.metrics.count("compute_seconds", "file", time.perf_counter() - begin)

    def _check(self, seconds: float) -> None:
        self.duration, self.whole_s = seconds, self._queue.decoder.stated_s if seconds else 0.0
        if self._is_abandoned.is_set() or self._queue.is_cut.is_set():
            raise _AbandonedError
        if max(self.duration, self.whole_s) > self._queue.max_duration_s:
            raise TooLargeError(f"the audio of a file may last {self._queue.max_duration_s:g} seconds", "file")

    def _tell(self, item: Result | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting
            self._loop.call_soon_threadsafe(self._results.put_nowait, item)


def _be_nice() -> None:
    """Lower the priority of this thread, if the system supports that."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
