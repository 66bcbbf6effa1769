"""Repeated measurements of several cases in turn, and statistics of the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Key = TypeVar("Key", bound=Hashable)
Measured = TypeVar("Measured")

NUM_DRAWN = 2000


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median and the interpolated quartiles of `count` repeated measurements."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of `values`, which must not be empty."""
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median=median, low=low, high=high, count=len(values))

    def data(self) -> dict[str, float]:
        """Return the spread as JSON data."""
        return asdict(self)


def show_progress(line: str) -> None:
    """Print a line of progress to stderr."""
    print(f"- {line}", file=sys.stderr, flush=True)


def interleaved(
    cases: Mapping[Key, Callable[[], Measured]], repetitions: int, *, warm_up: int = 1, title: str = "measurements"
) -> dict[Key, list[Measured]]:
    """Call cases in turn, A B A B, so that the clock rate and other processes affect all alike. Return the results."""
    results: dict[Key, list[Measured]] = {key: [] for key in cases}
    begin = time.monotonic()
    for number in range(-warm_up, repetitions) if cases else ():
        done, elapsed = number + warm_up, time.monotonic() - begin
        left = f", {elapsed / done * (repetitions - number):.0f} s left" if done else ""
        show_progress(f"{title}: " + ("warm-up" if number < 0 else f"round {number + 1} of {repetitions}") + left)
        for key, call in cases.items():
            measured = call()
            if number >= 0:
                results[key].append(measured)
    return results


def mean_seconds(call: Callable[[], object], at_least: float) -> float:
    """Return the mean seconds per call. Repeat the call until all calls together take `at_least` seconds."""
    count, begin = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= at_least:
            return elapsed / count


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p90, p95, p99 (interpolated) and max, with six decimal places, and the count."""
    result = {f"p{q}": round(float(np.percentile(values, q)), 6) for q in (50, 90, 95, 99)}
    return {**result, "max": round(float(max(values)), 6), "count": len(values)}


def spread_of(found: Mapping[str, Any], scale: float = 1.0) -> Spread:
    """Return a spread from JSON data. All values but `count` are multiplied by `scale`."""
    return Spread(**{name: scale * found[name] for name in ("median", "low", "high")}, count=found["count"])


def ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Divide two series of measurements round by round, and return the spread of the ratios."""
    return Spread.of([value / other for value, other in zip(values, others, strict=True)])


def ratio_of_sums(values: npt.ArrayLike, others: npt.ArrayLike) -> Spread:
    """Return the ratio of sums over the same recordings [n] with a 95 % interval (`_bootstrap`). Sums must not be 0."""
    above, below = np.asarray(values), np.asarray(others)
    if not below.sum():
        raise ValueError("a ratio needs a divisor other than 0: the values of the reference sum to 0")
    return _bootstrap(above, below, least=below[below > 0].min())


def ratio_of_spreads(one: Mapping[str, float], other: Mapping[str, float]) -> Spread:
    """Return the ratio of two medians, both spreads as JSON data. `low` and `high` are extreme ratios of quartiles."""
    low, high = one["low"] / other["high"], one["high"] / other["low"]
    return Spread(median=one["median"] / other["median"], low=low, high=high, count=int(one["count"]))


def difference_of_rates(errors: npt.ArrayLike, others: npt.ArrayLike, sizes: npt.ArrayLike) -> Spread:
    """Return sum(errors - others) / sum(sizes) over recordings [n], with a 95 % interval; see `_bootstrap`."""
    return _bootstrap(np.asarray(errors) - np.asarray(others), np.asarray(sizes), least=1)


def _bootstrap(above: npt.NDArray[Any], below: npt.NDArray[Any], least: float) -> Spread:
    """Return sum(above) / sum(below) with a 95 % interval from a paired bootstrap. Divisors are at least `least`."""
    drawn = np.random.default_rng(0).integers(len(above), size=(NUM_DRAWN, len(above)))
    of_draws = above[drawn].sum(axis=1) / np.maximum(below[drawn].sum(axis=1), least)
    low, high = np.quantile(of_draws, (0.025, 0.975)).tolist()
    return Spread(median=float(above.sum() / max(below.sum(), least)), low=low, high=high, count=NUM_DRAWN)


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that calls `call` and returns the seconds that the call took."""
    return partial(mean_seconds, call, 0.0)
