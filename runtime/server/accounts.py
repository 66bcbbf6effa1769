"""Processor time that clients may take, and how many connections there may be, in all and from one address."""

from __future__ import annotations

import gc
import ipaddress
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_RESERVED = 128
"""File descriptors for the model, files of uploads and whatever libraries open."""
_MOST = 16_384
_PART = 0.5
"""Part of the connections that one address may have."""
_CONNECTION_S = 0.002
"""Seconds of processor time that a connection takes, besides what is done for it."""
_OWN, _OWN_WITH_PLACE = (0.02, 0.02), (0.001, 0.1)
_TOGETHER = (0.05, 0.02)
_ADDRESS, _HERE = (0.05, 0.5), (0.25, 1.0)
"""Share of one processor, and seconds in advance: of a connection, of one whose client has a place, of all together
that take more than their own, of an address, and of this machine."""
_EARNED, _MOST_AT_ONCE_S = 0.02, 1.0
"""Seconds of processor time that a client with a place earns by each second of audio, several times what a plain stream
takes; and most seconds of audio that count at once, as it earns no more than audio in real time would."""
_THIS_MACHINE = ("127.0.0.1", "::/64")
"""Also a proxy that nobody has named; "::/64" is the network of ::1."""
_LONGEST_WAIT_S = 10.0
"""Seconds that a new connection may wait; it is closed if it would be more."""
_LONG_S = 0.001
"""Seconds of work after which it is looked how much of them others had the processor, or Python's lock. To look each
time would take longer than most of the work."""
_MOST_LOST = 16 << 20
"""Bytes of incomplete messages after which garbage is collected: parsers refer to themselves."""
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


class Served(Protocol):
    """A connection, as it is looked after."""

    def check(self, now: float) -> None:
        """End it if its client does too little."""

    def abort(self) -> None:
        """End it at once."""


class Account:
    """Processor time: a share of one processor, some seconds of which may be taken in advance.

    Attributes:
        advance_s: these seconds.
    """

    def __init__(self, share: float, advance_s: float) -> None:
        self._share = share
        self.advance_s = advance_s
        self._paid_time = 0.0  # when all that was taken will be paid

    def change(self, share: float, advance_s: float, now: float) -> None:
        """Have another share from now on; the debt stays."""
        self._paid_time = now + self.debt_s(now) / share
        self._share, self.advance_s = share, advance_s

    def take(self, seconds: float, now: float) -> None:
        """Take some, or give some back."""
        self._paid_time = max(self._paid_time, now) + seconds / self._share

    def debt_s(self, now: float) -> float:
        """Seconds that were taken and not paid yet."""
        return max(self._paid_time - now, 0.0) * self._share

    def wait_s(self, now: float) -> float:
        """Seconds until more may be taken."""
        return max(self._paid_time - now - self.advance_s / self._share, 0.0)


