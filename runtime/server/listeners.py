"""Listening sockets and their protocols."""

from __future__ import annotations

import contextlib
import socket
import sys
from dataclasses import dataclass
from typing import Any

from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.server.protocols.table import PROTOCOLS

HTTP = "http"
"""The main port: HTTP, and all protocols over WebSocket."""
_BACKLOG = 512

_SYSTEM_BUFFER = 128 << 10
"""Bytes that the system buffers for a client that sends faster than real time, or reads too slowly. The limit makes
sure that its pings are read soon, so that it does not take the server for dead."""
_FOR_ALL = 0o666
"""Mode of a Unix socket: its folder says who may use it."""


@dataclass(frozen=True)
class Listener:
    """A listening socket and its protocol: `HTTP`, or a name in the table of protocols."""

    socket: socket.socket
    speaks: str

    @property
    def port(self) -> int:
        """The port it listens on; 0 for a Unix socket."""
        name: tuple[str, int] | str = self.socket.getsockname()
        return 0 if isinstance(name, str) else name[1]


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
            listeners.append(Listener(opened.enter_context(_listen(options, port)), speaks))
        opened.pop_all()
        return listeners


def _check(name: str, options: ServerOptions) -> None:
    known = [protocol.name for protocol in PROTOCOLS.values() if protocol.may_have_port]
    if name not in known:
        raise ValueError(f"a protocol with a port of its own must be one of {', '.join(known)}, got {name!r}")
    if PROTOCOLS[name].run_tcp is not None and options.has_keys and not options.is_local:
        raise ValueError(f"{name} knows no API key: with one, its port may only be opened on the loopback address")


def _listen(options: ServerOptions, port: int) -> socket.socket:
    file, host = options.socket_file, options.host
    address: Any = (host, port) if file is None else str(file)
    try:
        family = socket.AF_UNIX if file else socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with contextlib.ExitStack() as opened:
            listening = opened.enter_context(socket.socket(family, socket.SOCK_STREAM))
            if sys.platform != "win32":
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for direction in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                listening.setsockopt(socket.SOL_SOCKET, direction, _SYSTEM_BUFFER)
            if file is not None and file.is_socket() and not _is_listening(address):
                file.unlink()  # of a server that was killed
            listening.bind(address)
            if file is not None:
                file.chmod(_FOR_ALL)
            listening.listen(_BACKLOG)
            listening.setblocking(False)  # noqa: FBT003
            opened.pop_all()
            return listening
    except OSError as error:
        where = f"{host} port {port}" if file is None else f"{file}"
        raise OSError(error.errno, f"cannot listen at {where}: {error.strerror}") from error


def _is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        return client.connect_ex(path) == 0
