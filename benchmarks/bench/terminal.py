"""Tables of a `u2moe bench` report for a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from u2moe.benchmarks.instruments.operators import PARTS
from u2moe.runtime.installation import install_command

Report = Mapping[str, Any]

WAITS = {"first_partial_s": "first partial", "word_s": "word", "first_word_s": "first word"}
WAITS |= {"last_word_s": "last word", "committed_s": "committed", "finalisation_s": "final"}
STARTS = {"import_s": "import", "verify_s": "verify", "load_s": "load", "first_s": "first recording"}
MEMORY = {"imported_bytes": "imported", "loaded_bytes": "loaded", "peak_bytes": "peak"}  # titles of a report's keys

_CHUNKS = ["mode", "threads", "bundle", "p50", "p90", "p95", "p99", "budget", "late"]


def describe(report: Report) -> str:
    """Return all tables of a report as text."""
    sections = (_head, _speed, _chunks, _latency, _footprint, _experts, _bound)
    return "\n".join(line for section in sections for line in section(report))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table. The first column is aligned left, the others right."""
    content = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*content, strict=True)]
    lines = []
    for first, *others in content:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def spread(value: Mapping[str, float], scale: float = 1.0, digits: int = 1) -> str:
    """Return the median and quartiles in `value` as text, for example "12.0 (11.5-12.9)"."""
    median, low, high = (f"{value[key] * scale:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def count_threads(count: int) -> str:
    """Return "1 thread", "2 threads" and so on."""
    return "1 thread" if count == 1 else f"{count} threads"


def _head(report: Report) -> Iterator[str]:
    machine, plan = report["machine"], report["plan"]
    caches = ", ".join(f"{level} {size / 1024:.0f} KB" for level, size in machine["caches"].items())
    memory = f"{machine['memory_bytes'] / 1e9:.1f} GB" if machine["memory_bytes"] else "memory unknown"
    version = f" ({machine['processor_version']})" if machine["processor_version"] else ""
    cores = f"{machine['usable_cores']} of {machine['num_cores']} cores"
    yield ", ".join(part for part in (machine["processor"] + version, cores, caches, memory) if part)
    yield f"instruction sets: {' '.join(machine['instruction_sets']) or 'unknown'}"
    commit = f" ({machine['commit']})" if machine["commit"] else ""
    software = f"{machine['system']}, Python {machine['python']}, onnxruntime {machine['onnxruntime']}"
    yield f"{software}, u2moe {machine['u2moe']}{commit}, {', '.join(report['providers'])}"
    files, seconds = report["audio"]["files"], report["audio"]["seconds"]
    rounds = f"{plan['warm_up']} warm-up round, then {plan['repetitions']}: medians (quartiles)"
    yield f"{report['time']}, recordings: {len(files)}, {seconds:.1f} s in total, {rounds}"
    if (used := report.get("other_cores")) is not None and used > 0.2:
        yield f"other processes used {used:.1f} cores during the run: measure again on an idle machine"
    if chosen := report.get("decoding"):
        yield f"decoding: {', '.join(f'{name} {value}' for name, value in chosen.items())}"
    if left_out := report["left_out"]:
        yield f"not measured without onnx-ir: {', '.join(left_out)}; to install it: {install_command('tools')}"
    if packed := report["without_bound"]:
        yield f"no bound for {', '.join(packed)}: products of packed weights cannot be counted"
    yield from (f"{name}: {reason}" for name, reason in report.get("fixed_shapes", {}).items())
    for name, bundle in report["bundles"].items():
        about = [bundle["recipe"], f"{report['footprint'][name]['disk']['files'] / 1e6:.1f} MB"]
        if numbers := report.get("costs", {}).get(name, {}).get("parameters"):
            total, active = numbers["total"] / 1e6, numbers["active"] / 1e6
            about.append(f"{total:.1f} million parameters ({active:.1f} active for a token)")
        yield f"{name}: {', '.join(about)}, kernels: {report['kernels'][name]['description']}"


def _speed(report: Report) -> Iterator[str]:
    entries, stages = in_order(report), list(report["speed"][0]["shares"])
    head = ["mode", "threads", "bundle", "real-time factor", "RTFx", "core-hours / hour", *stages]
    rows = []
    for entry in entries:
        factor = entry["real_time_factor"]
        times = [spread(factor, 1, 4), f"{1 / factor['median']:.0f}", spread(entry["core_hours_per_hour"], 1, 4)]
        rows.append([*where(entry), *times, *(f"{entry['shares'][stage]:.0%}" for stage in stages)])
    if any("words" in entry for entry in entries):
        head.append("word errors")
        rows = [[*row, f"{entry['words']['rate']:.1%}"] for row, entry in zip(rows, entries, strict=True)]
    if any(entry.get("energy_wh_per_hour") for entry in entries):
        head += ["Wh / hour", "words / joule"]
        for row, entry in zip(rows, entries, strict=True):
            found = [entry.get(key) for key in ("energy_wh_per_hour", "words_per_joule")]
            row += [spread(value, 1, 3) if value else "-" for value in found]
    yield from ("", "Speed end to end, and share of each stage", *table(head, rows))
    missing = [entry["energy_missing"] for entry in report["speed"] if entry.get("energy_missing")]
    yield from (f"energy not measured: {reason}" for reason in dict.fromkeys(missing))


def _chunks(report: Report) -> Iterator[str]:
    rows = [[*_of_chunks(entry), *_milliseconds(entry["finalisation_s"], "p50", "p90")] for entry in in_order(report)]
    title = "Latency at full speed, ms: chunk, its budget and share of late chunks; end of input to final result"
    yield from ("", title, *table([*_CHUNKS, "final p50", "p90"], rows))


def _latency(report: Report) -> Iterator[str]:
    rows = []
    for entry in report["latency"]:
        shares = [f"{entry[name]:.0%}" if name in entry else "-" for name in ("flicker", "revised")]
        rows.append([*_of_chunks(entry), *(_wait(entry.get(name)) for name in WAITS), *shares])
    if rows:
        title = "Latency in real time, ms: chunk; the user's waits (audio still to arrive + computation)"
        yield from ("", title, *table([*_CHUNKS, *WAITS.values(), "flicker", "revised"], rows))


def _of_chunks(entry: Mapping[str, Any]) -> list[str]:
    if chunk := entry.get("chunk_latency_s"):
        budget = [f"{entry['chunk_budget_s'] * 1e3:.0f}", f"{chunk['late']:.1%}"]
        return [*where(entry), *_milliseconds(chunk, "p50", "p90", "p95", "p99"), *budget]
    return [*where(entry), *["-"] * 6]


def _wait(wait: Mapping[str, Any] | None) -> str:
    return f"{wait['algorithmic']['p50'] * 1e3:.0f} + {wait['compute']['p50'] * 1e3:.1f}" if wait else "-"


def _footprint(report: Report) -> Iterator[str]:
    rows = []
    for name, entry in report["footprint"].items():
        memory = [f"{entry[key]['median'] / 1e6:.0f}" if key in entry else "-" for key in MEMORY]
        rows.append([name, *(spread(entry[key], 1e3, 0) for key in STARTS), *memory])
    title = "Fresh process: start in ms, and peak memory so far in MB"
    yield from ("", title, *table(["bundle", *STARTS.values(), *MEMORY.values()], rows))


def _experts(report: Report) -> Iterator[str]:
    rows = []
    for name, modes in report["experts"].items():
        for mode, entry in modes.items():
            layers, entropies = (entry[key]["layers"].values() for key in ("touched", "load_entropy"))
            used = f"{entry['touched']['mean']:.1f} ({min(layers):.1f}-{max(layers):.1f}) of {entry['num_experts']}"
            sizes = [entry["bytes_touched"]["p50"], entry["bytes_touched"]["p95"], entry["bytes"]]
            entropy = f"{entry['load_entropy']['mean']:.2f} ({min(entropies):.2f}-{max(entropies):.2f})"
            rows.append([mode, name, used, *(f"{size / 1e6:.2f}" for size in sizes), entropy])
    if rows:
        title = "Experts used by a chunk: mean (least - most) of the layers; with full context a recording is a chunk"
        yield from ("", title)
        yield from table(["mode", "bundle", "used per layer", "MB p50", "p95", "of all", "load entropy"], rows)


def _bound(report: Report) -> Iterator[str]:
    for rates in report["rates"]:
        products = rates["multiply_adds_per_s"]
        best = {kind: spread(products[kind]["sizes"][products[kind]["best"]], 1e-9, 0) for kind in products}
        reads = rates["read_bytes_per_s"].items()
        shown = ", ".join(f"{spread(value, 1e-9)} from {int(size) / 1e6:.0f} MB" for size, value in reads)
        shown = f"integer {best['integer']}, float {best['float']}; reading GB/s, {shown}"
        yield from ("", f"{count_threads(rates['threads'])}: 10^9 multiply-adds/s, {shown}")
        yield "Graphs: ms per second of audio, and ratio to the bound of this machine"
        entries = [entry for entry in report["bound"] if entry["threads"] == rates["threads"]]
        parts = [part for part in PARTS if any(part in entry["parts"] for entry in entries)]
        yield from table(["mode", "bundle", *parts, "whole", "bound"], [_bound_row(entry, parts) for entry in entries])
        for entry in entries:
            name = f"{entry['bundle']}, {entry['mode']}"
            if left_out := [f"{name} ({share:.0%} of the time)" for name, share in entry["not_counted"].items()]:
                yield f"{name}: operators not included in the bound: {', '.join(left_out)}"
            if entry["unknown"]:
                yield f"{name}: products of unknown parts, counted as other: {', '.join(entry['unknown'])}"


def _bound_row(entry: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    scale, whole = 1e3 / entry["audio_s"], entry["whole"]
    found = [entry["parts"].get(part) for part in parts]
    cells = [f"{part['seconds'] * scale:.2f}{_times(part['ratio'])}" if part else "-" for part in found]
    total = f"{spread(whole['seconds'], scale, 2)}{_times(whole['ratio'])}"
    return [entry["mode"], entry["bundle"], *cells, total, f"{whole['least_s'] * scale:.2f}"]


def _times(ratio: float | None) -> str:
    """Return the ratio to the bound as text, or spaces for a part without products, which has no bound."""
    return f" {ratio:5.1f}x" if ratio else "       "


def in_order(report: Report) -> list[Mapping[str, Any]]:
    """Return the entries of `speed` sorted by number of threads. Ties stay in order of measurement."""
    return sorted(report["speed"], key=lambda entry: int(entry["threads"]))


def where(entry: Mapping[str, Any]) -> list[str]:
    """Return the cells that identify an entry: mode, number of threads, and bundle."""
    return [entry["mode"], str(entry["threads"]), entry["bundle"]]


def _milliseconds(values: Mapping[str, float], *names: str) -> list[str]:
    return [f"{values[name] * 1e3:.1f}" for name in names]
