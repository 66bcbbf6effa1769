"""Compare two bundles or reports: ratios, differences that exceed the spread, and limits on costs."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.plan import FEWEST_ROUNDS, FORMAT, VERSION
from u2moe.benchmarks.bench.terminal import MEMORY, STARTS, Report, count_threads, in_order, spread, table
from u2moe.benchmarks.instruments.statistics import Spread, difference_of_rates, ratio_of_spreads, ratio_of_sums
from u2moe.runtime.cli.options import Options

Values = dict[tuple[str, ...], Mapping[str, float]]

_MACHINE = ("processor", "usable_cores", "onnxruntime", "u2moe", "commit", "system", "python", "numpy")
_SECTIONS = ["machine", "plan", "providers", "audio", "bundles", "kernels", "speed", "latency", "footprint", "experts"]
_SECTIONS += ["rates", "bound"]
_FACTORS = ("real-time factor", "core-hours / hour", "word errors")  # measurements that have no unit
_QUARTILES = ("median", "low", "high")
LIMITS = {
    "time": ("RATIO", "takes more than RATIO times as long as the second"),
    "words": ("POINTS", "has a word error rate more than POINTS percentage points higher"),
    "size": ("RATIO", "has more than RATIO times as many bytes as the second"),
    "memory": ("RATIO", "needs more than RATIO times as much memory as the second"),
}  # by kind of cost, the unit of a limit on it, and the end of the option's help
FLAGS = {name: f"--fail-above-{name}" for name in LIMITS} | {"time": "--fail-above"}
_WITHIN, _UNKNOWN = "within the spread", "too few rounds"


def read_report(file: Path) -> dict[str, Any]:
    """Read a saved report. Raise ValueError if the file is not a report of this version."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as a report: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT or report.get("version") != VERSION:
        raise ValueError(f"{file}: is not a report of this version of u2moe bench ({FORMAT} {VERSION})")
    if missing := [name for name in _SECTIONS if name not in report]:
        raise ValueError(f"{file}: is not a complete report of u2moe bench: {', '.join(missing)} missing")
    return report


def time_ratio(report: Report, other: Report | None = None) -> tuple[str, Spread]:
    """Return the ratio of the times of two bundles (see `compared`): as text, and as a number with an interval.

    docs/bench.md explains it. Without a common mode, each bundle's first mode counts, and the text names both modes.
    """
    ours, theirs = (
        [entry for entry in in_order(source) if entry["bundle"] == name] for source, name in compared(report, other)
    )
    pairs = ([one, two] for one in ours for two in theirs if one["mode"] == two["mode"])
    found = next(pairs, [ours[0], theirs[0]])
    if other is None:
        ratio = ratio_of_sums(*(entry["seconds"] for entry in found))
    else:
        ratio = ratio_of_spreads(*(entry["real_time_factor"] for entry in found))
    names = " / ".join(entry["bundle"] for entry in found)
    kind = "95 %" if other is None else "quartiles, not measured in turns"
    text = f"time {names} = {ratio.median:.3f} ({kind}: {ratio.low:.3f} to {ratio.high:.3f}), "
    text += " and ".join(dict.fromkeys(entry["mode"] for entry in found))
    return f"{text}, {count_threads(found[0]['threads'])}", ratio


def compared(report: Report, other: Report | None = None) -> list[tuple[Report, str]]:
    """Return the first bundle of `report`, and its second or the first of `other`, each with its report."""
    pair = [(report, 0), (report, 1) if other is None else (other, 0)]
    if any(place >= len(source["bundles"]) for source, place in pair):
        raise ValueError("a ratio needs two bundles, or a bundle and a report")
    return [(source, list(source["bundles"])[place]) for source, place in pair]


def compare_reports(before: Report, after: Report) -> Iterator[str]:
    """Yield the conditions that differ, then a table of measurements in both reports, first those that differ.

    Two measurements differ if the ranges between their quartiles do not overlap. Sizes and word errors have no spread.
    """
    conditions = [(name, before["machine"].get(name), after["machine"].get(name)) for name in _MACHINE]
    conditions += [(name, before.get(name, {}), after.get(name, {})) for name in ("providers", "plan", "decoding")]
    for old, new in zip(before["bundles"], after["bundles"], strict=False):
        for name, section, key in (("recipe", "bundles", "recipe"), ("kernels", "kernels", "description")):
            conditions.append((f"{name} of {new}", before[section][old][key], after[section][new][key]))
    yield from (f"{name}: {old} -> {new}" for name, old, new in conditions if old != new)
    if before["audio"] != after["audio"]:
        yield "the recordings differ, which may change times per second of audio"
    roles = dict(zip(before["bundles"], after["bundles"], strict=False))
    for name, new_name in roles.items():
        if name != new_name:
            yield f"{name} is compared with {new_name}, at the same position in the other report"
    old_values = {tuple(roles.get(part, part) for part in key): value for key, value in values(before).items()}
    new_values = values(after)
    both = [key for key in new_values if key in old_values]
    rows = [[", ".join(key), *_cells(key, old_values[key], new_values[key])] for key in both]
    rows.sort(key=lambda row: row[-1] in (_WITHIN, _UNKNOWN))
    yield from table(["measurement", "before", "after", "ratio", ""], rows)
    if missing := len(old_values.keys() ^ new_values.keys()):
        yield f"{missing} measurements are in only one of the reports"


