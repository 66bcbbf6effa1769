"""Metrics of the server for Prometheus. Each worker has one row of a shared array. Totals are sums over the rows."""

import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

LATENCY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)  # upper bounds of the buckets in seconds

_COUNTERS = {
    "connections": ("Connections that were accepted, by protocol.", "protocol", ()),
    "refusals": ("Connections and requests that were refused.", "reason",
        ("full", "late", "stopping", "key", "host", "origin", "connections")),
    "failures": ("Connections and requests that ended with an error.", "kind",
        ("request", "idle", "too_large", "storage", "decoder", "recognition")),
    "audio_seconds": ("Seconds of audio recognised.", "source", ("stream", "file")),
    "compute_seconds": ("Seconds spent on recognition.", "source", ("stream", "file")),
    "results": ("Results sent.", "kind", ("partial", "final")),
}  # fmt: skip
"""Description, label and label values of each counter. The values of `connections` are the names of the protocols."""
_GAUGES = {
    "streams": "Live streams.",
    "capacity": "Maximum number of live streams.",
    "files": "Files being received, waiting or being recognised.",
    "queue_seconds": "Seconds of audio waiting for recognition, in streams that have a complete chunk.",
    "ready": "Workers that accept connections.",
}
_INTERNAL = ("newcomers", "heartbeats")
"""Gauges that are not exported to Prometheus. Workers use them to share connections, and the parent process uses them
to detect blocked workers."""
_HISTOGRAMS = {
    "first_text_seconds": "Seconds from the start of a stream to its first text.",
    "lateness_seconds": "Seconds from the arrival of live audio to the end of its recognition.",
    "file_wait_seconds": "Seconds from the end of an upload to the start of its recognition.",
    "partial_latency_seconds": "Seconds from the arrival of audio to the partial result that it caused.",
    "final_latency_seconds": "Seconds from the arrival of an utterance's last audio, or its end, to its final result.",
}
_NUM_COLUMNS = 160  # number of columns of the array: enough for all values above and about thirty protocols


def shared_rows(workers: int) -> Any:
    """Return shared memory for the metrics of `workers` processes."""
    return multiprocessing.get_context("spawn").RawArray("d", workers * _NUM_COLUMNS)


class Metrics:
    """Metrics of one worker, and totals of all workers that share `rows`. Thread-safe."""

    def __init__(self, protocols: Sequence[str] = (), rows: Any = None, worker: int = 0) -> None:
        self._labels = {name: values for name, (_, _, values) in _COUNTERS.items()} | {"connections": tuple(protocols)}
        names = [f"{name}:{label}" for name, labels in self._labels.items() for label in labels]
        names += [*_GAUGES, *_INTERNAL]
        names += [f"{name}:{part}" for name in _HISTOGRAMS for part in (*LATENCY_BUCKETS, "+Inf", "sum")]
        self._columns = {name: index for index, name in enumerate(names)}
        self._rows = np.frombuffer(shared_rows(1) if rows is None else rows, np.float64).reshape(-1, _NUM_COLUMNS)
        self._row = self._rows[worker]
        self._lock = threading.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(self)
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
        return generate_latest(self._registry).decode()

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
