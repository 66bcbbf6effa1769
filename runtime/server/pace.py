"""Limits of one connection: work in each turn of the event loop, processor time, and time without progress."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import TypeVar

from u2moe.runtime.server.errors import IdleError
from u2moe.runtime.server.service import Slot

_Value = TypeVar("_Value")
_SHARE = 0.05
"""Share of one processor that a connection may take for parsing what it sends; those that are slowed down divide it."""
_BURST_S = 0.02
"""Seconds of processor time that it may take before it is slowed down."""
_FIRST_BYTES = 4096
_LEAST_BYTES = 512
_MOST_BYTES = 256 << 10
_TURN_S = 0.001
"""Seconds of processor time that the parsing of one piece should take."""


_slow: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[Pieces]] = weakref.WeakKeyDictionary()
"""Connections that are slowed down, by the event loop that serves them."""


class Pieces:
    """Data from a connection, handed to a parser in pieces that each take about a millisecond.

    Args:
        parse: parses a piece; returns the seconds that its content will take further on.
        read: lets the transport read (True) or not (False).
    """

    def __init__(self, parse: Callable[[bytes], float], read: Callable[[bool], object]) -> None:
        self._parse = parse
        self._read = read
        self._rest = bytearray()
        self._size = _FIRST_BYTES
        self._time = asyncio.get_running_loop().time
        self._debt_s, self._then = 0.0, self._time()
        self._slow = _slow.setdefault(asyncio.get_running_loop(), set())
        self._timer: asyncio.Handle | None = None
        self._is_held = False

    def put(self, data: bytes) -> None:
        """Take what has arrived, and parse the first of it unless other data wait."""
        if self._timer is not None or self._is_held:
            self._rest += data
            self._read(False)  # noqa: FBT003
        elif len(data) > self._size:
            self._rest += data
            self._work()
        else:
            self._parse_piece(data)

    def hold(self, is_held: bool) -> None:
        """Stop parsing and reading, or go on."""
        self._is_held = is_held
        if is_held:
            self._read(False)  # noqa: FBT003
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_soon(self._work)

    def take_rest(self) -> bytes:
        """The data not parsed yet, for another parser; nothing more is parsed here."""
        rest = bytes(self._rest)
        self.close()
        return rest

    def close(self) -> float:
        """Forget what was not parsed; returns the seconds that were taken beyond the share."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._slow.discard(self)
        self._slow = set()  # it may close itself while it parses
        self._rest.clear()
        self._parse, self._read = lambda _: 0.0, lambda _: None  # they refer to the connection, which refers to this
        self._pay()
        return self._debt_s

    def _work(self) -> None:
        self._timer = None
        if not self._is_held:
            with memoryview(self._rest) as rest:
                piece = bytes(rest[: self._size])
            del self._rest[: self._size]
            self._parse_piece(piece)

    def _parse_piece(self, piece: bytes) -> None:
        begin = time.thread_time()
        later_s = self._parse(piece) if piece else 0.0
        took_s = time.thread_time() - begin + later_s
        if took_s > _TURN_S:
            self._size = max(self._size // 2, _LEAST_BYTES)
        elif took_s < _TURN_S / 4 and len(piece) > self._size // 2:
            self._size = min(self._size * 2, _MOST_BYTES)
        share = self._pay()
        self._debt_s += took_s
        wait_s = max(self._debt_s - _BURST_S, 0.0) / share
        (self._slow.add if wait_s else self._slow.discard)(self)
        if self._rest or wait_s:
            self._read(False)  # noqa: FBT003
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._work)
        elif not self._is_held:
            self._read(True)  # noqa: FBT003

    def _pay(self) -> float:
        """Reduce the debt by what the passed time has paid; returns the share by which it is paid."""
        share = _SHARE / max(len(self._slow), 1)
        now = self._time()
        self._debt_s = max(self._debt_s - (now - self._then) * share, 0.0)
        self._then = now
        return share


LEAST_BYTES_PER_S = 500
"""Minimum rate of HTTP bodies, in either direction."""
_LEAST_AUDIO = 0.01
"""Minimum audio of a live client as a share of real time: 0.6 seconds, about one chunk, in a minute."""


class Patience:
    """A timeout that is extended only by progress, not by messages without any.

    Args:
        limit_s: seconds within which there must be progress.
        least: the amount that counts as progress.
        unit: unit of amounts, for errors.
        amount: returns the amount received since the start.
    """

    def __init__(self, limit_s: float, least: float, unit: str, amount: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._least = least
        self._unit = unit
        self._amount = amount
        self._time = asyncio.get_running_loop().time
        self._since, self._amount_then = self._time(), amount()

    def left_s(self) -> float:
        """Seconds left, above 0; IdleError: none are left."""
        now, amount = self._time(), self._amount()
        if amount - self._amount_then >= self._least:
            self._since, self._amount_then = now, amount
        left = self._since + self._limit_s - now
        if left <= 0:
            raise self._error()
        return left

    async def wait_for(self, next_one: Callable[[], Awaitable[_Value]]) -> _Value:
        """Await `next_one()` and return its result; IdleError: the time is over."""
        try:
            async with asyncio.timeout(self.left_s()) as scope:
                return await next_one()
        except TimeoutError:
            if not scope.expired():  # the connection was lost
                raise
            raise self._error() from None

    def _error(self) -> IdleError:
        return IdleError(f"less than {self._least:g} {self._unit} came within {self._limit_s:g} seconds")


def patience_for_audio(slot: Slot, idle_s: float) -> Patience:
    """The idle timeout of a live client, which has to send audio."""
    return Patience(idle_s, _LEAST_AUDIO * idle_s, "seconds of audio", lambda: slot.fed_s)
