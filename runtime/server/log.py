"""The server's metrics for Prometheus, and its log: one format for all lines, at most one of each kind per minute.

Lines never contain clients' audio, text, URLs or addresses. Each worker has one row of a shared array of metrics.
"""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from u2moe.runtime.errors import AudioWarning, U2moeError
from u2moe.runtime.server.errors import UnavailableError

REQUEST_ID: ContextVar[str] = ContextVar("u2moe_request_id", default="")  # of the task's request or connection
LOGGER = logging.getLogger("u2moe.server")

_PERIOD_S = 60.0  # seconds after a line in which others of its kind are only counted, so clients cannot fill the disk
_MOST_KINDS = 100  # maximum number of kinds of lines logged within `_PERIOD_S`
_STDERR = "stderr"  # name of the logger for lines that other code writes to stderr
_COUNTED = "is_counted"  # name of the attribute that marks records already rate-limited by `Metrics`
_MAX_FRAMES = 8  # maximum number of traceback frames in a line; the innermost frames are kept
_REFUSALS = {
    "full": "refused a client: all slots are taken",
    "late": "refused a client: the machine is slower than usual, and results would be late",
    "stopping": "refused a client: the server is stopping",
    "key": "refused a client: its API key is missing or wrong",
    "host": "refused a client: its Host header does not name localhost",
    "origin": "refused a page: its origin is not among --cors-origin",
    "connections": "closed a new connection: too many connections, in total or from its address",
}
_FAILURES = {
    "request": "closed a connection: the client violated the protocol",
    "idle": "closed a connection: the client sent or read too little for too long",
    "too_large": "closed a connection: the client sent more than --max-upload or --max-duration allows",
    "storage": "refused a file: the temporary folder is full or not writable, or no process can be started",
    "decoder": "refused a file: it crashed the decoder process or exceeded its limits",
    "recognition": "closed a connection: recognition failed",
}
LATENCY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)  # upper bounds of the buckets in seconds
_COUNTERS: dict[str, tuple[str, str, Iterable[str]]] = {
    "connections": ("Connections that were accepted, by protocol.", "protocol", ()),
    "refusals": ("Connections and requests that were refused.", "reason", _REFUSALS),
    "failures": ("Connections and requests that ended with an error.", "kind", _FAILURES),
    "audio_seconds": ("Seconds of audio recognised.", "source", ("stream", "file")),
    "compute_seconds": ("Seconds spent on recognition.", "source", ("stream", "file")),
    "results": ("Results sent.", "kind", ("partial", "final")),
}
"""Description, label and label values of each counter. The values of `connections` are the names of the protocols."""
_GAUGES = {
    "streams": "Live streams.",
    "capacity": "Maximum number of live streams.",
    "files": "Files being received, waiting or being recognised.",
    "queue_seconds": "Seconds of audio waiting for recognition, in streams that have a complete chunk.",
    "ready": "Workers that accept connections.",
}
_INTERNAL = ("newcomers", "heartbeats")  # gauges that only workers and their parent process read
_HISTOGRAMS = {
    "first_text_seconds": "Seconds from the start of a stream to its first text.",
    "lateness_seconds": "Seconds from the arrival of live audio to the end of its recognition.",
    "file_wait_seconds": "Seconds from the end of an upload to the start of its recognition.",
    "partial_latency_seconds": "Seconds from the arrival of audio to the partial result that it caused.",
    "final_latency_seconds": "Seconds from the arrival of an utterance's last audio, or its end, to its final result.",
}
_NUM_COLUMNS = 160  # number of columns of the array: enough for all values above and about thirty protocols


