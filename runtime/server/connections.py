"""How many connections are open, in all and from one address, and how many the system allows."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections import Counter
from collections.abc import Callable

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
        has_no_share: whether an address may have all of them, as a proxy may.
    """

    def __init__(self, limit: int, has_no_share: Callable[[str], bool] = lambda _: False) -> None:
        self.limit = limit
        self._share = max(int(limit * _SHARE), 1)
        self._has_no_share = has_no_share
        self._num_by_address: Counter[str] = Counter()
        self._num_open = 0

    def enter(self, connection: socket.socket) -> Callable[[], None] | None:
        """Count a connection; returns what to call when it is closed, or None if there are too many."""
        address = _address_of(connection)
        is_over = self._num_by_address[address] >= self._share and address and not self._has_no_share(address)
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


def _address_of(connection: socket.socket) -> str:
    """The client's address, of IPv6 its network; "" for a Unix socket, or a client that has gone."""
    try:
        address = ipaddress.ip_address(connection.getpeername()[0])
    except (OSError, ValueError, IndexError):
        return ""
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((address, _IPV6_SITE), strict=False).network_address)
