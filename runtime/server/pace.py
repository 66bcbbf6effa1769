"""Bounds the work that one connection makes in each turn of the event loop, and its share of the processor's time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_SHARE = 0.05
"""Share of one processor that a connection may take for parsing what it sends."""
_BURST_S = 0.05
"""Seconds of processor time that it may take before it is slowed down."""
_FIRST_BYTES = 4096
_LEAST_BYTES = 512
_MOST_BYTES = 256 << 10
_TURN_S = 0.001
"""Seconds of processor time that the parsing of one piece should take."""


class Budget:
    """The processor time of a connection."""

    def __init__(self) -> None:
        self._time = asyncio.get_running_loop().time
        self._debt_s, self._then = 0.0, self._time()

    def spend(self, seconds: float) -> float:
        """Take some time; returns the seconds for which nothing more should be done for the connection."""
        now = self._time()
        self._debt_s = max(self._debt_s - (now - self._then) * _SHARE, 0.0) + seconds
        self._then = now
        return max(self._debt_s - _BURST_S, 0.0) / _SHARE


class Pieces:
    """What a connection has sent, handed to a parser in pieces that each take about a millisecond.

    Args:
        parse: parses a piece; returns the seconds that its content will take further on.
        read: lets the transport read (True) or not (False).
    """

    def __init__(self, parse: Callable[[bytes], float], read: Callable[[bool], object]) -> None:
        self._parse = parse
        self._read = read
        self._rest = bytearray()
        self._size = _FIRST_BYTES
        self._budget = Budget()
        self._timer: asyncio.Handle | None = None
        self._is_held = False

    def put(self, data: bytes) -> None:
        """Take what has arrived, and parse the first of it unless other data wait."""
        self._rest += data
        if self._timer is None and not self._is_held:
            self._work()
        else:
            self._read(False)  # noqa: FBT003

    def hold(self, is_held: bool) -> None:
        """Stop parsing and reading, or go on."""
        self._is_held = is_held
        if is_held:
            self._read(False)  # noqa: FBT003
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_soon(self._work)

    def take_rest(self) -> bytes:
        """What was not parsed, which is for another parser; nothing more is parsed here."""
        rest = bytes(self._rest)
        self.close()
        return rest

    def close(self) -> None:
        """Forget what was not parsed."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._rest.clear()
        self._parse, self._read = lambda _: 0.0, lambda _: None  # they refer to the connection, which refers to this

    def _work(self) -> None:
        self._timer = None
        if self._is_held:
            return
        piece = bytes(self._rest[: self._size])
        del self._rest[: self._size]
        begin = time.thread_time()
        later_s = self._parse(piece) if piece else 0.0
        took_s = time.thread_time() - begin + later_s
        if took_s > _TURN_S:
            self._size = max(self._size // 2, _LEAST_BYTES)
        elif took_s < _TURN_S / 4 and len(piece) == self._size:
            self._size = min(self._size * 2, _MOST_BYTES)
        wait_s = self._budget.spend(took_s)
        if self._rest or wait_s:
            self._read(False)  # noqa: FBT003
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._work)
        elif not self._is_held:
            self._read(True)  # noqa: FBT003