def log_to_stderr(worker: int | None = None, *, is_json: bool = False) -> None:
    """Log the server's messages and the warnings of libraries to stderr. Messages of a worker include its number.

    A line is text or, with `is_json`, an object with time, level, logger and message. It has the id of its request, if
    any. Warnings about malformed forms are not logged. Others are limited to one of each kind per minute. With
    `is_json`, text that other code writes to Python's stderr is also logged.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", AudioWarning)
    name = "" if worker is None else f"worker {worker}: "
    handler = logging.StreamHandler(sys.__stderr__)
    handler.addFilter(_Rate().is_due)
    if is_json:
        sys.stderr = _LoggedLines()
    place = "" if is_json else "%(asctime)s %(levelname)s %(name)s: "
    handler.setFormatter(_Formatter(f"{place}{name}%(message)s", is_json=is_json))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    LOGGER.setLevel(logging.INFO)


class _Formatter(logging.Formatter):
    """Formatter that writes one line per record. It omits the text of exceptions, which may quote a client."""

    def __init__(self, form: str, *, is_json: bool) -> None:
        super().__init__(form)
        self._is_json = is_json

    def formatException(self, ei: Any) -> str:  # noqa: N802 - of logging
        kind, _, trace = ei
        frames = traceback.extract_tb(trace)[-_MAX_FRAMES:]
        places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        return f"{kind.__name__ if kind else None} at {places}"

    def format(self, record: logging.LogRecord) -> str:
        line, request = super().format(record).strip().replace("\n", " "), REQUEST_ID.get()
        if not self._is_json:
            return f"{line} (request {request})" if request else line
        values = {"time": record.created, "level": record.levelname.lower(), "logger": record.name, "message": line}
        return json.dumps({**values, **({"request": request} if request else {})}, ensure_ascii=False)


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


def shared_rows(workers: int) -> Any:
    """Return shared memory for the metrics of `workers` processes."""
    return multiprocessing.get_context("spawn").RawArray("d", workers * _NUM_COLUMNS)


class Metrics:
    """Metrics of one worker, and totals of all workers that share `rows`. Thread-safe, except `refuse` and `fail`."""

    def __init__(self, protocols: Sequence[str] = (), rows: Any = None, worker: int = 0) -> None:
        self._labels = {name: values for name, (_, _, values) in _COUNTERS.items()} | {"connections": protocols}
        names = [f"{name}:{label}" for name, labels in self._labels.items() for label in labels]
        names += [*_GAUGES, *_INTERNAL]
        names += [f"{name}:{part}" for name in _HISTOGRAMS for part in (*LATENCY_BUCKETS, "+Inf", "sum")]
        self._columns = {name: index for index, name in enumerate(names)}
        self._rows = np.frombuffer(shared_rows(1) if rows is None else rows, np.float64).reshape(-1, _NUM_COLUMNS)
        self._row = self._rows[worker]
        self._lock, self._rate = threading.Lock(), _Rate()
        self.forget(worker)

    def forget(self, worker: int) -> None:
        """Reset the gauges of an exited worker to 0. Its successor continues the counters."""
        for name in (*_GAUGES, *_INTERNAL):
            self._rows[worker, self._columns[name]] = 0

    def count(self, name: str, label: str, amount: float = 1.0) -> None:
        """Add an amount to a counter."""
        with self._lock:
            self._row[self._columns[f"{name}:{label}"]] += amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._row[self._columns[name]] = value

    def observe(self, name: str, seconds: float) -> None:
        """Add a value in seconds to a histogram."""
        bound = next((str(bound) for bound in LATENCY_BUCKETS if seconds <= bound), "+Inf")
        with self._lock:
            self._row[self._columns[f"{name}:{bound}"]] += 1
            self._row[self._columns[f"{name}:sum"]] += seconds

    def total(self, name: str, label: str | None = None) -> float:
        """Return a counter or gauge, summed over all workers."""
        return float(self._rows[:, self._columns[name if label is None else f"{name}:{label}"]].sum())

    def each(self, name: str) -> list[float]:
        """Return the values of a gauge, one for each worker."""
        return [float(value) for value in self._rows[:, self._columns[name]]]

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self).decode()

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, summed over all workers. prometheus_client calls this method on its collectors."""
        for name, (summary, label, _) in _COUNTERS.items():
            counter = CounterMetricFamily(f"u2moe_{name}", summary, labels=[label])
            for value in self._labels[name]:
                counter.add_metric([value], self.total(name, value))
            yield counter
        for name, summary in _GAUGES.items():
            yield GaugeMetricFamily(f"u2moe_{name}", summary, self.total(name))
        for name, summary in _HISTOGRAMS.items():
            bounds = [*map(str, LATENCY_BUCKETS), "+Inf"]
            buckets = list(zip(bounds, accumulate(self.total(name, bound) for bound in bounds), strict=True))
            yield HistogramMetricFamily(f"u2moe_{name}", summary, buckets, self.total(name, "sum"))
        audio = self.total("audio_seconds", "stream") + self.total("audio_seconds", "file")
        compute = self.total("compute_seconds", "stream") + self.total("compute_seconds", "file")
        summary = "Seconds of recognition for each second of audio, since the start."
        yield GaugeMetricFamily("u2moe_real_time_factor", summary, compute / audio if audio else 0.0)

    def refuse(self, reason: str) -> None:
        """Count and log a refused connection or request. `reason` is a label of the metric `refusals`."""
        self.count("refusals", reason)
        self._log(reason, _REFUSALS[reason])

    def fail(self, error: Exception, what: str = "a task") -> None:
        """Count and log the error that ended a connection or request. `refuse` has already counted refusals.

        An error that is not a U2moeError is a bug. Its origin is logged; `what` names the part that failed.
        """
        if not isinstance(error, U2moeError):
            self.count("failures", "recognition")
            self._log("recognition", f"internal error in {what}", error)
        elif not isinstance(error, UnavailableError):
            kind = getattr(error, "kind", "request")
            self.count("failures", kind)
            self._log(kind, _FAILURES[kind])

    def _log(self, label: str, message: str, error: Exception | None = None) -> None:
        if (more := self._rate.more(label)) is not None:
            LOGGER.warning("%s%s", message, more, exc_info=error, extra={_COUNTED: True})


def notify(state: str) -> None:
    """Send a state such as "READY=1" to systemd (sd_notify), if systemd started the server."""
    if address := os.environ.get("NOTIFY_SOCKET", ""):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
            channel.sendall(state.encode())
