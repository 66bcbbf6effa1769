"""The targets for full-size models in int8 on one thread. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator

from u2moe.benchmarks.full_size.cells import (
    AS_ROUTED,
    BOUNDS,
    LARGE,
    MIXTURE,
    NAMES,
    SMALL,
    TITLES,
    Results,
    cell_of,
    encoder_ratio,
    ratio,
    spread,
)
from u2moe.benchmarks.instruments.statistics import Spread, spread_of
from u2moe.benchmarks.instruments.workload import NUM_HYPOTHESES, NUM_STREAMS, UTTERANCE_S
from u2moe.benchmarks.results.targets import Target

MEMORY_FACTOR, MEMORY_MB = 1.15, 300
"""Memory limit of a process: a multiple of its bundle's size, plus a number of megabytes."""


def targets(results: Results) -> list[Target]:
    """All targets whose cells have been measured."""
    return [*_ratios(results), *_bounds(results), *_second_pass(results), *_starts(results)]


def _ratios(results: Results) -> Iterator[Target]:
    for mode, limit in (("streaming", 2.1), ("streaming-8", 2.1), ("full", 1.55)):
        cell = cell_of(results, mode)
        for model, how in ((MIXTURE, "even routing"), (AS_ROUTED, "routed as the demo model")):
            if model in cell:
                name = f"RTF of MoE-1B / Dense-225M, {TITLES[mode]}, {how}"
                yield Target(name=name, found=ratio(cell, model, SMALL), limit=limit, at_most=True)
    if cell := cell_of(results, "full"):
        name = "RTF of Dense-1B / MoE-1B, full context"
        yield Target(name=name, found=ratio(cell, LARGE, MIXTURE), limit=2.5, at_most=False)


def _bounds(results: Results) -> Iterator[Target]:
    for mode in BOUNDS:
        if cell := cell_of(results, mode):
            name = f"encoder of MoE-1B / its bound, {TITLES[mode]}"
            yield Target(name=name, found=encoder_ratio(cell[MIXTURE]), limit=1.5, at_most=True)


def _second_pass(results: Results) -> Iterator[Target]:
    """And the gain of a batch."""
    if cell := cell_of(results, "second-pass"):
        found = Spread.of([1e3 * seconds for seconds in cell[MIXTURE]["seconds"]])
        name = f"second pass of MoE-1B, {UTTERANCE_S:g} s, {NUM_HYPOTHESES} hypotheses"
        yield Target(name=name, found=found, limit=200, at_most=True, unit=" ms")
    alone, together = cell_of(results, "streaming"), cell_of(results, "streaming-8")
    if alone and together:
        one, eight = spread(alone, "streaming", MIXTURE), spread(together, "streaming-8", MIXTURE)
        found = Spread(
            median=one.median / eight.median, low=one.low / eight.high, high=one.high / eight.low, count=one.count
        )  # from two cells: the widest range that their quartiles allow
        name = f"throughput of {NUM_STREAMS} streams of MoE-1B in a batch / one"
        yield Target(name=name, found=found, limit=1.4, at_most=False)


def _starts(results: Results) -> Iterator[Target]:
    for name, item in cell_of(results, "start").items():
        limit = MEMORY_FACTOR * item["disk"]["files"] / 1e6 + MEMORY_MB
        start, peak = spread_of(item["start_s"]), spread_of(item["peak_bytes"], 1e-6)
        yield Target(name=f"{NAMES[name]}: check and load", found=start, limit=3, at_most=True, unit=" s")
        yield Target(name=f"{NAMES[name]}: peak memory", found=peak, limit=limit, at_most=True, unit=" MB")
