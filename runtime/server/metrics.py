"""Metrics of the server for Prometheus, in rows of one shared array, so that workers can be summed."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

LATENCY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds in seconds."""

_COUNTERS = {
    "connections": ("Connections that were accepted, by protocol.", "protocol"),
    "refusals": ("Connections and requests that were refused, by reason.", "reason"),
    "failures": ("Connections and requests that ended with an error, by kind.", "kind"),
    "audio_seconds": ("Seconds of audio recognised.", "source"),
    "compute_seconds": ("Seconds spent on recognition.", "source"),
    "results": ("Results sent.", "kind"),
}
_LABELS = {
    "connections": ("stream", "realtime", "wenet", "sherpa", "sherpa-offline", "vosk", "wyoming", "file"),
    "refusals": ("full", "stopping", "key", "origin"),
    "failures": ("request", "idle", "too_large", "recognition"),
    "audio_seconds": ("stream", "file"),
    "compute_seconds": ("stream", "file"),
    "results": ("partial", "final"),
}
_GAUGES = {
    "streams": "Live streams.",
    "capacity": "Live streams that are taken at most.",
    "files": "Files that are being received, wait or are recognised.",
    "queue_seconds": "Seconds of audio that wait to be recognised, of sessions that have a whole chunk.",
    "ready": "Workers that take connections.",
}
_INTERNAL = ("known_connections",)
"""For the process that distributes connections to workers, not for Prometheus."""
_HISTOGRAMS = {
    "partial_latency_seconds": "From the arrival of audio to the partial result that it gave.",
    "final_latency_seconds": "From the arrival of the last audio of an utterance, or of its end, to its final result.",
}


def _places() -> Iterator[str]:
    for name in _COUNTERS:
        for label in _LABELS[name]:
            yield f"{name}:{label}"
    yield from (*_GAUGES, *_INTERNAL)
    for name in _HISTOGRAMS:
        for bound in (*LATENCY_BUCKETS, "+Inf", "sum"):
            yield f"{name}:{bound}"


_PLACES = {name: index for index, name in enumerate(_places())}


def shared_rows(workers: int) -> Any:
    """Shared memory for the metrics of `workers` workers, passed to each when it starts."""
    return multiprocessing.get_context("spawn").RawArray("d", workers * len(_PLACES))


class Metrics:
    """The metrics of one worker, and the text for all workers. Thread-safe."""

    def __init__(self, rows: Any = None, worker: int = 0) -> None:
        memory = shared_rows(1) if rows is None else rows
        self._rows = np.frombuffer(memory, np.float64).reshape(-1, len(_PLACES))
        self._row = self._rows[worker]
        self._lock = threading.Lock()
        self.forget(worker)

    def forget(self, worker: int) -> None:
        """Set the gauges of a worker that has ended to 0; its counters continue with its successor."""
        for name in (*_GAUGES, *_INTERNAL):
            self._rows[worker, _PLACES[name]] = 0

    def count(self, name: str, label: str, amount: float = 1.0) -> None:
        """Add to a counter."""
        with self._lock:
            self._row[_PLACES[f"{name}:{label}"]] += amount

    def know_connection(self) -> None:
        """Mark a connection as no longer new: it counts as a stream, or is known not to be one."""
        with self._lock:
            self._row[_PLACES["known_connections"]] += 1

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._row[_PLACES[name]] = value

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        bound: float | str = next((bound for bound in LATENCY_BUCKETS if seconds <= bound), "+Inf")
        with self._lock:
            self._row[_PLACES[f"{name}:{bound}"]] += 1
            self._row[_PLACES[f"{name}:sum"]] += seconds

    def total(self, name: str, label: str | None = None) -> float:
        """A counter or gauge, summed over all workers."""
        return float(self._rows[:, _PLACES[name if label is None else f"{name}:{label}"]].sum())

    def each(self, name: str) -> list[float]:
        """A value of each worker."""
        values: list[float] = self._rows[:, _PLACES[name]].tolist()
        return values

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        lines: list[str] = []
        for name, (summary, label) in _COUNTERS.items():
            values = [(f'{{{label}="{value}"}}', self.total(name, value)) for value in _LABELS[name]]
            lines += _described(f"u2moe_{name}_total", "counter", summary, values)
        for name, summary in _GAUGES.items():
            lines += _described(f"u2moe_{name}", "gauge", summary, [("", self.total(name))])
        for name, summary in _HISTOGRAMS.items():
            lines += self._histogram(name, summary)
        audio, compute = (sum(self.total(name, source) for source in _LABELS[name])
                          for name in ("audio_seconds", "compute_seconds"))  # fmt: skip
        lines += _described(
            "u2moe_real_time_factor",
            "gauge",
            "Seconds of recognition for each second of audio, since the start.",
            [("", compute / audio if audio else 0.0)],
        )
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str, summary: str) -> list[str]:
        lines = _described(f"u2moe_{name}", "histogram", summary, [])
        count = 0.0
        for bound in (*LATENCY_BUCKETS, "+Inf"):
            count += self.total(name, str(bound))
            lines.append(f'u2moe_{name}_bucket{{le="{bound}"}} {count:g}')
        return [*lines, f"u2moe_{name}_sum {self.total(name, 'sum'):.6f}", f"u2moe_{name}_count {count:g}"]


def _described(name: str, kind: str, summary: str, values: Sequence[tuple[str, float]]) -> list[str]:
    lines = [f"# HELP {name} {summary}", f"# TYPE {name} {kind}"]
    return [*lines, *(f"{name}{label} {value:.10g}" for label, value in values)]
