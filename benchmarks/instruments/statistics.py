"""Statistics of repeated measurements besides their spread, which is in `quantize.tuning.measurement`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.quantize.tuning.measurement import Spread, interleaved

__all__ = [
    "NUM_DRAWN", "PERCENTILES", "Spread", "differs", "interleaved", "percentiles", "ratio_of_sums", "ratios",
    "spread_of", "timed",
]  # fmt: skip

PERCENTILES = (50, 90, 95, 99)
NUM_DRAWN = 2000


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p95, p99 (linear between neighbours), the largest as max, and the number of values as count."""
    if not values:
        raise ValueError("percentiles need at least one value")
    result = {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}
    return {**result, "max": float(max(values)), "count": len(values)}


def differs(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two spreads, as JSON, really differ: their quartiles do not overlap."""
    return bool(before["high"] < after["low"] or after["high"] < before["low"])


def spread_of(found: Mapping[str, Any], scale: float = 1.0) -> Spread:
    """A spread from JSON, in another unit."""
    return Spread(**{name: scale * found[name] for name in ("median", "low", "high")}, count=found["count"])


def ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Ratios of values to others of the same rounds, in which the two took turns."""
    return Spread.of([value / other for value, other in zip(values, others, strict=True)])


def ratio_of_sums(values: npt.ArrayLike, others: npt.ArrayLike) -> Spread:
    """The sum of values over the sum of others of the same recordings [n], with its 95 % interval as low and high.

    Recordings are drawn again and again, the same ones for both (paired bootstrap).

    Raises:
        ValueError: the sum of the others is 0.
    """
    above, below = np.asarray(values), np.asarray(others)
    if not below.sum():
        raise ValueError("a ratio of sums needs others whose sum is not 0")
    drawn = np.random.default_rng(0).integers(len(above), size=(NUM_DRAWN, len(above)))
    of_draws = above[drawn].sum(axis=1) / np.maximum(below[drawn].sum(axis=1), 1)
    low, high = np.quantile(of_draws, (0.025, 0.975)).tolist()
    return Spread(median=float(above.sum() / below.sum()), low=low, high=high, count=NUM_DRAWN)


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """A function that calls another and returns the seconds it took."""

    def seconds() -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return seconds
