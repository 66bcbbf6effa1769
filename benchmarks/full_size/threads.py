"""One thread beside two, with native kernels at full size: time, and whether the numbers are equal.

    python -m u2moe.benchmarks.full_size.native FOLDER --threads

measures it. Both take turns in each round, in streaming chunks and with full context. What two threads can gain at most
is measured beside it: how fast this machine reads memory, and multiplies, with one and with two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from u2moe.benchmarks.instruments.rates import BEYOND_CACHE, best_rate, measure_rates, read_rate
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios, timed
from u2moe.benchmarks.instruments.workload import Frames, audio_seconds, one_round
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.targets import Target
from u2moe.runtime.model.model import Model

NUM_THREADS = (1, 2)
ROUNDS = {"streaming": 9, "full": 7}
TITLES = {"streaming": "streaming", "full": "full context"}
LEAST_GAIN = 1.8


def measure_threads(
    load: Callable[[int], Model], frames: Frames, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Time of one model with one thread and with two.

    Args:
        load: loads the model with a number of threads.
        frames: features of an utterance [frames, mel].
        progress: called with a line for each step.

    Returns:
        seconds: of each round, by mode and number of threads; equal: whether all outputs are the same to the last bit.
    """
    models = {str(number): load(number) for number in NUM_THREADS}
    seconds: dict[str, dict[str, list[float]]] = {}
    is_equal = True
    for mode, rounds in ROUNDS.items():
        runs = {number: one_round(mode, model, frames) for number, model in models.items()}
        first, *others = (np.concatenate([np.atleast_2d(part) for part in run()]) for run in runs.values())
        is_equal = is_equal and all(np.array_equal(first, other) for other in others)
        own = {number: timed(run) for number, run in runs.items()}
        seconds[mode] = interleaved(own, rounds, title=mode, progress=progress)
    return {"seconds": seconds, "equal": is_equal}


def measure_rates_of_threads(progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """What `measure_rates` finds with one thread and with two, of memory beyond every cache."""
    return {str(number): measure_rates([BEYOND_CACHE], number, progress=progress) for number in NUM_THREADS}


def threads_table(titles: Mapping[str, str], found: Mapping[str, Any]) -> str:
    """A table of `measure_threads` for several cases, with their titles."""
    rows = []
    for case, own in found.items():
        for mode, seconds in own["seconds"].items():
            factors = [
                quartiles(Spread.of([value / audio_seconds(mode) for value in seconds[str(number)]]), 4)
                for number in NUM_THREADS
            ]
            gain = quartiles(_gain(own, mode))
            rows.append([f"{TITLES[mode]}: {titles[case]}", *factors, gain, "yes" if own["equal"] else "no"])
    return table(("real-time factor", "one thread", "two threads", "times as fast", "equal"), rows)


def gains_of_rates(rates: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast two threads "read" and "multiply", of `measure_rates_of_threads`."""
    return {name: two / one for name, (one, two) in _speeds(rates).items()}


def rates_table(rates: Mapping[str, Any]) -> str:
    """A table of `measure_rates_of_threads`."""
    titles = {
        "read": "reading weights, GB/s",
        "multiply": "int8 products in the cache, billion multiply-adds/s",
    }
    rows = [
        [titles[name], f"{1e-9 * one:.1f}", f"{1e-9 * two:.1f}", f"{two / one:.2f}"]
        for name, (one, two) in _speeds(rates).items()
    ]
    return table(("what the machine can do", "one thread", "two threads", "times as fast"), rows)


def _speeds(rates: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Bytes read and multiply-adds per second with one thread and with two."""
    one, two = (rates[str(number)] for number in NUM_THREADS)
    return {
        "read": (read_rate(one, BEYOND_CACHE), read_rate(two, BEYOND_CACHE)),
        "multiply": (best_rate(one, "integer"), best_rate(two, "integer")),
    }


def threads_targets(where: str, titles: Mapping[str, str], found: Mapping[str, Any]) -> list[Target]:
    """How much two threads must gain, for each case and mode."""
    return [
        Target(
            name=f"{where}: gain of two threads, {titles[case]}, {TITLES[mode]}",
            found=_gain(own, mode), limit=LEAST_GAIN, at_most=False,
        )
        for case, own in found.items()
        for mode in own["seconds"]
    ]  # fmt: skip


def _gain(own: Mapping[str, Any], mode: str) -> Spread:
    one, two = (own["seconds"][mode][str(number)] for number in NUM_THREADS)
    return ratios(one, two)
