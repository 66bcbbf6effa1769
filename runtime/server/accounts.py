"""Limits on clients: slots for streams and files, connections and their processor time, in total and per address."""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import math
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from u2moe.runtime.server.errors import StoppingError, UnavailableError
from u2moe.runtime.server.log import Metrics

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_RESERVED = 128  # file descriptors reserved for the model, uploaded files and libraries
_MOST = 16_384
_PART = 0.5  # share of the maximum number of connections that one address may have
_CONNECTION_S = 0.002  # seconds of processor time charged for a new connection
_OWN, _OWN_WITH_PLACE = (0.02, 0.02), (0.001, 0.1)  # arguments of `Account` for a connection without or with a slot
_TOGETHER = (0.05, 0.02)  # for `Connections.together`
_ADDRESS, _HERE = (0.05, 0.5), (0.25, 1.0)  # for an address, and for this machine
_EARNED = 0.02  # processor time that a client with a slot earns per second of audio: several times a stream's cost
_MOST_AT_ONCE_S = 1.0  # maximum seconds of audio credited at once: sending faster than real time earns nothing extra
_THIS_MACHINE = ("127.0.0.1", "::/64")  # local clients, and proxies that no option names; "::/64": network of ::1
_LONGEST_WAIT_S = 10.0  # new connections that would wait longer are closed, unless they come from this machine
_LONG_S = 0.001  # elapsed seconds above which processor time is measured too; for less, that costs more than the work
_MOST_LOST = 16 << 20  # bytes that closed connections may leave in parsers' reference cycles until garbage is collected
_IPV6_SITE = 64  # number of leading bits of an IPv6 address that the client cannot choose
_TOO_LATE_S, _IN_TIME_S = 0.6, 0.3  # no clients are admitted above the first, and again below the second (seconds)
_AVERAGED_S = 1.0  # time constant; the average is over time, because rounds become longer when results are late
_FORGOTTEN_S = 2.0  # seconds without live audio after which lateness counts as 0


def allowed_connections() -> int:
    """Return the maximum number of connections, after raising the soft limit on file descriptors to the hard one."""
    if sys.platform == "win32":
        return _MOST
    import resource  # noqa: PLC0415 - not available on Windows

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _MOST if hard == resource.RLIM_INFINITY else max(min(hard - _RESERVED, _MOST), 1)


class Account:
    """Account of processor time. Its debt falls by `share` of a core. While it is at most `advance_s`, nobody waits."""

    def __init__(self, share: float, advance_s: float) -> None:
        self._share, self._advance_s = share, advance_s
        self._paid_time = 0.0  # when the debt reaches 0

    def change(self, share: float, advance_s: float, now: float) -> None:
        """Change the share and the advance, but not the debt."""
        self._paid_time = now + self.debt_s(now) / share
        self._share, self._advance_s = share, advance_s

    def take(self, seconds: float, now: float) -> None:
        """Add seconds to the debt; a negative number reduces it."""
        self._paid_time = max(self._paid_time, now) + seconds / self._share

    def debt_s(self, now: float) -> float:
        """Return the debt in seconds of processor time."""
        return max(self._paid_time - now, 0.0) * self._share

    def wait_s(self, now: float) -> float:
        """Return the seconds until the debt is at most the advance."""
        return max(self._paid_time - now - self._advance_s / self._share, 0.0)


