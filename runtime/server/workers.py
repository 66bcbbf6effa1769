"""Processes of a server: signal handling, and a team of workers that share sockets."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from typing import Any

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.log import LOGGER, notify
from u2moe.runtime.server.metrics import Metrics, shared_rows
from u2moe.runtime.server.protocols.table import PROTOCOLS

_SAME_S = 0.5
"""Seconds in which repeated signals count as one: timeout(1), for example, signals the process and its group."""
_HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
_early: list[bool] = []  # one item for each SIGHUP received before `handle_signals` was called
_POLL_S = 0.1
_RESTART_S, _LONGEST_RESTART_S = 1.0, 60.0
"""Initial and largest value of the minimum time, in seconds, from the start of a worker to the start of its successor.
This minimum doubles with each successor until one becomes ready."""
SILENT_S = 20.0  # seconds for which a worker's event loop can be blocked before the worker is replaced


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Until `handle_signals` is called, exit with code 0 on SIGTERM. Leaving the context restores the old handlers.

    By default, SIGTERM would cause another exit code, and PID 1 of a container would ignore it. SIGHUP is deferred
    until `handle_signals` is called; by default, it would end the process.
    """
    before = {number: signal.getsignal(number) for number in _HANDLED}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: _early.append(True))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def handle_signals(
    stop: Callable[[], object], reload: Callable[[], object], kill: Callable[[], object] = lambda: None
) -> None:
    """Call `stop` at the first SIGTERM or SIGINT, `kill` before a second one ends the process, `reload` at SIGHUP."""
    stop_time: float | None = None

    def end(number: int, _frame: Any) -> None:
        nonlocal stop_time
        now = time.monotonic()
        if stop_time is None:
            stop_time = now
            notify("STOPPING=1")
            stop()
        elif now - stop_time > _SAME_S:
            LOGGER.warning("stopped at once")
            kill()
            os._exit(128 + number)

    for number in _HANDLED:
        signal.signal(number, end if number in (signal.SIGTERM, signal.SIGINT) else lambda *_: reload())
    if _early:
        _early.clear()
        reload()


class Team:
    """Worker processes. A worker that exits unexpectedly is restarted.

    After the first stop signal, the workers finish the streams in progress. A second signal kills the workers. Each
    of `count` processes calls `work`, an importable function, with its index and the shared memory for metrics.
    """

    def __init__(self, count: int, work: Callable[[int, Any], None]) -> None:
        self._work = work
        self._rows = shared_rows(count)
        self._metrics = Metrics(tuple(PROTOCOLS), self._rows)
        self._is_stopping = self._was_ready = False
        self._processes: list[SpawnProcess] = []
        self._start_times, self._restarts_s = [0.0] * count, [_RESTART_S] * count
        self._reloading: set[int] = set()  # workers that must still be signalled to reload
        self._look_time = self._awake_time = time.monotonic()

    def run(self) -> int:
        """Run the workers until a signal stops them; return the exit code. Raises U2moeError if the start fails."""
        handle_signals(self._stop, lambda: self._reloading.update(range(len(self._processes))), self._kill)
        self._processes += [self._start(number) for number in range(len(self._start_times))]
        while not self._is_stopping:
            self._kill_silent_ones()
            self._look_after()
            time.sleep(_POLL_S)
        were_ready = self._metrics.each("ready")
        LOGGER.info("stopping %d workers", len(self._processes))
        for process in self._processes:
            process.terminate()
        while any(process.is_alive() for process in self._processes):
            self._kill_silent_ones()
            time.sleep(_POLL_S)
        # a worker that has just started does not handle signals yet, so SIGTERM ends it with an error code
        codes = zip([process.exitcode for process in self._processes], were_ready, strict=True)
        return 0 if all(code == 0 or (code == -signal.SIGTERM and not was_ready) for code, was_ready in codes) else 1

    def _start(self, number: int) -> SpawnProcess:
        self._start_times[number] = time.monotonic()
        name, spawning = f"u2moe-worker-{number}", multiprocessing.get_context("spawn")
        process = spawning.Process(target=self._work, args=(number, self._rows), name=name)
        process.start()
        return process

    def _kill_silent_ones(self) -> None:
        """Kill workers whose event loop is blocked. Time in which this process was suspended does not count."""
        now = time.monotonic()
        if now - self._look_time > SILENT_S / 2:
            self._awake_time = now
        self._look_time = now
        for number, beat in enumerate(self._metrics.each("heartbeats")):
            process = self._processes[number]
            if beat and now - max(beat, self._awake_time) > SILENT_S and process.is_alive():
                LOGGER.error("worker %d does not respond: killing it", number)
                process.kill()
                process.join()

    def _look_after(self) -> None:
        for number, (process, is_ready) in enumerate(zip(self._processes, self._metrics.each("ready"), strict=True)):
            if process.exitcode is None:
                if is_ready:
                    self._restarts_s[number] = _RESTART_S
                    if number in self._reloading and process.pid is not None:
                        self._reloading.discard(number)
                        os.kill(process.pid, signal.SIGHUP)
                continue
            if not self._was_ready:
                self._kill()
                raise U2moeError(f"worker {number} exited with code {process.exitcode} before it was ready")
            self._metrics.forget(number)
            if time.monotonic() - self._start_times[number] > self._restarts_s[number]:
                self._restarts_s[number] = min(2 * self._restarts_s[number], _LONGEST_RESTART_S)
                LOGGER.warning("worker %d exited with code %d: restarting it", number, process.exitcode)
                self._processes[number] = self._start(number)
        if not self._was_ready and self._metrics.total("ready") == len(self._processes):
            self._was_ready = True
            places = int(self._metrics.total("capacity"))
            LOGGER.info("ready: %d workers, %d live streams at a time", len(self._processes), places)
            notify("READY=1")

    def _stop(self) -> None:
        self._is_stopping = True

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
