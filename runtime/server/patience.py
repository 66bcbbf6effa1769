"""Time without progress: how long a client may send nothing, or too little to count."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from u2moe.runtime.server.errors import IdleError
from u2moe.runtime.server.service import Slot

_Value = TypeVar("_Value")
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
