"""How many connections are open, in all and from one address, what they cost, and how many the system allows."""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_RESERVED = 128
"""File descriptors for the model, files of uploads and whatever libraries open."""
_MOST = 16_384
_SHARE = 0.5
"""Share of the connections that one address may have."""
_CONNECTION_S = 0.002
"""Seconds of processor time that a connection takes, besides what it sends."""
_PAID = 0.05
"""Share of one processor by which the debt of an address is paid."""
_BURST_S = 0.5
"""Seconds of debt for which nobody waits: 250 who connect at once."""
_OWN = ("127.0.0.1", "::")
"""This machine, and its network in IPv6: a proxy that nobody has named, or whoever runs the server. It owes nothing."""
_LONGEST_WAIT_S = 10.0
"""Seconds that a new connection may wait; it is closed if it would be more."""
_IPV6_SITE = 64
"""Bits of an IPv6 address that a client cannot choose."""


def allowed_connections() -> int:
    """How many there may be: each takes a file descriptor, of which the soft limit is raised to the hard one."""
    if sys.platform == "win32":
        return _MOST
    import resource  # noqa: PLC0415 - there is none on Windows

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _MOST if hard == resource.RLIM_INFINITY else max(min(hard - _RESERVED, _MOST), 1)


class TrackedConnection:
    """A connection that is counted until it leaves.

    Attributes:
        wait_s: seconds until it should be served.
    """

    def __init__(self, connections: Connections, address: str, wait_s: float) -> None:
        self.wait_s = wait_s
        self._connections: Connections | None = connections
        self._address = address
        self._is_new = True

    def settle(self) -> None:
        """It counts as a stream from now on, or is known not to become one. Idempotent."""
        if self._connections is not None and self._is_new:
            self._connections.count_new(-1)
        self._is_new = False

    def leave(self, debt_s: float = 0.0) -> None:
        """It is closed, and has taken so many seconds of the processor more than its share. Idempotent."""
        self.settle()
        connections, self._connections = self._connections, None
        if connections is not None:
            connections.num_open -= 1
            connections.num_by_address[self._address] -= 1
            connections.owe(self._address, debt_s)
            if not connections.num_by_address[self._address]:
                del connections.num_by_address[self._address]


class Connections:
    """Counts open connections, and what those that were closed have cost.

    A client that reconnects again and again would start each time without debt. So the cost of a connection, and what
    it has taken beyond its share when it ends, are charged to its address, whose new connections wait until it is paid.

    Args:
        limit: most connections at once; one address may have half of them.
        is_proxy: whether an address is that of a proxy, which may have all of them and owes nothing.
        tell_new: is told the number of those of which it is not known yet whether they become streams.
    """

    def __init__(
        self,
        limit: int,
        is_proxy: Callable[[Address], bool] = lambda _: False,
        tell_new: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.limit = limit
        self.num_open = self._num_new = 0
        self.num_by_address: Counter[str] = Counter()
        self._share = max(int(limit * _SHARE), 1)
        self._is_proxy = is_proxy
        self._tell_new = tell_new
        self._paid_times: dict[str, float] = {}  # when an address will have no debt

    def enter(self, connection: socket.socket) -> TrackedConnection | None:
        """Count a connection; None if there are too many."""
        peer = _peer_of(connection)
        address = _site_of(peer)
        is_free = peer is None or self._is_proxy(peer)
        if self.num_open >= self.limit or (self.num_by_address[address] >= self._share and not is_free):
            return None
        owes = not is_free and address not in _OWN
        wait_s = self.owe(address, _CONNECTION_S) - _BURST_S / _PAID if owes else 0.0
        if wait_s > _LONGEST_WAIT_S:
            return None
        self.num_open += 1
        self.num_by_address[address] += 1
        self.count_new(1)
        return TrackedConnection(self, address, max(wait_s, 0.0))

    def count_new(self, number: int) -> None:
        """Count connections that have come, or are no longer new."""
        self._num_new += number
        self._tell_new(self._num_new)

    def owe(self, address: str, debt_s: float) -> float:
        """Add to the debt of an address; returns the seconds until all of it is paid."""
        now = time.monotonic()
        if len(self._paid_times) > self.limit:
            self._paid_times = {each: then for each, then in self._paid_times.items() if then > now}
        paid_time = max(self._paid_times.get(address, now), now) + debt_s / _PAID
        self._paid_times[address] = min(paid_time, now + _BURST_S / _PAID + _LONGEST_WAIT_S + 1)
        return paid_time - now


def _peer_of(connection: socket.socket) -> Address | None:
    """The client's address; None for a Unix socket, or a client that has gone."""
    try:
        return ipaddress.ip_address(connection.getpeername()[0])
    except (OSError, ValueError, IndexError):
        return None


def _site_of(peer: Address | None) -> str:
    """The client's address for limits: of IPv6 the network."""
    if peer is None or peer.version == 4:
        return str(peer)
    return str(ipaddress.ip_network((peer, _IPV6_SITE), strict=False).network_address)
