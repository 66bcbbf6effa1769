"""Listening sockets and their protocols; hands connections to another process."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from u2moe.runtime.server.protocols.table import PROTOCOLS

if TYPE_CHECKING:
    from u2moe.runtime.server.options import ServerOptions

HTTP = "http"
"""The main port: HTTP, and all protocols over WebSocket."""
_BACKLOG = 512

_SYSTEM_BUFFER = 128 << 10
"""Bytes that the system buffers for a client that sends faster than real time, or reads too slowly. The limit makes
sure that its pings are read soon, so that it does not take the server for dead."""
_NAME_BYTES = 16
"""Bytes of the message with which a connection is handed over."""


@dataclass(frozen=True)
class Listener:
    """A listening socket and its protocol: `HTTP`, or a name in the table of protocols."""

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
        ValueError: a protocol cannot have a port, or not this one.
    """
    for name in options.protocol_ports:
        _check(name, options)
    with contextlib.ExitStack() as opened:
        listeners = []
        for speaks, port in ((HTTP, options.port), *options.protocol_ports.items()):
            listeners.append(Listener(opened.enter_context(_listen(options.host, port)), speaks))
        opened.pop_all()
        return listeners


def _check(name: str, options: ServerOptions) -> None:
    known = [protocol.name for protocol in PROTOCOLS.values() if protocol.may_have_port]
    if name not in known:
        raise ValueError(f"a protocol with a port of its own must be one of {', '.join(known)}, got {name!r}")
    if PROTOCOLS[name].run_tcp is not None and options.has_keys and not options.is_local:
        raise ValueError(f"{name} knows no API key: with one, its port may only be opened on the loopback address")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with contextlib.ExitStack() as opened:
            listening = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            if sys.platform != "win32":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for direction in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                listening.setsockopt(socket.SOL_SOCKET, direction, _SYSTEM_BUFFER)
            listening.bind((host, port))
            listening.listen(_BACKLOG)
            listening.setblocking(False)  # noqa: FBT003
            opened.pop_all()
            return listening
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {host} port {port}: {error.strerror}") from error


def spoken_on(listeners: Sequence[Listener]) -> dict[int, str]:
    """The protocol of each port."""
    return {listener.port: listener.speaks for listener in listeners}


def hand_over(channel: socket.socket, speaks: str, connection: socket.socket) -> None:
    """Hand a connection to the process at the other end of a channel.

    Raises:
        OSError: it does not take any for now, or has ended.
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
