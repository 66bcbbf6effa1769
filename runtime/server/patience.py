"""How long to wait for a client that sends little or nothing, whatever the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from u2moe.runtime.server.errors import IdleError

if TYPE_CHECKING:
    from u2moe.runtime.server.service import Place

_Value = TypeVar("_Value")

LEAST_BYTES_PER_S = 500
"""Rate below which HTTP is not awaited any longer, in either direction."""
_LEAST_AUDIO = 0.01
"""Least share of real time that a live client has to send: 0.6 seconds, about one chunk, in a minute."""


class Patience:
    """Ends after some seconds in which too little has come. Messages that move nothing on do not prolong it.

    Args:
        limit_s: the seconds.
        least: what has to come in them.
        unit: what it is counted in, for people.
        amount: returns how much has come since the start.
    """

    def __init__(self, limit_s: float, least: float, unit: str, amount: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._least = least
        self._unit = unit
        self._amount = amount
        self._time = asyncio.get_running_loop().time
        self._since, self._amount_then = self._time(), amount()

    def left_s(self) -> float:
        """Seconds for which the client is still awaited, above 0.

        Raises:
            IdleError: none are left.
        """
        now, amount = self._time(), self._amount()
        if amount - self._amount_then >= self._least:
            self._since, self._amount_then = now, amount
        left = self._since + self._limit_s - now
        if left <= 0:
            raise self._error()
        return left

    async def wait_for(self, next_one: Callable[[], Awaitable[_Value]]) -> _Value:
        """What `next_one` returns.

        Raises:
            IdleError: it takes too long, or the patience was over before.
        """
        try:
            async with asyncio.timeout(self.left_s()) as scope:
                return await next_one()
        except TimeoutError:
            if not scope.expired():  # the connection was lost
                raise
            raise self._error() from None

    def _error(self) -> IdleError:
        return IdleError(f"less than {self._least:g} {self._unit} came within {self._limit_s:g} seconds")


def patience_for_audio(place: Place, idle_s: float) -> Patience:
    """Patience with a live client, which has to send audio."""
    return Patience(idle_s, _LEAST_AUDIO * idle_s, "seconds of audio", lambda: place.fed_s)
