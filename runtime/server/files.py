"""Queue of uploaded files. A few at a time take turns at recognition. Clients share slots, turns and disk space."""

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
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import IO, Any

from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.audio.decoder import FileDecoder
from u2moe.runtime.result import Result
from u2moe.runtime.server.accounts import CLIENT, Admission
from u2moe.runtime.server.errors import StoppingError, StorageError, TooLargeError, UnavailableError
from u2moe.runtime.server.log import Metrics
from u2moe.runtime.server.options import ServerOptions

_AT_ONCE = 4  # maximum number of files that take turns; each file has a decoder process of about 50 MB
_NICENESS = 5  # niceness of the threads that recognise files, since live streams have priority
_LOOK_BYTES = 1 << 20  # bytes of an upload between checks of the free disk space


class _Turns:
    """Lock that threads acquire in the order of their requests."""

    def __init__(self) -> None:
        self._order: deque[int] = deque()  # ids of threads; the first thread has its turn
        self._changed = threading.Condition()

    def begin(self) -> float:
        """Wait for a turn; return the seconds waited."""
        begin, thread = time.perf_counter(), threading.get_ident()
        with self._changed:
            self._order.append(thread)
            self._changed.wait_for(lambda: self._order[0] == thread)
        return time.perf_counter() - begin

    def end(self) -> None:
        """Pass the turn to the next thread."""
        with self._changed:
            self._order.popleft()
            self._changed.notify_all()


class FileQueue:
    """Queue of files of any length. A few at a time are recognised, in turns of ten seconds, so short ones end soon.

    The next file to start belongs to the client with the fewest running files. If several clients have the
    fewest, the client whose file started most recently comes last. The files of one client start in order of
    arrival. A client with running files may start another only if it has fewer running files than
    there are free threads. A file holds its slot from the first byte of the upload to the last byte of the response.
    """

    def __init__(self, metrics: Metrics, options: ServerOptions) -> None:
        self.admission = Admission(options.max_files, metrics, "files")
        self.metrics, self.limits = metrics, options.limits
        self.turns = _Turns()
        self.is_cut = False  # whether the server stops, and all uploads and files end with an error
        self._pool = ThreadPoolExecutor(_AT_ONCE, "u2moe-files", _be_nice)
        self._decoders = [FileDecoder()]  # idle decoders; at most one is kept
        self._placed: list[FileTask] = []  # tasks with a slot
        self._tasks: list[FileTask] = []  # waiting tasks
        self._running: dict[FileTask, Future[None]] = {}
        self._served = ""  # client whose file started last

    def tasks_of(self, client: str) -> list[FileTask]:
        """Return the tasks of a client that have a slot. An empty `client` means an unknown client, which has none."""
        return [task for task in self._placed if client and task.client == client]

    @contextlib.contextmanager
    def place(self, client: str) -> Iterator[FileTask]:
        """Reserve a slot for a file. A client with slots gets no more than remain free. Raises UnavailableError."""
        with self.admission.slot():
            num_own = len(self.tasks_of(client))
            if num_own and num_own >= self.admission.num_slots - self.admission.num_taken:
                self.metrics.refuse("full")
                raise UnavailableError(f"you have {num_own} files queued, and others need slots", code="rate_limit")
            self._placed.append(task := FileTask(self, client))
            if self._decoders:
                self._pool.submit(self._decoders[0].start)  # while the file is uploaded
            try:
                with CLIENT.get().place():  # no callback: the request itself notices that the client disconnected
                    yield task
            finally:
                task.is_abandoned = True
                self._placed.remove(task)
                if task in self._tasks:
                    self._tasks.remove(task)
                    task.close()

    def add(self, task: FileTask) -> None:
        """Queue a task, and start it as soon as its turn comes."""
        self._tasks.append(task)
        self._begin()

    def _begin(self) -> None:
        running = Counter(task.client for task in self._running)
        self._tasks.sort(key=lambda task: (running[task.client], task.client == self._served, task.arrival))
        for task in [] if self.is_cut else list(self._tasks):
            own, num_free = running[task.client], _AT_ONCE - running.total()
            if num_free and (own < num_free or not (own and task.client)):
                self._tasks.remove(task)
                self._served = task.client
                running[task.client] += 1
                task.decoder = self._decoders.pop() if self._decoders else FileDecoder()
                self._running[task] = self._pool.submit(task.work)

    def end(self, task: FileTask) -> None:
        """Record that a task is done, and start tasks that are waiting."""
        del self._running[task]
        self._begin()

    def give_back(self, decoder: FileDecoder) -> None:
        """Keep an idle decoder, or stop it if another is kept or `is_cut` is set. Called in a thread of the pool."""
        if self._decoders or self.is_cut:
            decoder.stop()
        else:
            self._decoders.append(decoder)

    def cut(self) -> None:
        """Abort all uploads and files, which then fail with StoppingError."""
        self.is_cut = True
        for task in self._placed:
            task.results.put_nowait(StoppingError())

    def stop(self) -> None:
        """Start no more files. Running files end at their next check."""
        self.cut()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for decoder in (*self._decoders, *(task.decoder for task in self._running)):
            decoder.stop()
        for task in self._tasks:
            task.close()

    def join(self, seconds: float) -> bool:
        """Wait up to `seconds` for running files to end; return whether all of them ended."""
        return not wait(list(self._running.values()), seconds).not_done