class Connections:
    """At most `limit` connections, half of them from one address, and accounts of recently connected addresses."""

    def __init__(self, limit: int, is_proxy: Callable[[Address], bool] = lambda _: False) -> None:
        self.limit = limit
        self.num_open = self._num_new = self._num_lost = 0
        self.num_by_address: Counter[str] = Counter()
        self.together = Account(*_TOGETHER)  # of all connections, for the time that each uses beyond its share
        self._most_of_one = max(int(limit * _PART), 1)
        self._is_proxy = is_proxy  # whether an address is a proxy's; proxies and Unix sockets have no limit per address
        self.tell_new: Callable[[int], object] = lambda _: None  # told how many connections may become streams
        self.is_decoding: Callable[[], bool] = lambda: False  # whether the scheduler's thread needs the processor
        self._accounts: dict[str, Account] = {}
        self.looked_s = 0.0  # processor time of the event loop when it was last read, for `since`

    def since(self, begin: float) -> float:
        """Return an upper bound, in seconds, on the event loop's processor time since `begin` (`time.monotonic`)."""
        took_s = time.monotonic() - begin
        if took_s > _LONG_S:
            before, self.looked_s = self.looked_s, time.thread_time()
            took_s = min(took_s, self.looked_s - before)
        return took_s

    def enter(self, connection: socket.socket) -> Visit | None:
        """Count a new connection. None: too many are open, in all or from its address, or the address owes too much."""
        try:
            peer = address_of(connection.getpeername()[0])
        except (OSError, IndexError):  # the client disconnected, or it is a Unix socket
            peer = None
        address, now = site_of(peer), time.monotonic()
        is_free = peer is None or self._is_proxy(peer)
        if self.num_open >= self.limit or (self.num_by_address[address] >= self._most_of_one and not is_free):
            return None
        account = None
        if not is_free:
            if len(self._accounts) > self.limit:
                self._accounts = {key: each for key, each in self._accounts.items() if each.debt_s(now)}
            account = self._accounts.setdefault(address, Account(*(_HERE if address in _THIS_MACHINE else _ADDRESS)))
            account.take(_CONNECTION_S, now)
            if account.wait_s(now) > _LONGEST_WAIT_S and address not in _THIS_MACHINE:
                account.take(-_CONNECTION_S, now)
                return None
        self.num_open += 1
        self.num_by_address[address] += 1
        self.count_new(1)
        return Visit(self, address, account)

    def count_new(self, number: int) -> None:
        """Add `number` (1 or -1) to the count of new connections, which may still become streams."""
        self._num_new += number
        self.tell_new(self._num_new)

    def forget(self, address: str, num_lost: int) -> None:
        """Remove a closed connection. `num_lost`: bytes of its last, incomplete message."""
        self.num_open -= 1
        self.num_by_address[address] -= 1
        if not self.num_by_address[address]:
            del self.num_by_address[address]
        self._num_lost += num_lost
        if self._num_lost > _MOST_LOST:
            self._num_lost = 0
            gc.collect()


