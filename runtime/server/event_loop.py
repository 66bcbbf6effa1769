"""The event loop of a server with many connections: it takes what has arrived together."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any

_PERIOD_S = 1e-4
"""Seconds from one look at the sockets to the next, for each that is active."""
_LONGEST_PERIOD_S = 0.01
_ACTIVE_S = 0.1
"""Seconds after which it is counted anew which are."""


class GatheringSelector(selectors.DefaultSelector):
    """Looks at the sockets at intervals that grow with the number of active ones, instead of after each message.

    Where hundreds of clients send audio, some arrives in every millisecond, and waking up for each message takes a
    quarter of the event loop's processor time. One that comes after silence is still taken at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._look_time = self._count_time = 0.0
        self._active: set[int] = set()  # file descriptors since the last count
        self._num_active = 0  # at the last count

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for events; None: without end."""
        if timeout is None or timeout > 0:  # else the loop has other work
            period_s = min(_PERIOD_S * self._num_active, _LONGEST_PERIOD_S)
            rest_s = max(self._look_time + period_s - time.monotonic(), 0.0)
            if timeout is not None:
                rest_s = min(rest_s, timeout)
                timeout -= rest_s
            if rest_s:
                time.sleep(rest_s)
        events = super().select(timeout)
        now = self._look_time = time.monotonic()
        self._active.update(key.fd for key, _ in events)
        if now - self._count_time > _ACTIVE_S:
            self._count_time, self._num_active = now, len(self._active)
            self._active.clear()
        return events


def run_in_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, as `asyncio.run` does, but in a loop that can watch sockets on Windows, too."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(GatheringSelector())) as runner:
        runner.run(main)
