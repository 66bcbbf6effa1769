"""Repeated measurements in turn, and their statistics: medians and spreads, never a single time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Key = TypeVar("Key", bound=Hashable)
Measured = TypeVar("Measured")

PERCENTILES = (50, 90, 95, 99)
NUM_DRAWN = 2000


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The distribution of repeated measurements.

    Attributes:
        median: the median.
        low: first quartile, interpolated; `high`: third quartile.
        count: number of measurements.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median=median, low=low, high=high, count=len(values))

    def data(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)


def show_progress(line: str) -> None:
    """Show a line of progress on stderr."""
    print(f"- {line}", file=sys.stderr, flush=True)


def interleaved(
    cases: Mapping[Key, Callable[[], Measured]], repetitions: int, *, warm_up: int = 1, title: str = "measurements"
) -> dict[Key, list[Measured]]:
    """Call all cases in turn, again and again: A B A B and not A A B B.

    Other load on the machine and changes of its clock rate then affect all of them alike.

    Args:
        cases: what to call, by name.
        repetitions: how often each is measured.
        warm_up: rounds before those, whose results are discarded.
        title: prefix of the lines of progress, one for each round.

    Returns:
        What the calls returned, in the order of the rounds.
    """
    results: dict[Key, list[Measured]] = {key: [] for key in cases}
    begin = time.monotonic()
    for number in range(-warm_up, repetitions):
        done, elapsed = number + warm_up, time.monotonic() - begin
        left = f", {elapsed / done * (repetitions - number):.0f} s left" if done else ""
        show_progress(f"{title}: " + ("warm-up" if number < 0 else f"round {number + 1} of {repetitions}") + left)
        for key, call in cases.items():
            measured = call()
            if number >= 0:
                results[key].append(measured)
    return results


def mean_seconds(call: Callable[[], object], at_least: float) -> float:
    """Seconds per call: the mean over enough calls to take `at_least` seconds in total."""
    count, begin = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= at_least:
            return elapsed / count


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p95, p99 (linear between neighbours), the largest as max, to a millionth, and their number as count."""
    result = {f"p{q}": round(float(np.percentile(values, q)), 6) for q in PERCENTILES}
    return {**result, "max": round(float(max(values)), 6), "count": len(values)}


def spread_of(found: Mapping[str, Any], scale: float = 1.0) -> Spread:
    """Return a spread from JSON, scaled to another unit."""
    return Spread(**{name: scale * found[name] for name in ("median", "low", "high")}, count=found["count"])


def ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Ratios of values to others of the same rounds, in which the two took turns."""
    return Spread.of([value / other for value, other in zip(values, others, strict=True)])


def ratio_of_sums(values: npt.ArrayLike, others: npt.ArrayLike) -> Spread:
    """Return the ratio of two sums over the same recordings [n], with its 95 % interval as low and high.

    Recordings are drawn again and again, the same ones for both (paired bootstrap).

    Raises:
        ValueError: the sum of the others is 0.
    """
    above, below = np.asarray(values), np.asarray(others)
    if not below.sum():
        raise ValueError("a ratio of sums needs others whose sum is not 0")
    drawn = np.random.default_rng(0).integers(len(above), size=(NUM_DRAWN, len(above)))
    of_draws = above[drawn].sum(axis=1) / np.maximum(below[drawn].sum(axis=1), below[below > 0].min())
    low, high = np.quantile(of_draws, (0.025, 0.975)).tolist()
    return Spread(median=float(above.sum() / below.sum()), low=low, high=high, count=NUM_DRAWN)


def difference_of_rates(errors: npt.ArrayLike, others: npt.ArrayLike, sizes: npt.ArrayLike) -> Spread:
    """Errors minus others, over the sizes of the same recordings [n], with its 95 % interval; by paired bootstrap."""
    differences, lengths = np.asarray(errors) - np.asarray(others), np.asarray(sizes)
    drawn = np.random.default_rng(0).integers(len(lengths), size=(NUM_DRAWN, len(lengths)))
    of_draws = differences[drawn].sum(axis=1) / np.maximum(lengths[drawn].sum(axis=1), 1)
    low, high = np.quantile(of_draws, (0.025, 0.975)).tolist()
    return Spread(median=float(differences.sum() / max(lengths.sum(), 1)), low=low, high=high, count=NUM_DRAWN)


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that calls another and returns its seconds."""

    def seconds() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return seconds