class Connections:
    """Counts connections, and keeps an account for each address from which they came lately.

    Args:
        limit: most connections at once; one address may have half of them.
        is_proxy: whether an address is that of a proxy, which limits its clients itself, as those of Unix sockets do.
        tell_new: is told the number of those of which it is not known yet whether they become streams.

    Attributes:
        together: the account of all connections that take more than their own share.
        served: those that have begun.
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
        self.together = Account(*_TOGETHER)
        self._most_of_one = max(int(limit * _PART), 1)
        self._is_proxy = is_proxy
        self._tell_new = tell_new
        self.served: dict[Visit, Served] = {}
        self._accounts: dict[str, Account] = {}
        self._num_lost = 0
        self._looked_s = 0.0  # processor time of the event loop when it was last looked at

    def since(self, begin: float) -> float:
        """Seconds of processor time that the event loop has taken since a moment of `time.monotonic`, at most."""
        took_s = time.monotonic() - begin
        if took_s > _LONG_S:
            before, self._looked_s = self._looked_s, time.thread_time()
            took_s = min(took_s, self._looked_s - before)
        return took_s

    def enter(self, connection: socket.socket) -> Visit | None:
        """Count a connection; None if there are too many, or its address owes too much."""
        peer = _peer_of(connection)
        address, now = site_of(peer), time.monotonic()
        is_free = peer is None or self._is_proxy(peer)
        if self.num_open >= self.limit or (self.num_by_address[address] >= self._most_of_one and not is_free):
            return None
        account = None if is_free else self._account(address, now)
        if account is not None:
            account.take(_CONNECTION_S, now)
            if account.wait_s(now) > _LONGEST_WAIT_S and address not in _THIS_MACHINE:
                account.take(-_CONNECTION_S, now)
                return None
        self.num_open += 1
        self.num_by_address[address] += 1
        self.count_new(1)
        return Visit(self, address, account)

    def count_new(self, number: int) -> None:
        """Count connections that have come, or are no longer new."""
        self._num_new += number
        self._tell_new(self._num_new)

    def forget(self, address: str, visit: Visit, num_lost: int) -> None:
        """Count a connection that has gone, and the bytes of its last message, which was incomplete."""
        self.served.pop(visit, None)
        self.num_open -= 1
        self.num_by_address[address] -= 1
        if not self.num_by_address[address]:
            del self.num_by_address[address]
        self._num_lost += num_lost
        if self._num_lost > _MOST_LOST:
            self._num_lost = 0
            gc.collect()

    def check(self) -> None:
        """Look after all connections; to be called once a second."""
        now, self._looked_s = time.monotonic(), time.thread_time()
        for served in list(self.served.values()):
            served.check(now)

    def _account(self, address: str, now: float) -> Account:
        if len(self._accounts) > self.limit:
            self._accounts = {key: each for key, each in self._accounts.items() if each.debt_s(now)}
        terms = _HERE if address in _THIS_MACHINE else _ADDRESS
        return self._accounts.setdefault(address, Account(*terms))


class Visit:
    """A connection that is counted until it leaves, and what is done for it.

    Each connection may take a small share of the processor; one with a place hardly any but what it earns by audio, so
    that many with a place cannot take much together by messages without any. What connections take beyond their own,
    all that do share another share for. Those without a place also pay from the account of their address; those with
    one, when they leave it.
    """

    def __init__(self, connections: Connections, address: str, account: Account | None) -> None:
        self._account = account
        self._own = Account(*_OWN)
        self._has_place = False
        self.since = connections.since
        self._connections = connections
        self._address = address
        self._is_new = self._is_here = True
        self._earned_time = 0.0  # up to which it has earned

    def take_place(self, is_taken: bool) -> None:
        """Its client has a place for a stream or file from now on, or leaves it, and what it owes to its address."""
        self._has_place, now = is_taken, time.monotonic()
        self._own.change(*(_OWN_WITH_PLACE if is_taken else _OWN), now)
        if not is_taken and self._account is not None:
            self._account.take(self._own.debt_s(now), now)

    def earn(self, audio_s: float) -> None:
        """Its client has sent audio, or of a file what counts as much."""
        now = time.monotonic()
        since = max(self._earned_time, now - _MOST_AT_ONCE_S)
        self._earned_time = min(since + audio_s, now)
        self._own.take(-_EARNED * min(self._earned_time - since, self._own.debt_s(now) / _EARNED), now)

    def charge(self, seconds: float, now: float) -> None:
        """Account for processor time that was taken for it."""
        (self._connections.together if self._own.wait_s(now) else self._own).take(seconds, now)
        if self._account is not None and not self._has_place:
            self._account.take(seconds, now)

    def wait_s(self, now: float) -> float:
        """Seconds until more may be done for it."""
        own_s = self._own.wait_s(now)
        wait_s = self._connections.together.wait_s(now) if own_s else 0.0
        if self._has_place:  # who speaks does not wait for what others owe
            return min(wait_s, own_s)
        return wait_s if self._account is None else max(wait_s, self._account.wait_s(now))

    def settle(self) -> None:
        """It counts as a stream from now on, or is known not to become one. Idempotent."""
        if self._is_new:
            self._is_new = False
            self._connections.count_new(-1)

    def leave(self, num_lost: int = 0) -> None:
        """It is closed, with an incomplete message of so many bytes. Idempotent."""
        self.settle()
        if not self._is_here:
            return
        self._is_here, begin = False, time.monotonic()
        self._connections.forget(self._address, self, num_lost)
        if self._account is not None:  # garbage may have been collected
            self._account.take(time.monotonic() - begin, begin)

    def begin(self, served: Served) -> None:
        """Look after something until it leaves."""
        self._connections.served[self] = served


def address_of(host: str) -> Address | None:
    """The address of a client; None: it has none, or has gone."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _peer_of(connection: socket.socket) -> Address | None:
    try:
        return address_of(connection.getpeername()[0])
    except (OSError, IndexError):  # it has gone, or is a Unix socket
        return None


def site_of(peer: Address | None) -> str:
    """The client's address for limits: of IPv6 the network."""
    if peer is None or peer.version == 4:
        return str(peer)
    return str(ipaddress.ip_network((peer, _IPV6_SITE), strict=False))
