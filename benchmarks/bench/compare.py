"""Compare two reports of `u2moe bench`: compute ratios, and mark differences that exceed the spread."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.plan import FEWEST_ROUNDS, FORMAT, VERSION
from u2moe.benchmarks.bench.terminal import MEMORY, STARTS, Report, count_threads, in_order, spread, table
from u2moe.benchmarks.instruments.statistics import Spread, ratio_of_spreads, ratio_of_sums

Values = dict[tuple[str, ...], Mapping[str, float]]

_MACHINE = ("processor", "usable_cores", "onnxruntime", "u2moe", "commit", "system", "python", "numpy")
_SECTIONS = (
    *("machine", "plan", "providers", "audio", "bundles", "kernels"),
    *("speed", "latency", "footprint", "experts", "rates", "bound"),
)
_FACTORS = ("real-time factor", "core-hours / hour", "word errors")  # measurements that have no unit
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

    The times are those with the fewest threads, in the first bundle's first mode that the second bundle also has. This
    is usually full context. If the bundles have no mode in common, each bundle's first mode counts, and the text names
    both modes. Within one report, the interval is a 95 % confidence interval. Otherwise, it comes from quartiles, and
    does not account for changes of the machine between the reports.
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
    """Return two bundles, each with its report: the first of `report`, and its second or the first of `other`.

    Raise ValueError if `report` has only one bundle and `other` is None.
    """
    pair = [(report, 0), (report, 1) if other is None else (other, 0)]
    if any(place >= len(source["bundles"]) for source, place in pair):
        raise ValueError("a ratio needs two bundles, or a bundle and a report")
    return [(source, list(source["bundles"])[place]) for source, place in pair]


def compare_reports(before: Report, after: Report) -> Iterator[str]:
    """Yield the conditions that differ, one per line, then a table of the measurements that both reports contain.

    The table begins with the measurements that differ. Its ratios are medians of `after` divided by those of `before`.
    Two measurements differ if the ranges between their quartiles do not overlap. Even without a change, times
    vary from run to run. With fewer than four rounds, quartiles are too uncertain for a comparison. Sizes and word
    errors have no spread.
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