class FileTask:
    """A file that has a slot. Its recognition takes turns with that of other files."""

    arrival: float  # time at which the upload was complete
    decoder: FileDecoder  # set when recognition starts

    def __init__(self, queue: FileQueue, client: str) -> None:
        self._queue, self.client, self.num_bytes = queue, client, 0
        self.duration = 0.0  # seconds recognised so far; in the end, the duration of the whole file
        self.whole_s = 0.0  # duration according to the file's header; 0: unknown
        self._waited_s = 0.0
        self.results: asyncio.Queue[Result | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.is_abandoned = False  # whether nobody waits for more results

    def check_size(self, num_bytes: int) -> None:
        """Raise TooLargeError if an upload may not have so many bytes."""
        if num_bytes > (most := self._queue.limits.upload_bytes):
            raise TooLargeError(f"an upload may have at most {most} bytes", "file")

    def store(self, num_bytes: int) -> None:
        """Record that more bytes are stored. Raises StorageError if several files of a client exceed the free space."""
        before, self.num_bytes = self.num_bytes, self.num_bytes + num_bytes
        self.check_size(self.num_bytes)
        own = self._queue.tasks_of(self.client)
        if len(own) < 2 or self.num_bytes // _LOOK_BYTES == before // _LOOK_BYTES:
            return
        if sum(each.num_bytes for each in own) > shutil.disk_usage(tempfile.gettempdir()).free:
            raise StorageError(errno.EDQUOT)  # the client has used its share of the disk space

    def recognize(
        self, file: IO[bytes], name: str, sample_rate: int, segments: Callable[..., Iterator[Result]]
    ) -> None:
        """Add an open file to the queue, and close it in the end. `name` is its name in messages.

        `segments` takes buffers of samples at `sample_rate` (Hz) and the keyword `on_progress`, and yields segments.
        """
        self.arrival = time.perf_counter()
        self.close = file.close
        self._source, self._recognize = (file, name, sample_rate), segments
        self._queue.add(self)

    async def segments(self, first_s: float | None, later_s: float | None) -> AsyncIterator[Result | None]:
        """Yield each segment when it is found. Yield None after each period without a segment.

        The first period lasts `first_s` seconds, and later periods last `later_s` seconds. Raises AudioError if the
        file cannot be read, TooLargeError if it is too long, and StoppingError if the server stops before its end.
        """
        seconds = first_s
        while True:
            try:
                async with asyncio.timeout(seconds):
                    item = await self.results.get()
            except TimeoutError:
                item = None
            if isinstance(item, StopAsyncIteration):
                return
            if isinstance(item, Exception):
                raise item
            yield item
            seconds = later_s

    # The methods below run in a thread of the pool.

    def work(self) -> None:
        """Recognise and close the file."""
        begin, queue = time.perf_counter(), self._queue
        queue.metrics.observe("file_wait_seconds", begin - self.arrival)
        self._waited_s = queue.turns.begin()
        try:
            self._check(0.0)
            for segment in self._recognize(self._buffers(), on_progress=self._check):
                self._post(self.results.put_nowait, segment)
                queue.metrics.count("results", "final")
            self._post(self.results.put_nowait, StopAsyncIteration())
        except Exception as error:  # noqa: BLE001 - raised again where the file is awaited
            self._post(self.results.put_nowait, StorageError(error.errno) if isinstance(error, OSError) else error)
        queue.turns.end()
        self.close()
        queue.give_back(self.decoder)
        queue.metrics.count("audio_seconds", "file", self.duration)
        queue.metrics.count("compute_seconds", "file", time.perf_counter() - begin - self._waited_s)
        self._post(queue.end, self)

    def _buffers(self) -> Iterator[Samples]:
        """Yield buffers of samples. Other files take their turns while the decoder process reads a buffer."""
        buffers = self.decoder.read(*self._source)
        while True:
            self._queue.turns.end()
            try:
                buffer = next(buffers, None)
            finally:
                self._waited_s += self._queue.turns.begin()
            if buffer is None:
                return
            yield buffer

    def _check(self, seconds: float) -> None:
        self.duration, self.whole_s = seconds, self.decoder.stated_s if seconds else 0.0
        if self.is_abandoned or self._queue.is_cut:
            raise StoppingError  # a client that has left does not get it
        if max(self.duration, self.whole_s) > (most_s := self._queue.limits.duration_s):
            raise TooLargeError(f"a file may have at most {most_s:g} seconds of audio", "file")

    def _post(self, call: Callable[..., object], *given: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no client waits
            self._loop.call_soon_threadsafe(call, *given)


def _be_nice() -> None:
    """Lower the priority of this thread, if the system supports that."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
