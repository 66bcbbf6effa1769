"""The server's log: one format for all lines, at most one line of each kind per minute, and counts of incidents.

Lines never contain clients' audio, text, URLs or addresses.
"""

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

REQUEST_ID: ContextVar[str] = ContextVar("u2moe_request_id", default="")  # of the task's request or connection
LOGGER = logging.getLogger("u2moe.server")

_PERIOD_S = 60.0  # seconds after a line in which others of its kind are only counted, so clients cannot fill the disk
_MOST_KINDS = 100  # maximum number of kinds of lines logged within `_PERIOD_S`
_STDERR = "stderr"  # name of the logger for lines that other code writes to stderr
_COUNTED = "is_counted"  # name of the attribute that marks records already rate-limited by `Incidents`
_MAX_FRAMES = 8  # maximum number of traceback frames in a line; the innermost frames are kept
_INCIDENTS = {
    "full": "refused a client: all slots are taken",
    "late": "refused a client: the machine is slower than usual, and results would be late",
    "stopping": "refused a client: the server is stopping",
    "key": "refused a client: its API key is missing or wrong",
    "host": "refused a client: its Host header does not name localhost",
    "origin": "refused a page: its origin is not among --cors-origin",
    "connections": "closed a new connection: too many connections, in total or from its address",
    "request": "closed a connection: the client violated the protocol",
    "idle": "closed a connection: the client sent or read too little for too long",
    "too_large": "closed a connection: the client sent more than --max-upload or --max-duration allows",
    "storage": "refused a file: the temporary folder is full or not writable",
    "decoder": "refused a file: it crashed the decoder process or exceeded its limits",
    "recognition": "closed a connection: recognition failed",
}


def log_to_stderr(worker: int | None = None, *, is_json: bool = False) -> None:
    """Log the server's messages and the warnings of libraries to stderr. Messages of a worker include its number.

    A line is text or, with `is_json`, a JSON object with time, level, logger and message. If it concerns a request, it
    also has the request's id. Warnings about clients' malformed forms are not logged. Other warnings are limited to one
    of each kind per minute. With `is_json`, text that other code writes to Python's stderr is also logged.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", AudioWarning)
    name = "" if worker is None else f"worker {worker}: "
    handler = logging.StreamHandler(sys.__stderr__)
    handler.addFilter(_Rate().is_due)
    if is_json:
        sys.stderr = _LoggedLines()
    line = f"%(asctime)s %(levelname)s %(name)s: {name}%(message)s"
    handler.setFormatter(_JsonFormatter(f"{name}%(message)s") if is_json else _Formatter(line))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    LOGGER.setLevel(logging.INFO)


class _Formatter(logging.Formatter):
    """Formatter that writes one line per record. It omits the text of exceptions, which may quote a client."""

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
    """Replacement for stderr that logs each line."""

    _rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(str.strip, lines):
            logging.getLogger(_STDERR).warning("%s", line)
        return len(text)


class _Rate:
    """Rate limit: one warning or error per minute of each kind."""

    def __init__(self) -> None:
        self._next_times: dict[Hashable, float] = {}
        self._num_silent: Counter[Hashable] = Counter()

    def more(self, kind: Hashable) -> str | None:
        """Return text about the lines suppressed before this one, or None to suppress this one too."""
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

    def is_due(self, record: logging.LogRecord) -> bool:
        """Filter records. Those of libraries are grouped by code location, because their texts may quote clients."""
        if record.levelno < logging.WARNING or hasattr(record, _COUNTED):
            return True
        is_ours = record.name in (LOGGER.name, _STDERR)
        place = record.getMessage() if is_ours else f"{record.pathname}:{record.lineno}"
        more = self.more((record.name, place, record.exc_info[0] if record.exc_info else None))
        record.msg, record.args = record.getMessage() + (more or ""), ()
        return more is not None


class Incidents:
    """Counts refusals and failures, and logs them at a limited rate."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self._rate = metrics, _Rate()

    def refuse(self, reason: str) -> None:
        """Count a refused connection or request. `reason` is a label of the metric `refusals`."""
        self.metrics.count("refusals", reason)
        self._log(reason)

    def fail(self, error: Exception) -> None:
        """Count the error that ended a connection or request. Refusals are ignored: `refuse` has counted them."""
        if not isinstance(error, UnavailableError):
            kind = getattr(error, "kind", "request" if isinstance(error, U2moeError) else "recognition")
            self.metrics.count("failures", kind)
            self._log(kind)

    def bug(self, what: str, error: Exception) -> None:
        """Count an internal error and log its origin. `what` names the part that failed, such as "a request"."""
        self.metrics.count("failures", "recognition")
        self._log("recognition", f"internal error in {what}", error)

    def _log(self, label: str, message: str | None = None, error: Exception | None = None) -> None:
        if (more := self._rate.more(label)) is not None:
            LOGGER.warning("%s%s", message or _INCIDENTS[label], more, exc_info=error, extra={_COUNTED: True})


def notify(state: str) -> None:
    """Send a state such as "READY=1" to systemd (sd_notify), if systemd started the server."""
    if address := os.environ.get("NOTIFY_SOCKET", ""):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            channel.sendall(state.encode())
