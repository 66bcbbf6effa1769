"""The server of one process: uvicorn on our sockets, also for protocols over TCP, and a shutdown that drains."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn

from u2moe.runtime.server.access import SPEAKS
from u2moe.runtime.server.app import make_app
from u2moe.runtime.server.connections import Connections, Visit, allowed_connections
from u2moe.runtime.server.handlers import HttpHandler, WebSocketHandler
from u2moe.runtime.server.listeners import Listener, receive_connection
from u2moe.runtime.server.log import LOGGER, notify
from u2moe.runtime.server.options import check_tls
from u2moe.runtime.server.protocol import RunTcp
from u2moe.runtime.server.protocols.table import PROTOCOLS
from u2moe.runtime.server.service import Service

SAME_SIGNAL_S = 0.5
"""Seconds in which repeated signals count as one: timeout(1), for example, signals both the process and its group."""
_PING_S = 20.0
_HANDSHAKE_S = 20.0
_GRACE_S = 5
"""Seconds for connections to close at the end."""
_ACCEPTED_AT_ONCE = 16
_NO_DESCRIPTORS_S = 0.5


class Server(uvicorn.Server):
    """The server of one process: run it with its own sockets, or behind a channel that delivers connections."""

    def __init__(self, service: Service, ready: Callable[[], object] | None = None) -> None:
        """Create a server without starting it; it starts and stops `service`, and says when it is `ready`."""
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
        self._listeners: Sequence[Listener] = ()
        self._channel: socket.socket | None = None
        self._stop_time: float | None = None
        self._tcp_tasks: set[asyncio.Task[Any] | None] = set()
        self._handovers: set[asyncio.Task[Any]] = set()
        self._connections = Connections(allowed_connections(), options.is_proxy)

    async def run_on(self, listeners: Sequence[Listener], channel: socket.socket | None = None) -> None:
        """Serve until told to stop, then finish running streams.

        Args:
            listeners: sockets whose connections are accepted here.
            channel: by which another process hands over connections that it accepts.
        """
        self._listeners, self._channel = listeners, channel
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
        if self._channel is not None:
            loop.add_reader(self._channel, self._take_over, self._channel)
        if self._ready is not None:
            self._ready()

    def _log_error(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what asyncio could tell nobody else."""
        error = context.get("exception")
        self._service.incidents.bug("a task", error if isinstance(error, Exception) else RuntimeError())

    def _accept(self, listener: Listener) -> None:
        """Accept connections, a few in each turn of the loop."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = listener.socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionError):
                return
            except OSError:  # no file descriptors are left for now
                self._service.incidents.refuse("connections")
                self._listen(is_wanted=False)
                again = functools.partial(self._listen, is_wanted=True)
                asyncio.get_running_loop().call_later(_NO_DESCRIPTORS_S, again)
                return
            connection.setblocking(False)  # noqa: FBT003
            self._take(listener.speaks, connection)

    def _listen(self, *, is_wanted: bool) -> None:
        """Accept connections from now on, or for now none."""
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            if is_wanted:
                loop.add_reader(listener.socket, self._accept, listener)
            else:
                loop.remove_reader(listener.socket)

    def close_listeners(self) -> None:
        """Accept no more connections."""
        self._listen(is_wanted=False)
        for listener in self._listeners:
            listener.socket.close()
        self._listeners = ()

    def _take(self, speaks: str, connection: socket.socket) -> None:
        """Serve a connection, if there are not too many; later, if its address has cost too much lately."""
        visit = self._connections.enter(connection)
        if visit is None:
            self._service.metrics.know_connection()
            self._service.incidents.refuse("connections")
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(self._hand_over(visit, speaks, connection))
        self._handovers.add(task)
        task.add_done_callback(self._handovers.discard)

    async def _hand_over(self, visit: Visit, speaks: str, connection: socket.socket) -> None:
        """Give a connection to its protocol."""
        protocol, tls, metrics = PROTOCOLS.get(speaks), self.config.ssl, self._service.metrics
        if protocol is not None and protocol.run_tcp is not None:
            metrics.know_connection()  # it becomes a stream much later
            serve, tls = functools.partial(self._serve_tcp, protocol.run_tcp, visit), None
            make: Callable[[], asyncio.BaseProtocol] = functools.partial(
                asyncio.StreamReaderProtocol, asyncio.StreamReader(), serve
            )
        else:
            shared, state = (metrics, self._service.incidents, visit), {SPEAKS: speaks}
            make = functools.partial(HttpHandler, *shared, self.config, self.server_state, state)
        patience = {} if tls is None else {"ssl_handshake_timeout": _HANDSHAKE_S}
        try:
            if visit.wait_s:
                await asyncio.sleep(visit.wait_s)
            await asyncio.get_running_loop().connect_accepted_socket(make, connection, ssl=tls, **patience)
        except (OSError, asyncio.CancelledError):  # a failed handshake concerns only the client
            visit.leave()
            connection.close()

    async def _serve_tcp(self, run: RunTcp, visit: Visit, *streams: Any) -> None:
        task = asyncio.current_task()
        self._tcp_tasks.add(task)
        try:
            await run(self._service, *streams)
        finally:
            self._tcp_tasks.discard(task)
            visit.leave()

    def _take_over(self, channel: socket.socket) -> None:
        """Receive a connection from the channel; stop at its end, when the other process has ended."""
        speaks, connection = receive_connection(channel)
        if connection is None:
            asyncio.get_running_loop().remove_reader(channel)
            self.should_exit = True
            return
        self._take(speaks, connection)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        self._service.metrics.beat()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let those that are served finish, tell others that the server stops, and close the rest."""
        drain = asyncio.create_task(self._service.drain())
        while not drain.done() and not self.force_exit:
            await asyncio.wait({drain}, timeout=0.1)
            self._service.metrics.beat()
        drain.cancel()
        self.close_listeners()
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel)
        for task in filter(None, list(self._tcp_tasks)):
            task.cancel()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal stops the server, the second ends the process; uvicorn would end it in either case."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows, or not in the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, functools.partial(self.handle_exit, number, None))
            loop.add_signal_handler(signal.SIGHUP, self.reload)
        yield

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

    def handle_exit(self, sig: int, frame: Any) -> None:  # noqa: ARG002 - uvicorn's signature
        """Handle a signal."""
        now = time.monotonic()
        if self._stop_time is None:
            LOGGER.info("stopping: running utterances and files are finished first")
            notify("STOPPING=1")
            self._stop_time = now
            self.should_exit = True
        elif now - self._stop_time > SAME_SIGNAL_S:
            LOGGER.warning("stopped at once")
            os._exit(128 + sig)
