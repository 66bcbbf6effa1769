"""The messages of a WebSocket until its task reads them: a cheaper replacement for uvicorn's queue."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from u2moe.runtime.server.errors import IdleError
from u2moe.runtime.server.pace import Patience

_MAX_BYTES = 64 << 10
"""Bytes of messages that wait to be read, beyond which nothing more is received."""
_EVENT_BYTES = 256
"""Bytes that each message takes besides its content, which may be empty."""

Event = Mapping[str, Any]
"""A message of ASGI."""


class Mailbox:
    """ASGI events in the order of their arrival, for one reader.

    uvicorn pauses reading after each message until it is taken, at the price of two system calls for each block of
    audio. The mailbox pauses only clients that send faster than they are served, and has one timer for all reads.

    Args:
        hold: pauses the connection if called with True, and resumes it with False.
    """

    def __init__(self, hold: Callable[[bool], object]) -> None:
        self._hold = hold
        self._events: deque[Event] = deque()
        self._num_bytes = 0
        self._is_held = False
        self._arrival: asyncio.Future[None] | None = None
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

    async def get(self, patience: Patience | None = None) -> Event:
        """The next event.

        Args:
            patience: how long to wait for it, the same in all calls; None: without end.

        Raises:
            IdleError: the patience is over, even if there are events.
        """
        if patience is not None:
            patience.left_s()
        while not self._events:
            await self._wait(patience)
        return self._remove()

    def _remove(self) -> Event:
        event = self._events.popleft()
        self._num_bytes -= _size(event)
        if self._is_held and self._num_bytes <= _MAX_BYTES // 2:
            self._is_held = False
            self._hold(False)  # noqa: FBT003
        return event

    def take_bytes(self) -> bytes | None:
        """The next event's binary content, if there is an event and it has some."""
        data: bytes | None = self._events[0].get("bytes") if self._events else None
        if data is not None:
            self._remove()
        return data

    def clear(self) -> None:
        """Drop all events."""
        self._events.clear()
        self._num_bytes = 0

    def close(self) -> None:
        """Stop the timer and drop the reference to the connection: nothing more arrives."""
        self._hold = lambda _: None  # else they would refer to each other until the garbage is collected
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self, patience: Patience | None) -> None:
        loop = asyncio.get_running_loop()
        self._arrival = loop.create_future()
        if patience is not None and self._timer is None:
            self._timer = loop.call_later(patience.left_s(), self._expire, patience)
        try:
            await self._arrival
        finally:
            self._arrival = None

    def _expire(self, patience: Patience) -> None:
        """End a wait that is too long; if audio came in the meantime, check again when the new time is over."""
        self._timer = None
        if self._arrival is None or self._arrival.done():
            return
        try:
            self._timer = asyncio.get_running_loop().call_later(patience.left_s(), self._expire, patience)
        except IdleError as error:
            self._arrival.set_exception(error)


def _size(event: Event) -> int:
    return len(event.get("bytes") or event.get("text") or "") + _EVENT_BYTES
