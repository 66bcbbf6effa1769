"""The sockets of one process, their protocols, and how they are closed without interrupting clients."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from u2moe.runtime.server.app import make_app
from u2moe.runtime.server.handlers import HttpHandler, WebSocketHandler
from u2moe.runtime.server.log import LOGGER
from u2moe.runtime.server.protocols.wyoming import LINE_BYTES, serve_wyoming

if TYPE_CHECKING:
    from u2moe.runtime.server.options import ServerOptions
    from u2moe.runtime.server.service import Service

WYOMING = "wyoming"
HTTP = "http"

_SYSTEM_BUFFER = 128 << 10
"""Bytes that the system buffers for a client that sends faster than real time, or reads too slowly. The limit makes
sure that its pings are read soon, so that it does not take the server for dead."""
_BACKLOG = 512
_NAME_BYTES = 16
"""Bytes of the message with which a connection is handed over."""
_PING_S = 20.0
_SAME_SIGNAL_S = 0.5
"""Seconds in which repeated signals count as one: timeout(1), for example, signals both the process and its group."""


@dataclass(frozen=True)
class Listener:
    """A listening socket and its protocol: `HTTP`, `WYOMING`, or the protocol at `/`."""

    socket: socket.socket
    speaks: str

    @property
    def port(self) -> int:
        """The port it listens on."""
        port: int = self.socket.getsockname()[1]
        return port


def open_listeners(options: ServerOptions) -> list[Listener]:
    """Sockets for all ports, that of HTTP first.

    Raises:
        OSError: a port is in use or may not be opened; names it.
    """
    wanted = [(HTTP, options.port), *options.protocol_ports.items()]
    if options.wyoming_port is not None:
        wanted.append((WYOMING, options.wyoming_port))
    listeners: list[Listener] = []
    try:
        for speaks, port in wanted:
            listeners.append(Listener(_listen(options.host, port), speaks))
    except OSError:
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


def spoken_on(listeners: Sequence[Listener]) -> dict[int, str]:
    """The protocol of each port."""
    return {listener.port: listener.speaks for listener in listeners}


def hand_over(channel: socket.socket, speaks: str, connection: socket.socket) -> None:
    """Send a connection to another process, and close it here.

    Raises:
        BlockingIOError: the other process has not received earlier connections yet.
        OSError: it has ended.
    """
    name = speaks.encode().ljust(_NAME_BYTES)
    socket.send_fds(channel, [name], [connection.fileno()])
    connection.close()


def receive_connection(channel: socket.socket) -> tuple[str, socket.socket | None]:
    """The protocol and the connection that was handed over; None at the end."""
    name, handles, _, _ = socket.recv_fds(channel, _NAME_BYTES, 1)
    if not name or not handles:
        return "", None
    connection = socket.socket(fileno=handles[0])
    connection.setblocking(False)  # noqa: FBT003
    return name.decode().strip(), connection


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            if sys.platform != "win32":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for direction in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                listening.setsockopt(socket.SOL_SOCKET, direction, _SYSTEM_BUFFER)
            listening.bind((host, port))
            listening.listen(_BACKLOG)
            listening.setblocking(False)  # noqa: FBT003
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {host} port {port}: {error.strerror}") from error
    return listening


class Server(uvicorn.Server):
    """The server of one process: run it with its own sockets, or behind a channel that delivers connections."""

    def __init__(self, service: Service, speaks: Mapping[int, str], ready: Callable[[], object] | None = None) -> None:
        """Create a server without starting it.

        Args:
            service: shared by all protocols; started and stopped here.
            speaks: the protocol of each port.
            ready: called when connections are accepted.
        """
        options = service.options
        super().__init__(
            uvicorn.Config(
                make_app(service, {port: name for port, name in speaks.items() if name not in (HTTP, WYOMING)}),
                http=H11Protocol,
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
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ssl_certfile=options.tls_certificate,
                ssl_keyfile=options.tls_key,
            )
        )
        self._service = service
        self._ready = ready
        self._listeners: Sequence[Listener] = ()
        self._channel: socket.socket | None = None
        self._stop_time: float | None = None
        self._wyoming_tasks: set[asyncio.Task[None]] = set()
        self._handovers: set[asyncio.Task[Any]] = set()

    async def run_here(self, listeners: Sequence[Listener]) -> None:
        """Serve until told to stop, then finish running streams."""
        self._listeners = listeners
        await self._service.start()
        try:
            await self.serve([])
        finally:
            self._service.stop()

    async def run_behind(self, channel: socket.socket) -> None:
        """Like `run_here`, for connections that another process accepts and hands over."""
        self._channel = channel
        await self.run_here([])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            make, tls = self._protocol(listener.speaks)
            self.servers.append(await loop.create_server(make, sock=listener.socket, ssl=tls, backlog=_BACKLOG))
        if self._channel is not None:
            loop.add_reader(self._channel, self._take_over, self._channel)
        if self._ready is not None:
            self._ready()

    def _protocol(self, speaks: str) -> tuple[Callable[[], asyncio.BaseProtocol], ssl.SSLContext | None]:
        """The protocol handler for one connection."""
        if speaks == WYOMING:  # it becomes a stream much later
            self._service.metrics.know_connection()
            return self._wyoming_protocol, None
        metrics, state = self._service.metrics, self.lifespan.state
        return functools.partial(HttpHandler, metrics, self.config, self.server_state, state), self.config.ssl

    def _wyoming_protocol(self) -> asyncio.BaseProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=LINE_BYTES), self._serve_wyoming)

    async def _serve_wyoming(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._wyoming_tasks.add(task)
            task.add_done_callback(self._wyoming_tasks.discard)
        await serve_wyoming(self._service, reader, writer)

    def _take_over(self, channel: socket.socket) -> None:
        """Receive a connection from the channel; stop at its end, when the other process has ended."""
        speaks, connection = receive_connection(channel)
        if connection is None:
            asyncio.get_running_loop().remove_reader(channel)
            self.should_exit = True
            return
        make, tls = self._protocol(speaks)
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(make, connection, ssl=tls))
        self._handovers.add(task)
        task.add_done_callback(self._end_handover)

    def _end_handover(self, task: asyncio.Task[Any]) -> None:
        self._handovers.discard(task)
        if not task.cancelled():
            task.exception()  # a failed handshake concerns only the client

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, let existing ones finish, and close the rest."""
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel)
        for server in self.servers:
            server.close()
        drain = asyncio.create_task(self._service.drain())
        while not drain.done() and not self.force_exit:
            await asyncio.wait({drain}, timeout=0.1)
        drain.cancel()
        for task in list(self._wyoming_tasks):
            task.cancel()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal stops the server, the second ends the process; uvicorn would end it in either case."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        try:
            for number in signals:
                loop.add_signal_handler(number, functools.partial(self.handle_exit, number, None))
        except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not in the main thread
            yield
            return
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def handle_exit(self, sig: int, frame: Any) -> None:  # noqa: ARG002 - uvicorn's signature
        """Handle a signal."""
        now = time.monotonic()
        if self._stop_time is None:
            LOGGER.info("stopping: running utterances and files are finished first")
            self._stop_time = now
            self.should_exit = True
        elif now - self._stop_time > _SAME_SIGNAL_S:
            LOGGER.warning("stopped at once")
            os._exit(128 + sig)
