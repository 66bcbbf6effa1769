"""Several server processes: one accepts connections and hands each to the worker with the most free capacity."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from typing import Any

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.listeners import Listener, hand_over
from u2moe.runtime.server.log import LOGGER, notify
from u2moe.runtime.server.metrics import Metrics, shared_rows
from u2moe.runtime.server.protocols.table import PROTOCOLS
from u2moe.runtime.server.server import SAME_SIGNAL_S

_POLL_S = 0.1
_RESTART_S = 1.0
SILENT_S = 20.0
"""Seconds without a turn of its event loop after which a worker is replaced."""
_DOUBT_S = 2.0
"""Seconds without one after which it gets no connections."""


@dataclass(frozen=True, kw_only=True)
class WorkerPlace:
    """The arguments of a worker process."""

    number: int  # from 0
    channel: socket.socket  # delivers its connections
    rows: Any  # shared memory for the metrics of all workers


def run_workers(count: int, work: Callable[[WorkerPlace], None], listeners: Sequence[Listener]) -> int:
    """Start workers and hand connections to them until told to stop; returns the exit code.

    A worker that ends unexpectedly is restarted. The first stop signal is passed on to the workers, which finish
    running streams; the second ends them.
    `work` must be importable in them.

    Raises:
        U2moeError: a worker ended before it was ready.
    """
    return _Team(count, work, listeners).run()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, number: int, work: Callable[[WorkerPlace], None], rows: Any) -> None:
        self.number = number
        self.start_time = time.monotonic()
        self.channel, other_end = socket.socketpair()
        self.channel.setblocking(False)  # noqa: FBT003
        place = WorkerPlace(number=number, channel=other_end, rows=rows)
        name = f"u2moe-worker-{number}"
        self.process: SpawnProcess = multiprocessing.get_context("spawn").Process(target=work, args=(place,), name=name)
        self.process.start()
        other_end.close()
        self.num_taken = 0
        self.num_beats = 0.0
        self.silent_s = 0.0

    def listen(self, num_beats: float, seconds: float) -> None:
        """Note how often its event loop has turned, some seconds after the last time."""
        self.silent_s = self.silent_s + seconds if num_beats == self.num_beats > 0 else 0.0
        self.num_beats = num_beats

    def take(self, speaks: str, connection: socket.socket) -> None:
        hand_over(self.channel, speaks, connection)
        self.num_taken += 1


class _Team:
    def __init__(self, count: int, work: Callable[[WorkerPlace], None], listeners: Sequence[Listener]) -> None:
        self._work = work
        self._listeners = listeners
        self._rows = shared_rows(count)
        self._metrics = Metrics(tuple(PROTOCOLS), self._rows)
        self._stop_time: float | None = None
        self._was_ready = False
        self._count = count
        self._workers: list[_Worker] = []
        self._look_time = time.monotonic()

    def run(self) -> int:
        with self._signals(), selectors.DefaultSelector() as selector:
            self._workers = [self._start(number) for number in range(self._count)]
            for listener in self._listeners:
                selector.register(listener.socket, selectors.EVENT_READ, listener)
            while self._stop_time is None:
                self._kill_silent_ones()
                self._look_after()
                # Before a worker is ready connections wait in the backlog.
                if not self._was_ready:
                    time.sleep(_POLL_S)
                    continue
                for key, _ in selector.select(_POLL_S):
                    self._accept(key.data)
            LOGGER.info("stopping %d workers", len(self._workers))
            for worker in self._workers:
                worker.process.terminate()
            while any(worker.process.is_alive() for worker in self._workers):
                self._kill_silent_ones()
                for key, _ in selector.select(_POLL_S):  # to be told that the server stops
                    self._accept(key.data)
        for listener in self._listeners:
            listener.socket.close()
        well = (0,) if self._was_ready else (0, -signal.SIGTERM)  # one that has hardly started handles no signal yet
        return 0 if all(worker.process.exitcode in well for worker in self._workers) else 1

    def _start(self, number: int) -> _Worker:
        return _Worker(number, self._work, self._rows)

    def _kill_silent_ones(self) -> None:
        """End workers whose event loop stands still; a time in which this process stood still itself does not count."""
        now = time.monotonic()
        seconds, self._look_time = min(now - self._look_time, 2 * _POLL_S), now
        beats = self._metrics.each("heartbeats")
        for worker in self._workers:
            worker.listen(beats[worker.number], seconds)
            if worker.silent_s > SILENT_S and worker.process.is_alive():
                LOGGER.error("worker %d does not answer: it is ended", worker.number)
                worker.process.kill()
                worker.process.join()

    def _look_after(self) -> None:
        for index, worker in enumerate(self._workers):
            if worker.process.exitcode is None:
                continue
            if not self._was_ready:
                self._kill()
                raise U2moeError(f"worker {index} ended with code {worker.process.exitcode} before it was ready")
            self._metrics.forget(index)
            if time.monotonic() - worker.start_time > _RESTART_S:
                LOGGER.warning("worker %d ended with code %d: another is started", index, worker.process.exitcode)
                worker.channel.close()
                self._workers[index] = self._start(index)
        if not self._was_ready and self._metrics.total("ready") == len(self._workers):
            self._was_ready = True
            places = int(self._metrics.total("capacity"))
            LOGGER.info("ready: %d workers, %d live streams at a time", len(self._workers), places)
            notify("READY=1")

    def _accept(self, listener: Listener) -> None:
        try:
            connection, _ = listener.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):  # it has gone again
            return
        except OSError:  # no file descriptors are left for now
            time.sleep(_POLL_S)
            return
        for worker in self._by_room():
            try:
                worker.take(listener.speaks, connection)
            except OSError:  # it does not take any for now, or has ended
                continue
            return
        connection.close()

    def _by_room(self) -> list[_Worker]:
        """Workers that take connections, the one with the most free places first; those that stop refuse them."""
        names = ("ready", "capacity", "streams", "known_connections")
        ready, capacity, streams, known = (self._metrics.each(name) for name in names)

        def room(worker: _Worker) -> float:
            number = worker.number
            num_new = worker.num_taken - known[number]  # each of which may become a stream
            return capacity[number] - streams[number] - num_new

        is_running = self._stop_time is None
        able = (each for each in self._workers if (ready[each.number] or not is_running) and each.silent_s < _DOUBT_S)
        return sorted(able, key=room, reverse=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._take_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._reload)
        try:
            yield
        finally:
            if self._stop_time is None:  # else a second one must still end it
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _take_signal(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self._stop_time is None:
            self._stop_time = now
            notify("STOPPING=1")
        elif now - self._stop_time > SAME_SIGNAL_S:
            LOGGER.warning("stopped at once")
            self._kill()
            os._exit(128 + number)

    def _reload(self, number: int, _frame: Any) -> None:
        if self._was_ready:
            for worker in self._workers:
                if worker.process.pid is not None and worker.process.is_alive():
                    os.kill(worker.process.pid, number)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
