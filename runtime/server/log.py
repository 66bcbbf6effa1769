"""What an operator reads: one format for all lines, and of what clients do no more than one line in a while.

Lines hold neither audio, text, URLs nor addresses of clients.
"""

from __future__ import annotations

import logging
import time
import warnings
from typing import TYPE_CHECKING

from u2moe.runtime.errors import AudioWarning

if TYPE_CHECKING:
    from u2moe.runtime.server.metrics import Metrics

LOGGER = logging.getLogger("u2moe.server")

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PERIOD_S = 10.0
"""Seconds after a line in which the same is only counted: a client cannot fill a disk."""
_INCIDENTS = {
    ("refusals", "full"): "refused a client: all places are taken",
    ("refusals", "stopping"): "refused a client: the server is about to stop",
    ("refusals", "key"): "refused a client: its API key is missing or wrong",
    ("refusals", "origin"): "refused a page: its origin is not among --cors-origin",
    ("failures", "request"): "ended a connection: the client broke its protocol",
    ("failures", "idle"): "ended a connection: the client sent or read too little for too long",
    (
        "failures",
        "too_large",
    ): "ended a connection: the client sent more than --max-upload or --max-duration allow",
    ("failures", "recognition"): "ended a connection: recognition failed",
}


def log_to_stderr(worker: int | None = None) -> None:
    """Log the server's messages and the warnings of libraries to stderr, those of a worker with its number.

    What clients could cause without end is left out: warnings about their forms and about the headers of their files.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", AudioWarning)
    name = "" if worker is None else f"worker {worker}: "
    logging.basicConfig(format=_FORMAT.replace("%(message)s", f"{name}%(message)s"), level=logging.WARNING)
    LOGGER.setLevel(logging.INFO)


class Incidents:
    """Refusals and failures: each is counted, and logged unless the same was logged just before."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._next_times: dict[tuple[str, str], float] = {}
        self._num_silent: dict[tuple[str, str], int] = {}

    def refuse(self, reason: str) -> None:
        """Count a connection or request that was refused, with a label of the metric."""
        self._count("refusals", reason)

    def fail(self, kind: str) -> None:
        """Count a connection or request that ended with an error, with a label of the metric."""
        self._count("failures", kind)

    def _count(self, name: str, label: str) -> None:
        self._metrics.count(name, label)
        key, now = (name, label), time.monotonic()
        if now < self._next_times.get(key, 0.0):
            self._num_silent[key] = self._num_silent.get(key, 0) + 1
            return
        self._next_times[key] = now + _PERIOD_S
        num_silent = self._num_silent.pop(key, 0)
        more = f" ({num_silent} more since the last such line)" if num_silent else ""
        LOGGER.warning("%s%s", _INCIDENTS[key], more)