def _cells(key: tuple[str, ...], before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    scale, digits = (1.0, 4) if key[0] in _FACTORS else (1e-6, 2) if key[0].endswith("MB") else (1e3, 2)

    def shown(value: Mapping[str, float]) -> str:
        return spread(value, scale, digits) if "count" in value else f"{value['median'] * scale:.{digits}f}"

    ratio = f"{after['median'] / before['median']:.3f}" if before["median"] else "-"
    verdict = "less" if after["high"] < before["low"] else "more" if before["high"] < after["low"] else _WITHIN
    has_few = min(before.get("count", math.inf), after.get("count", math.inf)) < FEWEST_ROUNDS
    return [shown(before), shown(after), ratio, _UNKNOWN if has_few else verdict]


def values(report: Report) -> Values:
    """Return every comparable measurement by name, bundle and conditions. Sizes are their own median and quartiles."""
    found: Values = {}
    for entry in in_order(report):
        key = (entry["bundle"], entry["mode"], count_threads(entry["threads"]))
        found["real-time factor", *key] = entry["real_time_factor"]
        found["core-hours / hour", *key] = entry["core_hours_per_hour"]
        found["final, ms", *key] = entry["finalisation_s"]["rounds"]
        if "chunk_latency_s" in entry:
            found["chunk, ms", *key] = entry["chunk_latency_s"]["rounds"]
        if "words" in entry:
            found["word errors", *key] = dict.fromkeys(_QUARTILES, entry["words"]["rate"])
    for entry in report["bound"]:
        key = (entry["bundle"], entry["mode"], count_threads(entry["threads"]))
        found["graphs, ms", *key] = entry["whole"]["seconds"]
    for name, entry in report["footprint"].items():
        found |= {(f"{title}, ms", name): entry[key] for key, title in STARTS.items()}
        found |= {(f"{title}, MB", name): entry[key] for key, title in MEMORY.items() if key in entry}
        found["on disk, MB", name] = dict.fromkeys(_QUARTILES, entry["disk"]["files"])
    return found


def add_limits(parser: Options, experts: Options) -> None:
    """Add an option for each limit. Only the limit on time appears in the short help."""
    for name, (unit, end) in LIMITS.items():
        about = f"exit with status 1 if the first {end}{'' if name == 'size' else ', beyond chance'}"
        place = parser if name == "time" else experts
        place.add_argument(FLAGS[name], dest=f"most_{name}", type=_number, metavar=unit, help=about)


def check_measurable(limits: Mapping[str, float], repetitions: int, transcripts: Sequence[str]) -> None:
    """Raise ValueError if a limit needs more than `repetitions` rounds, or needs transcripts but there are none."""
    if limits.keys() & {"time", "memory"} and repetitions < FEWEST_ROUNDS:
        raise ValueError(f"repetitions must be at least {FEWEST_ROUNDS} for a time or memory limit, got {repetitions}")
    if "words" in limits and not any(transcripts):
        raise ValueError(f"{FLAGS['words']} needs recordings with transcripts")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def verdicts(limits: Mapping[str, float], report: Report, other: Report | None = None) -> Iterator[tuple[bool, str]]:
    """Yield whether each limit passes (for words, in each mode), and a description. docs/bench.md explains limits.

    Raise ValueError if one of the two reports (see `compared`) lacks data for a limit, or has too few rounds.
    """
    for name, most in limits.items():
        least, scale, unit = (0.0, 100.0, " points") if name == "words" else (1.0, 1.0, "")
        for what, found in _costs(name, report, other):
            value, fails = found.median * scale, found.median * scale > most and found.low > least
            kind = "quartiles" if name == "memory" or (name == "time" and other is not None) else "95 %"
            interval = f" ({kind}: {found.low * scale:.3f} to {found.high * scale:.3f})" if found.count > 1 else ""
            relation = "more than" if fails else "within" if value <= most else "not significantly more than"
            yield not fails, f"{what}: {value:.3f}{unit}{interval}, {relation} {FLAGS[name]} {most:g}"


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
