"""What signals do to a process of the server."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from u2moe.runtime.server.log import LOGGER, notify

_SAME_S = 0.5
"""Seconds in which repeated signals count as one: timeout(1), for example, signals both the process and its group."""
_HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """End the process with 0 on SIGTERM, until `handle_signals`; afterwards signals do what they did before.

    By default the exit code would differ, and the first process of a container would ignore the signal.
    """
    before = {number: signal.getsignal(number) for number in _HANDLED}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def handle_signals(
    stop: Callable[[], object], reload: Callable[[], object], kill: Callable[[], object] = lambda: None
) -> None:
    """From now on the first SIGTERM or SIGINT is to `stop`, a second one ends the process after `kill`.

    SIGHUP is to `reload`, where it exists.
    """
    stop_time: float | None = None

    def end(number: int, _frame: Any) -> None:
        nonlocal stop_time
        now = time.monotonic()
        if stop_time is None:
            stop_time = now
            notify("STOPPING=1")
            stop()
        elif now - stop_time > _SAME_S:
            LOGGER.warning("stopped at once")
            kill()
            os._exit(128 + number)

    for number in _HANDLED:
        signal.signal(number, end if number in (signal.SIGTERM, signal.SIGINT) else lambda *_: reload())
