"""Limits on the costs of one bundle relative to another: time, word errors, size and memory."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from u2moe.benchmarks.bench.compare import compared, time_ratio
from u2moe.benchmarks.bench.plan import FEWEST_ROUNDS
from u2moe.benchmarks.bench.terminal import Report
from u2moe.benchmarks.instruments.statistics import Spread, difference_of_rates, ratio_of_spreads
from u2moe.runtime.cli.options import Options


class Limit(NamedTuple):
    """An option with a limit on one kind of cost: its flag, the unit of its value, and the end of its help text."""

    flag: str
    unit: str
    about: str


LIMITS = {
    "time": Limit("--fail-above", "RATIO", "takes more than RATIO times as long as the second"),
    "words": Limit("--fail-above-words", "POINTS", "has a word error rate more than POINTS percentage points higher"),
    "size": Limit("--fail-above-size", "RATIO", "has more than RATIO times as many bytes as the second"),
    "memory": Limit("--fail-above-memory", "RATIO", "needs more than RATIO times as much memory as the second"),
}


def add_limits(parser: Options, experts: Options) -> None:
    """Add an option for each limit. Only the limit on time appears in the short help."""
    for name, limit in LIMITS.items():
        about = f"exit with status 1 if the first {limit.about}{'' if name == 'size' else ', beyond chance'}"
        place = parser if name == "time" else experts
        place.add_argument(limit.flag, dest=f"most_{name}", type=_number, metavar=limit.unit, help=about)


def check_measurable(limits: Mapping[str, float], repetitions: int, transcripts: Sequence[str]) -> None:
    """Raise ValueError if a limit needs more than `repetitions` rounds, or needs transcripts but there are none."""
    if limits.keys() & {"time", "memory"} and repetitions < FEWEST_ROUNDS:
        raise ValueError(f"repetitions must be at least {FEWEST_ROUNDS} for a time or memory limit, got {repetitions}")
    if "words" in limits and not any(transcripts):
        raise ValueError(f"{LIMITS['words'].flag} needs recordings with transcripts")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def verdicts(limits: Mapping[str, float], report: Report, other: Report | None = None) -> Iterator[tuple[bool, str]]:
    """Yield a pair for each limit (for word errors, one for each mode): whether it passes, and a description.

    A limit also passes if the two bundles may have equal costs, according to the interval of their ratio or difference.
    It therefore rarely fails by chance. `report` and `other` have the two bundles; see `compared`. Raise ValueError if
    a report lacks data that a limit needs, or has too few rounds.
    """
    for name, most in limits.items():
        least, scale, unit = (0.0, 100.0, " points") if name == "words" else (1.0, 1.0, "")
        for what, found in _costs(name, report, other):
            value, fails = found.median * scale, found.median * scale > most and found.low > least
            kind = "quartiles" if name == "memory" or (name == "time" and other is not None) else "95 %"
            interval = f" ({kind}: {found.low * scale:.3f} to {found.high * scale:.3f})" if found.count > 1 else ""
            relation = "more than" if fails else "within" if value <= most else "not significantly more than"
            yield not fails, f"{what}: {value:.3f}{unit}{interval}, {relation} {LIMITS[name].flag} {most:g}"


def _costs(name: str, report: Report, other: Report | None) -> Iterator[tuple[str, Spread]]:
    """Yield the name of a cost and the ratio of the bundles' costs or, for words, the difference in each mode."""
    pair = compared(report, other)
    if name == "words":
        yield from _word_errors(report, pair)
        return
    footprints = [source["footprint"][bundle] for source, bundle in pair]
    if name == "size":
        one, two = (each["disk"]["files"] for each in footprints)
        yield name, Spread(median=one / two, low=one / two, high=one / two, count=1)
        return
    for (source, bundle), footprint in zip(pair, footprints, strict=True):
        if name == "memory" and "peak_bytes" not in footprint:
            raise ValueError(f"{bundle}: memory is unknown on this system")
        time = next(entry["real_time_factor"] for entry in source["speed"] if entry["bundle"] == bundle)
        count = (time if name == "time" else footprint["peak_bytes"])["count"]
        if count < FEWEST_ROUNDS:
            raise ValueError(f"{bundle}: measured in {count} rounds; a limit needs at least {FEWEST_ROUNDS}")
    memory = [each["peak_bytes"] for each in footprints] if name == "memory" else []
    yield name, ratio_of_spreads(*memory) if memory else time_ratio(report, other)[1]


def _word_errors(report: Report, pair: Sequence[tuple[Report, str]]) -> Iterator[tuple[str, Spread]]:
    if report["audio"] != pair[1][0]["audio"]:
        raise ValueError("word errors can only be compared on the same recordings")
    modes = []
    for source, name in pair:
        wanted = name, source["speed"][0]["threads"]
        entries = [entry for entry in source["speed"] if (entry["bundle"], entry["threads"]) == wanted]
        modes.append({entry["mode"]: entry.get("words", {}) for entry in entries})
    if not modes[0].keys() & modes[1].keys():
        raise ValueError("word errors can only be compared in the same mode, but the bundles have no mode in common")
    for mode in [mode for mode in modes[0] if mode in modes[1]]:
        one, two = (each[mode] for each in modes)
        if not {"errors", "lengths"} <= one.keys() & two.keys():
            raise ValueError("a report has no word errors per recording: measure again with transcripts")
        yield f"word errors, {mode}", difference_of_rates(one["errors"], two["errors"], one["lengths"])
