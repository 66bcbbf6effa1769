"""Compares two reports of `u2moe bench`: ratios, and which of them exceed the spread. Measures nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.plan import FORMAT, VERSION
from u2moe.benchmarks.bench.terminal import MEMORY, STARTS, Report, count_threads, in_order, spread, table
from u2moe.benchmarks.instruments.statistics import differs

Values = dict[tuple[str, ...], Mapping[str, float]]

_MACHINE = ("processor", "usable_cores", "onnxruntime", "u2moe", "commit", "system", "python", "numpy")
_SECTIONS = ("machine", "plan", "audio", "bundles", "speed", "latency", "footprint", "experts", "rates", "bound")
_FACTORS = ("real-time factor", "core-hours / hour", "word errors")
"""Measurements without a unit."""
_WITHIN, _UNKNOWN = "within the spread", "too few rounds"
_FEWEST_ROUNDS = 4


def read_report(file: Path) -> dict[str, Any]:
    """A saved report.

    Raises:
        ValueError: not a report, or one of another version; names the file.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as a report: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT or report.get("version") != VERSION:
        raise ValueError(f"{file}: is not a report of this version of u2moe bench ({FORMAT} {VERSION})")
    missing = [name for name in _SECTIONS if name not in report]
    if missing:
        raise ValueError(f"{file}: is not a whole report of u2moe bench: it has no {', '.join(missing)}")
    return report


def compare_reports(before: Report, after: Report) -> str:
    """A line for each measurement in both reports, those that differ first, and other differences between them.

    Ratios are of medians, after to before. A difference counts if the quartiles do not overlap, which is no proof: they
    are those of the rounds of one run, and a machine also varies from run to run. With fewer than four rounds there are
    no quartiles to speak of. Sizes and word errors have no spread.
    """
    return "\n".join(_lines(before, after))


def _lines(before: Report, after: Report) -> Iterator[str]:
    for name in _MACHINE:
        old, new = before["machine"].get(name), after["machine"].get(name)
        if old != new:
            yield f"{name}: {old} -> {new}"
    for name, (old, new) in _conditions(before, after).items():
        if old != new:
            yield f"{name}: {old} -> {new}"
    if before["audio"] != after["audio"]:
        yield "the recordings are not the same: times per second of audio may differ for that reason alone"
    old_values, new_values = values(before), values(after)
    if (names := _only_bundles(before, after)) and names[0] != names[1]:
        yield f"{names[0]} is compared with {names[1]}, the only bundle of each report"
        old_values = {
            tuple(names[1] if part == names[0] else part for part in key): old_values[key] for key in old_values
        }
    rows = [
        [", ".join(key), *_cells(key, old_values[key], found)] for key, found in new_values.items() if key in old_values
    ]
    rows.sort(key=lambda row: row[-1] in (_WITHIN, _UNKNOWN))
    yield from table(["measurement", "before", "after", "ratio", ""], rows)
    if missing := len(old_values.keys() ^ new_values.keys()):
        yield f"{missing} measurements are in only one of the reports"


def _conditions(before: Report, after: Report) -> dict[str, tuple[Any, Any]]:
    """What else the results depend on, in both reports; older reports lack some of it."""
    names = ("providers", "plan")
    found = {name: (_plain(before.get(name)), _plain(after.get(name))) for name in names}
    for bundle in before["bundles"].keys() & after["bundles"].keys():
        pair = (before, after)
        recipes = [report["bundles"][bundle]["recipe"] for report in pair]
        kernels = [report.get("kernels", {}).get(bundle, {}).get("description") for report in pair]
        found[f"recipe of {bundle}"] = (recipes[0], recipes[1])
        found[f"kernels of {bundle}"] = (kernels[0], kernels[1])
    return found


def _plain(value: Any) -> Any:
    """A value as it would be after it was saved."""
    return json.loads(json.dumps(value))


def _only_bundles(before: Report, after: Report) -> tuple[str, str] | None:
    names = [list(report["bundles"]) for report in (before, after)]
    return (names[0][0], names[1][0]) if all(len(own) == 1 for own in names) else None


def _cells(key: tuple[str, ...], before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    scale, digits = (1.0, 4) if key[0] in _FACTORS else (1e-6, 2) if key[0].endswith("MB") else (1e3, 2)
    shown = [
        spread(value, scale, digits) if "count" in value else f"{value['median'] * scale:.{digits}f}"
        for value in (before, after)
    ]
    ratio = f"{after['median'] / before['median']:.3f}" if before["median"] else "-"
    return [*shown, ratio, _verdict(before, after)]


def _verdict(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    if min(before.get("count", math.inf), after.get("count", math.inf)) < _FEWEST_ROUNDS:
        return _UNKNOWN
    if not differs(before, after):
        return _WITHIN
    return "less" if after["median"] < before["median"] else "more"


def values(report: Report) -> Values:
    """Every comparable measurement of a report, by its name, bundle, mode and threads.

    A value without spread, such as a size, is its own median and quartiles, without a count.
    """
    found: Values = {}
    for entry in in_order(report):
        key = (entry["bundle"], entry["mode"], count_threads(entry["threads"]))
        found["real-time factor", *key] = entry["real_time_factor"]
        found["core-hours / hour", *key] = entry["core_hours_per_hour"]
        found["final, ms", *key] = entry["finalisation_s"]["rounds"]
        if "chunk_latency_s" in entry:
            found["chunk, ms", *key] = entry["chunk_latency_s"]["rounds"]
        if "words" in entry:
            found["word errors", *key] = _exact(entry["words"]["rate"])
    for entry in report["bound"]:
        key = (entry["bundle"], entry["mode"], count_threads(entry["threads"]))
        found["graphs, ms", *key] = entry["whole"]["seconds"]
    for name, entry in report["footprint"].items():
        found |= {(f"{title}, ms", name): entry[key] for key, title in STARTS.items()}
        found |= {(f"{title}, MB", name): entry[key] for key, title in MEMORY.items() if key in entry}
        found["on disk, MB", name] = _exact(entry["disk"]["files"])
    return found


def _exact(value: float) -> dict[str, float]:
    return {"median": value, "low": value, "high": value}
