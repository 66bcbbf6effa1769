"""Starts a server, in one process or as a team of workers that share sockets, and handles signals."""

import asyncio
import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextvars import copy_context
from functools import partial
from importlib.metadata import version
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from u2moe.runtime.corpus.recognition import ModelChoice
from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.access import Keys
from u2moe.runtime.server.accounts import allowed_connections
from u2moe.runtime.server.log import LOGGER, Metrics, log_to_stderr, notify, shared_rows
from u2moe.runtime.server.options import ServerOptions, check_tls
from u2moe.runtime.server.protocols import PROTOCOLS
from u2moe.runtime.server.server import Server
from u2moe.runtime.server.service import Service
from u2moe.runtime.validation import checked_choice

HTTP = "http"  # name of the main port, which serves HTTP and all WebSocket protocols
_BACKLOG = 512
_SYSTEM_BUFFER = 128 << 10  # bytes in each direction; few, so that a ping behind audio is answered soon
_FEW_CONNECTIONS = 1024
_FOR_ALL = 0o666  # file mode of a Unix socket; the permissions of its folder decide who may use it
_AFTER_STOP_S = 2.0  # maximum seconds to wait for running files when the server stops
_SAME_S = 0.5  # repeated signals within so many seconds count as one: timeout(1) signals the process and its group
_HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
_early: list[bool] = []  # one item for each SIGHUP received before `handle_signals` was called
_POLL_S = 0.1
_RESTART_S = 1.0  # minimum time from the start of a worker to its successor's; doubles until a successor is ready
_LONGEST_RESTART_S = 60.0  # largest value of this minimum
_SWITCH_S = 0.0005  # interval after which Python's threads take turns; with the usual 5 ms, decoding waits for clients
SILENT_S = 20.0  # seconds for which a worker's event loop can be blocked before the worker is replaced


def launch(options: ServerOptions, models: Mapping[str, ModelChoice]) -> int:
    """Serve until a signal stops the server; return the exit code.

    Each worker loads the models, whose keys are the names that clients use. The first is the default. Raises OSError if
    a port cannot be opened, and BundleError if a bundle is missing or damaged.
    """
    check_tls(options)
    Keys(options)  # raises errors before a model is loaded
    with ended_by_sigterm(), contextlib.ExitStack() as opened:
        sockets = open_sockets(options, opened)
        if options.socket_file is not None:
            opened.callback(_remove, options.socket_file, options.socket_file.lstat())
        _log_addresses(options, sockets)
        serve = partial(_serve, options, models, sockets)
        code = 0
        if options.workers > 1:
            code = Team(options.workers, partial(_work, serve, options.log_format == "json")).run()
        else:
            run_in_loop(serve(0, None))
    LOGGER.info("stopped")
    return code


def open_sockets(options: ServerOptions, opened: contextlib.ExitStack) -> dict[str, socket.socket]:
    """Open listening sockets for all ports, which `opened` closes. The keys are `HTTP` and the names of protocols.

    Raises OSError for a port that is in use or may not be opened, and ValueError for a protocol that cannot have a
    port, or does not support API keys although keys are set and other machines can reach the server.
    """
    for name in options.protocol_ports:
        checked_choice("a protocol with its own port", name, [one for one in PROTOCOLS if PROTOCOLS[one].may_have_port])
        if PROTOCOLS[name].run_tcp is not None and options.has_keys and not options.is_local:
            raise ValueError(f"{name} does not support API keys: if keys are set, --host must be a loopback address")
    ports = {HTTP: options.port, **options.protocol_ports}
    return {speaks: _listen(options, port, opened) for speaks, port in ports.items()}


