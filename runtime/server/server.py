"""The server of one process: uvicorn on our sockets, also for protocols over TCP, and a shutdown that drains."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn

from u2moe.runtime.server.app import make_app
from u2moe.runtime.server.handlers import HttpHandler, WebSocketHandler
from u2moe.runtime.server.listeners import BACKLOG, HTTP, Listener, receive_connection
from u2moe.runtime.server.log import LOGGER
from u2moe.runtime.server.protocols.table import PROTOCOLS

if TYPE_CHECKING:
    from u2moe.runtime.server.protocol import Protocol
    from u2moe.runtime.server.service import Service

SAME_SIGNAL_S = 0.5
"""Seconds in which repeated signals count as one: timeout(1), for example, signals both the process and its group."""
_PING_S = 20.0


class Server(uvicorn.Server):
    """The server of one process: run it with its own sockets, or behind a channel that delivers connections."""

    def __init__(self, service: Service, ports: Mapping[int, str], ready: Callable[[], object] | None = None) -> None:
        """Create a server without starting it.

        Args:
            service: shared by all protocols; started and stopped here.
            ports: the protocol of each port.
            ready: called when connections are accepted.
        """
        options = service.options
        super().__init__(
            uvicorn.Config(
                make_app(service, ports),
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
        self._tcp_tasks: set[asyncio.Task[None]] = set()
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
            make, tls = self._handler(listener.speaks)
            self.servers.append(await loop.create_server(make, sock=listener.socket, ssl=tls, backlog=BACKLOG))
        if self._channel is not None:
            loop.add_reader(self._channel, self._take_over, self._channel)
        if self._ready is not None:
            self._ready()

    def _handler(self, speaks: str) -> tuple[Callable[[], asyncio.BaseProtocol], ssl.SSLContext | None]:
        """What handles a connection, and its TLS."""
        protocol = None if speaks == HTTP else PROTOCOLS[speaks]
        if protocol is not None and protocol.run_tcp is not None:
            self._service.metrics.know_connection()  # it becomes a stream much later
            return functools.partial(self._tcp_handler, protocol), None
        metrics, state = self._service.metrics, self.lifespan.state
        return functools.partial(HttpHandler, metrics, self.config, self.server_state, state), self.config.ssl

    def _tcp_handler(self, protocol: Protocol) -> asyncio.BaseProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), functools.partial(self._serve_tcp, protocol))

    async def _serve_tcp(self, protocol: Protocol, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None and protocol.run_tcp is not None:
            self._tcp_tasks.add(task)
            task.add_done_callback(self._tcp_tasks.discard)
            await protocol.run_tcp(self._service, reader, writer)

    def _take_over(self, channel: socket.socket) -> None:
        """Receive a connection from the channel; stop at its end, when the other process has ended."""
        speaks, connection = receive_connection(channel)
        loop = asyncio.get_running_loop()
        if connection is None:
            loop.remove_reader(channel)
            self.should_exit = True
            return
        make, tls = self._handler(speaks)
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
        for task in list(self._tcp_tasks):
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
        elif now - self._stop_time > SAME_SIGNAL_S:
            LOGGER.warning("stopped at once")
            os._exit(128 + sig)
