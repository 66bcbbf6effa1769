"""The server's log: one format for all lines, and one line of each kind a minute; incidents with clients are counted.

Lines hold neither audio, text, URLs nor addresses of clients.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Hashable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from u2moe.runtime.errors import AudioWarning, U2moeError
from u2moe.runtime.server.errors import UnavailableError
from u2moe.runtime.server.metrics import Metrics

REQUEST_ID: ContextVar[str] = ContextVar("u2moe_request_id", default="")
"""Of the request or connection that the current task serves."""
LOGGER = logging.getLogger("u2moe.server")

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_PERIOD_S = 60.0
"""Seconds after a line in which others of its kind are only counted: a client cannot fill a disk."""
_MOST_KINDS = 100
"""Kinds of lines in such a time."""
_STDERR = "stderr"
"""Logger of lines that are written to stderr by something else."""
_COUNTED = "is_counted"
"""Attribute of lines that are limited already."""
_MAX_FRAMES = 8
"""Of the traceback of an error: the innermost ones."""
_INCIDENTS = {
    "full": "refused a client: all places are taken",
    "late": "refused a client: the machine is slower than usual, and results would be late",
    "stopping": "refused a client: the server is about to stop",
    "key": "refused a client: its API key is missing or wrong",
    "host": "refused a client: it knows this server by another name than localhost",
    "origin": "refused a page: its origin is not among --cors-origin",
    "connections": "closed a connection at once: there are too many, in all or from its address",
    "request": "ended a connection: the client broke its protocol",
    "idle": "ended a connection: the client sent or read too little for too long",
    "too_large": "ended a connection: the client sent more than --max-upload or --max-duration allow",
    "storage": "refused a file: the folder for temporary files is full or cannot be written",
    "decoder": "refused a file: it crashed the process that decodes files, or took more than it may",
    "recognition": "ended a connection: recognition failed",
}


def log_to_stderr(worker: int | None = None, *, is_json: bool = False) -> None:
    """Log the server's messages and the warnings of libraries to stderr, those of a worker with its number.

    A line is text, or a JSON object with time, level, logger, message and, where it is about one, the request's id.

    Warnings about clients' forms are left out. Of others, one of a kind is logged a minute, whatever library it is of.
    With JSON, what programs and libraries write to Python's stderr becomes a line of the log, too.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", AudioWarning)
    name = "" if worker is None else f"worker {worker}: "
    handler = logging.StreamHandler(sys.__stderr__)
    handler.addFilter(_OnceAMinute())
    if is_json:
        sys.stderr = _LoggedLines()
    line = _FORMAT.replace("%(message)s", f"{name}%(message)s")
    handler.setFormatter(_JsonFormatter(f"{name}%(message)s") if is_json else _Formatter(line))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    LOGGER.setLevel(logging.INFO)


class _Formatter(logging.Formatter):
    """A line for each record. Of an exception it says the type and where it came from: its text may quote a client."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - of logging
        kind, _, trace = ei
        frames = traceback.extract_tb(trace)[-_MAX_FRAMES:]
        places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        return f"{kind.__name__ if kind else None} at {places}"

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record).strip().replace("\n", " ")
        return f"{line} (request {REQUEST_ID.get()})" if REQUEST_ID.get() else line


class _JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = logging.Formatter.format(self, record).strip().replace("\n", " ")
        level, request = record.levelname.lower(), {"request": REQUEST_ID.get()} if REQUEST_ID.get() else {}
        line = {"time": record.created, "level": level, "logger": record.name, "message": message, **request}
        return json.dumps(line, ensure_ascii=False)


class _LoggedLines(io.TextIOBase):
    """A stderr whose lines are logged."""

    _rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            logging.getLogger(_STDERR).warning("%s", line)
        return len(text)


class _Rate:
    """Lets a line of each kind pass, and others only after a minute."""

    def __init__(self) -> None:
        self._next_times: dict[Hashable, float] = {}
        self._num_silent: Counter[Hashable] = Counter()

    def more(self, kind: Hashable) -> str | None:
        """What a line says of those before it that were left out; None: it is left out, too."""
        now = time.monotonic()
        if len(self._next_times) >= _MOST_KINDS:
            self._next_times = {each: then for each, then in self._next_times.items() if then > now}
        if len(self._next_times) >= _MOST_KINDS:
            return None
        if now < self._next_times.get(kind, 0.0):
            self._num_silent[kind] += 1
            return None
        self._next_times[kind] = now + _PERIOD_S
        num_silent = self._num_silent.pop(kind, 0)
        return f" ({num_silent} more since the last such line)" if num_silent else ""


class _OnceAMinute(logging.Filter):
    """Limits warnings and errors, of libraries by the place in their code, as their words may be a client's."""

    def __init__(self) -> None:
        super().__init__()
        self._rate = _Rate()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or hasattr(record, _COUNTED):
            return True
        is_ours = record.name in (LOGGER.name, _STDERR)
        place = record.getMessage() if is_ours else f"{record.pathname}:{record.lineno}"
        more = self._rate.more((record.name, place, record.exc_info[0] if record.exc_info else None))
        record.msg, record.args = record.getMessage() + (more or ""), ()
        return more is not None


class Incidents:
    """Refusals and failures: each is counted, and logged unless the same was logged just before."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._rate = _Rate()

    def refuse(self, reason: str) -> None:
        """Count a connection or request that was refused, by a label of the metric."""
        self._metrics.count("refusals", reason)
        self._log(reason)

    def fail(self, error: Exception) -> None:
        """Count the error that ended a connection or request; refusals are counted where they occur."""
        if not isinstance(error, UnavailableError):
            kind = getattr(error, "kind", "request" if isinstance(error, U2moeError) else "recognition")
            self._metrics.count("failures", kind)
            self._log(kind)

    def bug(self, what: str, error: Exception) -> None:
        """Count an error that is a mistake of ours, and log where it came from."""
        self._metrics.count("failures", "recognition")
        self._log("recognition", f"{what} was ended by an error", error)

    def _log(self, label: str, message: str | None = None, error: Exception | None = None) -> None:
        if (more := self._rate.more(label)) is not None:
            LOGGER.warning("%s%s", message or _INCIDENTS[label], more, exc_info=error, extra={_COUNTED: True})


def notify(state: str) -> None:
    """Tell systemd a state such as "READY=1" (sd_notify), if it has started the server."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            channel.sendall(state.encode())
