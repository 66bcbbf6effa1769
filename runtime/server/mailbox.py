"""The messages of a WebSocket until its task reads them; used instead of uvicorn's queue because it costs less."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

_MAX_BYTES = 64 << 10
"""Bytes of messages that wait to be read, beyond which nothing more is received."""

Event = Mapping[str, Any]
"""A message of ASGI."""


class Mailbox:
    """ASGI events in the order of their arrival, for one reader.

    uvicorn stops to receive with each message until it is read, which takes two system calls for each block of audio.
    Here that only happens to a client that sends faster than it is served. Nor does each read set a timer of its own.

    Args:
        hold: called with True when too much waits, and with False when there is room again.
    """

    def __init__(self, hold: Callable[[bool], object]) -> None:
        self._hold = hold
        self._events: deque[Event] = deque()
        self._num_bytes = 0
        self._is_held = False
        self._arrival: asyncio.Future[None] | None = None
        self._waits_since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def put_nowait(self, event: Event) -> None:
        """Append an event."""
        self._events.append(event)
        self._num_bytes += _size(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
        if self._num_bytes > _MAX_BYTES and not self._is_held:
            self._is_held = True
            self._hold(True)  # noqa: FBT003

    async def get(self, patience_s: float | None = None) -> Event:
        """The next event.

        Args:
            patience_s: seconds to wait for it at most, the same in all calls; None: without end.

        Raises:
            TimeoutError: there was none in time.
        """
        while not self._events:
            await self._wait(patience_s)
        event = self._events.popleft()
        self._num_bytes -= _size(event)
        if self._is_held and self._num_bytes <= _MAX_BYTES // 2:
            self._is_held = False
            self._hold(False)  # noqa: FBT003
        return event

    def close(self) -> None:
        """Stop the timer, and let go of whoever was held: nothing more arrives."""
        self._hold = lambda _: None  # else they would refer to each other until the garbage is collected
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self, patience_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._arrival, self._waits_since = loop.create_future(), loop.time()
        if patience_s is not None and self._timer is None:
            self._timer = loop.call_later(patience_s, self._expire, patience_s)
        try:
            await self._arrival
        finally:
            self._arrival = None

    def _expire(self, patience_s: float) -> None:
        """End a wait that is too long; a shorter one is looked at again when it would be."""
        self._timer = None
        if self._arrival is None or self._arrival.done():
            return
        loop = asyncio.get_running_loop()
        left = self._waits_since + patience_s - loop.time()
        if left > 0:
            self._timer = loop.call_later(left, self._expire, patience_s)
        else:
            self._arrival.set_exception(TimeoutError())


def _size(event: Event) -> int:
    return len(event.get("bytes") or event.get("text") or "")