def _listen(options: ServerOptions, port: int, opened: contextlib.ExitStack) -> socket.socket:
    file, host = options.socket_file, options.host
    address: Any = (host, port) if file is None else str(file)
    try:
        family = socket.AF_UNIX if file else socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sets TCP_NODELAY only on sockets made with IPPROTO_TCP
        listening = opened.enter_context(socket.socket(family, socket.SOCK_STREAM, 0 if file else socket.IPPROTO_TCP))
        if sys.platform != "win32":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for direction in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            listening.setsockopt(socket.SOL_SOCKET, direction, _SYSTEM_BUFFER)
        if file is not None and file.is_socket():
            with socket.socket(family, socket.SOCK_STREAM) as client:
                if client.connect_ex(address):
                    file.unlink()  # left by a server that was killed
        listening.bind(address)
        if file is not None:
            file.chmod(_FOR_ALL)
        listening.listen(_BACKLOG)
        listening.setblocking(False)  # noqa: FBT003
    except OSError as error:
        where = f"{host} port {port}" if file is None else f"{file}"
        raise OSError(f"cannot listen on {where}: {error.strerror or error}") from error
    return listening


def _remove(file: Path, mine: os.stat_result) -> None:
    """Remove a Unix socket, unless another server has replaced it."""
    with contextlib.suppress(OSError):
        if os.path.samestat(file.lstat(), mine):
            file.unlink()


async def _serve(
    options: ServerOptions, models: Mapping[str, ModelChoice], sockets: dict[str, socket.socket], number: int, rows: Any
) -> None:
    """Serve in this process. `rows` are the metrics shared with other workers. None: this is the only process."""
    recognizers = {}
    for name, model in models.items():
        recognizer = recognizers[name] = await asyncio.to_thread(model.load)
        path, kernels = recognizer.bundle.path, recognizer.model.kernels
        LOGGER.info("u2moe %s: loaded %s from %s, kernels: %s", version("u2moe"), name, path, kernels)
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()  # Python collects fully when new objects exceed a quarter of the old ones, not counting frozen ones
    service = Service(recognizers, options, Metrics(tuple(PROTOCOLS), rows, number))
    loop = asyncio.get_running_loop()

    def ready() -> None:
        later = partial(loop.call_soon_threadsafe, context=copy_context())  # a signal may interrupt a request's task
        handle_signals(partial(later, server.stop), partial(later, server.reload))
        if rows is None:
            LOGGER.info("ready: %d live streams at a time", service.admission.num_slots)
            notify("READY=1")

    server = Server(service, ready, number)
    await server.run_on(sockets)
    if not service.files.join(_AFTER_STOP_S):  # a normal exit would wait for threads that still recognise files
        LOGGER.info("stopped")
        sys.stderr.flush()
        os._exit(0)


def run_in_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in an event loop that supports `add_reader` for sockets, also on Windows."""
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(main)


def _work(serve: Callable[[int, Any], Coroutine[Any, Any, None]], logs_json: bool, number: int, rows: Any) -> None:
    """Serve as one of several worker processes."""
    log_to_stderr(number, is_json=logs_json)
    try:
        with ended_by_sigterm():
            run_in_loop(serve(number, rows))
    except (U2moeError, ValueError, OSError) as error:
        sys.exit(f"u2moe: error: {error}")


def _log_addresses(options: ServerOptions, sockets: Mapping[str, socket.socket]) -> None:
    """Log the addresses. Warn if few connections are possible, or if anyone on the network may use the server."""
    host, tls = f"[{options.host}]" if ":" in options.host else options.host, "s" if options.tls_certificate else ""
    for name, listening in sockets.items():
        if options.socket_file is not None:
            LOGGER.info("listening at %s", options.host)
            continue
        kind = f"http{tls}" if name == HTTP else f"ws{tls}" if PROTOCOLS[name].run_tcp is None else "tcp"
        place = f"{kind}://{host}:{listening.getsockname()[1]}/"
        LOGGER.info("listening at %s%s", place, "" if name == HTTP else f" ({name})")
    if (number := allowed_connections()) < _FEW_CONNECTIONS:
        LOGGER.warning("only %d connections at a time: the limit on open files is low (ulimit -Hn)", number)
    if not options.is_local and not options.has_keys:
        LOGGER.warning("anyone who can reach %s may use this server: it has no API key", options.host)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Until `handle_signals` is called, exit with code 0 on SIGTERM, and defer SIGHUP. At the end, restore handlers.

    By default, SIGTERM gives another exit code, PID 1 of a container ignores it, and SIGHUP ends the process.
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
