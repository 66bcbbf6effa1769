"""Repeated measurements in turn, reported as median and spread, never as a single time."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Measured = TypeVar("Measured")


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
        """The spread of at least one value."""
        if not values:
            raise ValueError("a spread needs at least one value")
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median=median, low=low, high=high, count=len(values))

    def data(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)


def interleaved(
    cases: Mapping[Key, Callable[[], Measured]],
    repetitions: int,
    *,
    warm_up: int = 1,
    title: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[Key, list[Measured]]:
    """Call all cases in turn, again and again: A B A B and not A A B B.

    Other load on the machine and changes of its clock rate then affect all of them alike.

    Args:
        cases: what to call, by name.
        repetitions: how often each is measured.
        warm_up: rounds before those, whose results are discarded.
        title: prefix of the progress lines.
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


def mean_seconds(call: Callable[[], object], at_least: float) -> float:
    """Seconds per call: the mean over enough calls to take `at_least` seconds in total."""
    count, begin = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - begin
        if elapsed >= at_least:
            return elapsed / count
