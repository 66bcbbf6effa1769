"""Several server processes that accept connections from the same sockets; one more starts them and looks after them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from typing import Any

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.log import LOGGER, notify
from u2moe.runtime.server.metrics import Metrics, shared_rows
from u2moe.runtime.server.protocols.table import PROTOCOLS
from u2moe.runtime.server.signals import handle_signals

_POLL_S = 0.1
_RESTART_S = 1.0
SILENT_S = 20.0
"""Seconds without a turn of its event loop after which a worker is replaced."""


Work = Callable[[int, Any], None]
"""What a worker does, by its number, from 0, and the shared memory for the metrics of all."""


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, work: Work, number: int, rows: Any) -> None:
        self.number = number
        self.start_time = time.monotonic()
        name, spawning = f"u2moe-worker-{number}", multiprocessing.get_context("spawn")
        self.process: SpawnProcess = spawning.Process(target=work, args=(number, rows), name=name)
        self.process.start()
        self._beat = 0.0
        self.silent_s = 0.0

    def listen(self, beat: float, seconds: float) -> None:
        """Note when its event loop has last turned, some seconds after the last look."""
        self.silent_s = self.silent_s + seconds if beat == self._beat > 0 else 0.0
        self._beat = beat


class Team:
    """Workers, each of which is started again if it ends unexpectedly.

    The first stop signal is passed on to them, and they finish running streams; the second ends them.

    Args:
        count: how many.
        work: what each does; must be importable.
    """

    def __init__(self, count: int, work: Work) -> None:
        self._work = work
        self._rows = shared_rows(count)
        self._metrics = Metrics(tuple(PROTOCOLS), self._rows)
        self._is_stopping = self._was_ready = False
        self._count = count
        self._workers: list[_Worker] = []
        self._look_time = time.monotonic()

    def run(self) -> int:
        """Work until told to stop; returns the exit code.

        Raises:
            U2moeError: a worker ended before it was ready.
        """
        handle_signals(self._stop, self._reload, self._kill)
        self._workers = [self._start(number) for number in range(self._count)]
        while not self._is_stopping:
            self._kill_silent_ones()
            self._look_after()
            time.sleep(_POLL_S)
        LOGGER.info("stopping %d workers", len(self._workers))
        for worker in self._workers:
            worker.process.terminate()
        while any(worker.process.is_alive() for worker in self._workers):
            self._kill_silent_ones()
            time.sleep(_POLL_S)
        well = (0,) if self._was_ready else (0, -signal.SIGTERM)  # one that has hardly started handles no signal yet
        return 0 if all(worker.process.exitcode in well for worker in self._workers) else 1

    def _start(self, number: int) -> _Worker:
        return _Worker(self._work, number, self._rows)

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
                self._workers[index] = self._start(index)
        if not self._was_ready and self._metrics.total("ready") == len(self._workers):
            self._was_ready = True
            places = int(self._metrics.total("capacity"))
            LOGGER.info("ready: %d workers, %d live streams at a time", len(self._workers), places)
            notify("READY=1")

    def _stop(self) -> None:
        self._is_stopping = True

    def _reload(self) -> None:
        if self._was_ready:
            for worker in self._workers:
                if worker.process.pid is not None and worker.process.is_alive():
                    os.kill(worker.process.pid, signal.SIGHUP)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.process.kill()
