"""The server of one process: uvicorn on our sockets, also for protocols over TCP, and a shutdown that drains."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn

from u2moe.runtime.server.access import SPEAKS
from u2moe.runtime.server.app import make_app
from u2moe.runtime.server.connections import Connections, TrackedConnection, allowed_connections
from u2moe.runtime.server.handlers import HttpHandler, WebSocketHandler
from u2moe.runtime.server.log import LOGGER
from u2moe.runtime.server.metrics import Metrics
from u2moe.runtime.server.options import check_tls
from u2moe.runtime.server.protocols.table import PROTOCOLS
from u2moe.runtime.server.service import Service

_PING_S = 20.0
_HANDSHAKE_S = 20.0
_GRACE_S = 5
"""Seconds for connections to close at the end."""
_ACCEPTED_AT_ONCE = 16
_NO_DESCRIPTORS_S = 0.5
_LEFT_TO_OTHERS_S = 0.005
"""Seconds for which connections are left to workers with more room."""
_DOUBT_S = 2.0
"""Seconds without a turn of its event loop after which no connections are left to a worker."""


class Server(uvicorn.Server):
    """The server of one process, with its own sockets or beside other workers with the same."""

    def __init__(self, service: Service, ready: Callable[[], object], number: int = 0) -> None:
        """Create a server without starting it; it starts and stops `service`, and says when it is `ready`.

        `number` is that of the worker.
        """
        options = service.options
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=HttpHandler,
                ws=WebSocketHandler,
                ws_max_size=options.limits.message_bytes,
                ws_ping_interval=_PING_S,
                # None: a client whose audio is held back because it is too fast gets its pongs held back too. Those
                # that have gone are found because nothing comes from them.
                ws_ping_timeout=None,
                ws_per_message_deflate=False,
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",  # below it says what clients do wrong, once for each
                access_log=False,
                server_header=False,
                proxy_headers=options.is_behind_proxy,
                forwarded_allow_ips=["*"] if options.socket_file else list(options.forwarded_allow_ips),
                timeout_graceful_shutdown=_GRACE_S,
                ssl_certfile=options.tls_certificate,
                ssl_keyfile=options.tls_key,
            )
        )
        self._service = service
        self._ready = ready
        self._number = number
        self._look_time = 0.0
        self._sockets: Mapping[str, socket.socket] = {}
        self._tasks: set[asyncio.Task[Any]] = set()  # one for each connection that begins or is no HTTP
        newcomers = functools.partial(service.metrics.set, "newcomers")
        self._connections = Connections(allowed_connections(), options.is_proxy, newcomers)

    async def run_on(self, sockets: Mapping[str, socket.socket]) -> None:
        """Serve until told to stop, then finish running streams.

        `sockets` are those that listen, by what is spoken there.
        """
        self._sockets = sockets
        await self._service.start()
        try:
            await self.serve([])
        finally:
            self._service.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._log_error)
        self._listen(is_wanted=True)
        if (parent := multiprocessing.parent_process()) is not None:
            loop.add_reader(parent.sentinel, self._stop_without_parent, parent.sentinel)
        self._ready()

    def _log_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what asyncio could tell nobody else."""
        error = context.get("exception")
        self._service.incidents.bug("a task", error if isinstance(error, Exception) else RuntimeError())

    def _accept(self, speaks: str, listening: socket.socket) -> None:
        """Accept connections, a few in each turn of the loop."""
        for _ in range(_ACCEPTED_AT_ONCE):
            if have_others_room(self._service.metrics, self._number):
                self._pause(_LEFT_TO_OTHERS_S)
                return
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError:  # no file descriptors are left for now
                self._service.incidents.refuse("connections")
                self._pause(_NO_DESCRIPTORS_S)
                return
            connection.setblocking(False)  # noqa: FBT003
            self._take(speaks, connection)

    def _pause(self, seconds: float) -> None:
        """Accept nothing for some time."""
        self._listen(is_wanted=False)
        asyncio.get_running_loop().call_later(seconds, functools.partial(self._listen, is_wanted=True))

    def _listen(self, *, is_wanted: bool) -> None:
        """Accept connections from now on, or for now none."""
        loop = asyncio.get_running_loop()
        for speaks, listening in self._sockets.items():
            if is_wanted:
                loop.add_reader(listening, self._accept, speaks, listening)
            else:
                loop.remove_reader(listening)

    def close_sockets(self) -> None:
        """Accept no more connections."""
        self._listen(is_wanted=False)
        for listening in self._sockets.values():
            listening.close()
        self._sockets = {}

    def _take(self, speaks: str, connection: socket.socket) -> None:
        """Serve a connection, if there are not too many; later, if its address has cost too much lately."""
        visit = self._connections.enter(connection)
        if visit is None:
            self._service.incidents.refuse("connections")
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._begin(visit, speaks, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin(self, visit: TrackedConnection, speaks: str, connection: socket.socket) -> None:
        """Give a connection to its protocol; what is no HTTP is served to the end."""
        loop, protocol = asyncio.get_running_loop(), PROTOCOLS.get(speaks)
        run_tcp = None if protocol is None else protocol.run_tcp
        try:
            if visit.wait_s:
                await asyncio.sleep(visit.wait_s)
            if run_tcp is not None:
                reader, writer = await asyncio.open_connection(sock=connection)
            else:
                shared, state, tls = (self._service.incidents, visit), {SPEAKS: speaks}, self.config.ssl
                make = functools.partial(HttpHandler, *shared, self.config, self.server_state, state)
                patience = {} if tls is None else {"ssl_handshake_timeout": _HANDSHAKE_S}
                await loop.connect_accepted_socket(make, connection, ssl=tls, **patience)
        except (OSError, asyncio.CancelledError):  # a failed handshake concerns only the client
            visit.leave()
            connection.close()
            return
        if run_tcp is not None:
            visit.settle()  # it becomes a stream much later
            try:
                await run_tcp(self._service, reader, writer)
            finally:
                writer.close()
                visit.leave()

    def _stop_without_parent(self, sentinel: int) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        self.should_exit = True

    def _look_after(self) -> None:
        """Show that the event loop turns, and end connections whose clients are too slow."""
        now = asyncio.get_running_loop().time()
        self._service.metrics.set("heartbeats", time.monotonic())
        if now - self._look_time > 1:
            self._look_time = now
            for connection in self.server_state.connections:
                connection.check(now)  # type: ignore[union-attr]

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        self._look_after()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let those that are served finish, tell others that the server stops, and close the rest."""
        drain = asyncio.create_task(self._service.drain())
        while not drain.done() and not self.force_exit:
            await asyncio.wait({drain}, timeout=0.1)
            self._look_after()
        drain.cancel()
        self.close_sockets()
        for task in self._tasks:
            task.cancel()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle none: `launch` does."""
        yield

    def stop(self) -> None:
        """Stop when everything has been finished."""
        LOGGER.info("stopping: running utterances and files are finished first")
        self.should_exit = True

    def reload(self) -> None:
        """Read keys and certificate anew, for new connections; what cannot be read stays as it was."""
        options = self._service.options
        try:
            self._service.keys.reload()
            if options.tls_certificate is not None and self.config.ssl is not None:
                check_tls(options)
                self.config.ssl.load_cert_chain(options.tls_certificate, options.tls_key)
        except (OSError, ValueError) as error:
            LOGGER.error("keys and certificate stay as they were: %s", error)
        else:
            LOGGER.info("keys and certificate were read anew")


def have_others_room(metrics: Metrics, number: int) -> bool:
    """Whether another worker than that of a number has clearly more room for streams, and answers."""
    columns = ("ready", "heartbeats", "capacity", "streams", "newcomers")
    now, workers = time.monotonic(), zip(*map(metrics.each, columns), strict=True)
    rooms = [
        capacity - streams - newcomers if is_ready and now - beat < _DOUBT_S else -math.inf
        for is_ready, beat, capacity, streams, newcomers in workers
    ]
    own, most = rooms[number], max(rooms)
    return most > own + max(own, 0) / 4