class Visit:
    """An open connection: its processor time, and its entry in the counts of `Connections`.

    Each connection has a small share of one core. A connection with a slot has only a minimal share, but sending audio
    reduces its debt. Even many such connections therefore use little processor time unless they send audio. Time beyond
    a connection's own share is charged to the common account of all connections. The time of a connection without a
    slot is also charged to its address. So is the debt of a connection that releases its slot.
    """

    def __init__(self, connections: Connections, address: str, account: Account | None) -> None:
        self.connections, self._address, self._account = connections, address, account
        self.since, self._own, self._has_place = connections.since, Account(*_OWN), False
        self._is_new = self._is_here = True
        self._earned_time = 0.0  # time up to which audio has been counted
        self.spent_s = 0.0  # processor time since the client's last data was passed on
        self.lost: Callable[[], object] = lambda: None  # called at a disconnection, which a task may notice late

    @contextlib.contextmanager
    def place(self, lost: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Within the block, the client has a slot for a stream or file, and `lost` is called if it disconnects."""
        self._own.change(*_OWN_WITH_PLACE, time.monotonic())
        self._has_place, self.lost = True, lost
        try:
            yield
        finally:
            now = time.monotonic()
            self._own.change(*_OWN, now)
            self._has_place, self.lost = False, lambda: None
            if self._account is not None:
                self._account.take(self._own.debt_s(now), now)

    def earn(self, audio_s: float) -> None:
        """Reduce the debt after the client sent `audio_s` seconds of audio, or an equivalent part of a file."""
        now = time.monotonic()
        since = max(self._earned_time, now - _MOST_AT_ONCE_S)
        self._earned_time = min(since + audio_s, now)
        self._own.take(-_EARNED * min(self._earned_time - since, self._own.debt_s(now) / _EARNED), now)

    def charge(self, seconds: float, now: float) -> None:
        """Charge processor time to the connection."""
        self.spent_s += seconds
        (self.connections.together if self._own.wait_s(now) else self._own).take(seconds, now)
        if self._account is not None and not self._has_place:
            self._account.take(seconds, now)

    def wait_s(self, now: float) -> float:
        """Return the seconds until more work may be done for this connection."""
        own_s = self._own.wait_s(now)
        wait_s = self.connections.together.wait_s(now) if own_s else 0.0
        if self._has_place:  # connections with a slot wait only because of their own debt
            return min(wait_s, own_s)
        return wait_s if self._account is None else max(wait_s, self._account.wait_s(now))

    def settle(self) -> None:
        """Stop counting the connection as new: it is a stream, or will not become one. Idempotent."""
        if self._is_new:
            self._is_new = False
            self.connections.count_new(-1)

    def leave(self, num_lost: int = 0) -> None:
        """Record that the connection is closed. `num_lost`: bytes of an incomplete message. Idempotent."""
        self.settle()
        self.lost()
        if not self._is_here:
            return
        self._is_here, begin = False, time.monotonic()
        self.connections.forget(self._address, num_lost)
        if self._account is not None:  # the address pays for a garbage collection in `forget`
            self._account.take(time.monotonic() - begin, begin)


CLIENT = ContextVar("u2moe_client", default=Visit(Connections(0), "", None))  # noqa: B039 - for tasks without client


def address_of(host: str) -> Address | None:
    """Return the IP address in `host`. None: `host` is empty or a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def site_of(peer: Address | None) -> str:
    """Return, as text, the address or IPv6 network to which limits per address apply."""
    if peer is None or peer.version == 4:
        return str(peer)
    return str(ipaddress.ip_network((peer, _IPV6_SITE), strict=False))


class Lateness:
    """Average time that live audio waits for recognition.

    The server's capacity is measured only at startup. High lateness shows that the machine has since become slower or
    has other work. Once results are late, no new clients are admitted until results are clearly on time again.
    """

    def __init__(self) -> None:
        self._late_s, self._then, self._is_too_late = 0.0, time.monotonic(), False

    def observe(self, seconds: float) -> None:
        """Update the average after a scheduler round in which live audio waited at most `seconds`."""
        now = time.monotonic()
        passed_s = min(now - self._then, max(seconds, _IN_TIME_S))  # a pause without live audio does not count
        self._late_s += (1 - math.exp(-passed_s / _AVERAGED_S)) * (seconds - self._late_s)
        self._then = now

    @property
    def is_too_late(self) -> bool:
        """Whether no more streams should be admitted."""
        if time.monotonic() - self._then > _FORGOTTEN_S:
            self._late_s = 0.0
        self._is_too_late = self._late_s > (_IN_TIME_S if self._is_too_late else _TOO_LATE_S)
        return self._is_too_late


Take = Callable[[float], None]  # sets how many slots a client takes: the cost of its stream relative to a plain one


class Admission:
    """Slots for live streams or for files. If none is free, clients are refused immediately.

    The metric `gauge`, "streams" or "files", shows how many slots are taken. With `lateness`, clients are also refused
    while results are late. The slots belong to the API key with the name `key`, or else to the server.
    """

    def __init__(
        self, num_slots: int, metrics: Metrics, gauge: str, lateness: Lateness | None = None, key: str | None = None
    ) -> None:
        self._metrics, self._gauge, self._lateness, self._key = metrics, gauge, lateness, key
        self.num_slots, self.num_taken = num_slots, 0.0  # a stream that costs more than a plain one takes several
        self.is_stopping = False  # whether all clients are refused

    @contextlib.contextmanager
    def slot(self) -> Iterator[Take]:
        """Take a slot for the `with` block; yield a function that changes their number. Raises UnavailableError."""
        if self.is_stopping:
            self._metrics.refuse("stopping")
            raise StoppingError
        own = 0.0

        def take(number: float) -> None:
            nonlocal own
            number = min(number, self.num_slots)
            if number > own and self.num_taken - own + number > self.num_slots:
                self._metrics.refuse("full")
                cost = f"; this one costs as much as {number:.1f}" if number > 1 else ""
                limit = "the server is full: it recognises" if self._key is None else f"the key {self._key} allows"
                code = None if self._key is None else "rate_limit"
                raise UnavailableError(f"{limit} {self.num_slots} {self._gauge} at a time{cost}", code=code)
            self.num_taken = round(self.num_taken - own + number, 3)
            own = number
            if self._key is None:
                self._metrics.set(self._gauge, self.num_taken)

        take(1.0)
        try:
            if self._lateness is not None and self.num_taken > 1 and self._lateness.is_too_late:
                self._metrics.refuse("late")
                raise UnavailableError("the server is full: it is slower than usual, and results would be late")
            yield take
        finally:
            take(0.0)
