"""Repeated measurements in turn, and what is told of them: median and spread, never a single time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Measured = TypeVar("Measured")

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What repeated measurements of one thing gave.

    Attributes:
        median: the middle one.
        low: first quartile, between the values where it falls there; `high`: third quartile.
        count: how many there were.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if not values:
            raise ValueError("a spread needs at least one value")
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median=median, low=low, high=high, count=len(values))

    def data(self) -> dict[str, float]:
        """As it stands in JSON."""
        return asdict(self)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p95, p99 (linear between neighbours), the largest as max, and how many values there were."""
    if not values:
        raise ValueError("percentiles need at least one value")
    result = {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}
    return {**result, "max": float(max(values)), "count": len(values)}


def interleaved(
    cases: Mapping[Key, Callable[[], Measured]],
    repetitions: int,
    *,
    warm_up: int = 1,
    title: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[Key, list[Measured]]:
    """Call all cases in turn, again and again: A B A B and not A A B B.

    What else the machine does in the meantime, and how its clock rises and falls, then meets all of them alike.

    Args:
        cases: what to call, by name.
        repetitions: how often each is measured.
        warm_up: rounds before those, whose results are dropped.
        title: of the lines of progress.
        progress: called with a line for each round.

    Returns:
        What the calls returned, in the order of the rounds.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    results: dict[Key, list[Measured]] = {key: [] for key in cases}
    for number in range(-warm_up, repetitions):
        progress(f"{title}: " + ("warm-up" if number < 0 else f"round {number + 1} of {repetitions}"))
        for key, call in cases.items():
            measured = call()
            if number >= 0:
                results[key].append(measured)
    return results


def differs(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two spreads, as they stand in JSON, differ by more than they spread: their quartiles do not overlap."""
    return bool(before["high"] < after["low"] or after["high"] < before["low"])
