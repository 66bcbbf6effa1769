"""How many connections are open, in all and from one address, and how many the system allows."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections import Counter
from collections.abc import Callable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_RESERVED = 128
"""File descriptors for the model, files of uploads and whatever libraries open."""
_MOST = 16_384
_SHARE = 0.5
"""Share of the connections that one address may have."""
_IPV6_SITE = 64
"""Bits of an IPv6 address that a client cannot choose."""


def raise_descriptor_limit() -> None:
    """Raise the soft limit on file descriptors to the hard one: a connection takes one."""
    if sys.platform != "win32":
        import resource  # noqa: PLC0415 - there is none on Windows

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def allowed_connections() -> int:
    """How many connections the limit on file descriptors leaves room for."""
    if sys.platform == "win32":
        return _MOST
    import resource  # noqa: PLC0415 - there is none on Windows

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MOST if soft == resource.RLIM_INFINITY else max(min(soft - _RESERVED, _MOST), 1)


class Connections:
    """Counts open connections.

    Args:
        limit: most connections at once; one address may have half of them.
        is_proxy: whether an address is that of a proxy, which may have all of them.
    """

    def __init__(self, limit: int, is_proxy: Callable[[Address], bool] = lambda _: False) -> None:
        self.limit = limit
        self._share = max(int(limit * _SHARE), 1)
        self._is_proxy = is_proxy
        self._num_by_address: Counter[str] = Counter()
        self._num_open = 0

    def enter(self, connection: socket.socket) -> Callable[[], None] | None:
        """Count a connection; returns what to call when it is closed, or None if there are too many."""
        peer = _peer_of(connection)
        address = _site_of(peer)
        is_over = self._num_by_address[address] >= self._share and peer is not None and not self._is_proxy(peer)
        if is_over or self._num_open >= self.limit:
            return None
        self._num_open += 1
        self._num_by_address[address] += 1
        is_open = True

        def leave() -> None:
            nonlocal is_open
            if is_open:
                is_open = False
                self._num_open -= 1
                self._num_by_address[address] -= 1
                if not self._num_by_address[address]:
                    del self._num_by_address[address]

        return leave


def _peer_of(connection: socket.socket) -> Address | None:
    """The client's address; None for a Unix socket, or a client that has gone."""
    try:
        return ipaddress.ip_address(connection.getpeername()[0])
    except (OSError, ValueError, IndexError):
        return None


def _site_of(peer: Address | None) -> str:
    """What counts as one address: of IPv6 a network."""
    if peer is None or peer.version == 4:
        return str(peer)
    return str(ipaddress.ip_network((peer, _IPV6_SITE), strict=False).network_address)
