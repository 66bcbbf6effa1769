"""The values that pages show from the full-size results. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from u2moe.benchmarks.full_size.cells import (
    AS_DEMO,
    AS_ROUTED,
    BOUNDS,
    DEMO,
    ENCODER_PARTS,
    EVEN,
    LARGE,
    MIXTURE,
    NAMES,
    OWN,
    SMALL,
    TITLES,
    Cell,
    Results,
    all_cells,
    cell_of,
    encoder_parts,
    encoder_ratio,
    ratio,
    spread,
)
from u2moe.benchmarks.full_size.models import PRECISIONS
from u2moe.benchmarks.full_size.targets import targets
from u2moe.benchmarks.instruments.statistics import spread_of
from u2moe.benchmarks.instruments.workload import CHUNK_S
from u2moe.benchmarks.results.markdown import quartiles, short, table

__all__ = ["targets", "values"]

RATIOS = {
    (MIXTURE, SMALL): "MoE-1B / Dense-225M",
    (AS_ROUTED, SMALL): "so routed / Dense-225M",
    (MIXTURE, LARGE): "MoE-1B / Dense-1B",
}
RATES = ("integer", "float", "read")


def values(results: Results) -> dict[str, str]:
    """Tables of times, of bounds and of starts, and the numbers that prose and targets need."""
    return {
        "table": _times(results),
        "bounds": _bounds(results),
        "starts": _starts(results),
        **_ratios(results),
        **_models(results),
        **_routings(results),
        **_limits(results),
    }


def _times(results: Results) -> str:
    rows = []
    for cell in all_cells():
        measured = results["cells"].get(cell.key)
        if measured and cell.mode in TITLES and cell.mode not in BOUNDS:
            rows.append(_row(cell, measured))
    return table(("", "threads", *NAMES.values(), *RATIOS.values()), rows)


def _row(cell: Cell, measured: Mapping[str, Any]) -> list[object]:
    digits, unit = (3, " s") if cell.mode == "second-pass" else (4, "")
    times = [quartiles(spread(measured, cell.mode, name), digits) + unit if name in measured else "" for name in NAMES]
    shares = [quartiles(ratio(measured, *pair)) if measured.keys() >= set(pair) else "" for pair in RATIOS]
    return [f"{cell.precision}, {TITLES[cell.mode]}", cell.num_threads, *times, *shares]


def _bounds(results: Results) -> str:
    """Times of the encoder's parts, and their ratios to the bounds."""
    columns = [
        (f"{NAMES[name]}, {TITLES[mode]}", entry, 1e3 * _per_chunk(mode, entry))
        for mode in BOUNDS
        for name, entry in cell_of(results, mode).items()
    ]
    rows = [
        [part.replace("_", " "), *(_part(entry["parts"].get(part), scale) for _, entry, scale in columns)]
        for part in ENCODER_PARTS
    ]
    whole = [
        f"{quartiles(spread_of(entry['stages']['encoder'], scale), 1)}, {encoder_ratio(entry).median:.2f}"
        for _, entry, scale in columns
    ]
    rates = [" / ".join(f"{entry['rates'][kind] / 1e9:.0f}" for kind in RATES) for _, entry, _ in columns]
    return table(("part", *(title for title, *_ in columns)), [*rows, ["whole", *whole], ["rates", *rates]])


def _per_chunk(mode: str, entry: Mapping[str, Any]) -> float:
    """Factor from a time to that of one chunk; 1 with full context."""
    return float(CHUNK_S / entry["audio_s"]) if mode == "bound-streaming" else 1.0


def _part(part: Mapping[str, Any] | None, scale: float) -> str:
    if part is None:
        return ""
    return short(scale * part["seconds"]) + (f", {part['ratio']:.2f}" if part["ratio"] else "")


def _starts(results: Results) -> str:
    """Load times and memory."""
    rows = []
    for precision in reversed(PRECISIONS):
        for name, item in cell_of(results, "start", precision).items():
            shown = [f"{item['disk']['files'] / 1e6:.0f}"]
            shown += [quartiles(spread_of(item[part])) for part in ("verify_s", "load_s")]
            shown += [quartiles(spread_of(item[part], 1e-6), 0) for part in ("loaded_bytes", "peak_bytes")]
            rows.append([f"{NAMES[name]}, {precision}", *shown])
    header = ("fresh process, one thread", "bundle, MB", "sha256, s", "sessions, s", "memory then, MB", "at its peak")
    return table(header, rows)


def _ratios(results: Results) -> dict[str, str]:
    """Ratios of real-time factors: `streaming.even` and so on, and for a dense model of the same size."""
    found = {}
    for mode in ("streaming", "streaming-8", "full"):
        if cell := cell_of(results, mode):
            found[f"{mode}.even"] = f"{ratio(cell, MIXTURE, SMALL).median:.2f}"
            found[f"{mode}.dense_1b"] = f"{ratio(cell, LARGE, MIXTURE).median:.2f}"
            if AS_ROUTED in cell:
                found[f"{mode}.as_demo"] = f"{ratio(cell, AS_ROUTED, SMALL).median:.2f}"
    return found


def _models(results: Results) -> dict[str, str]:
    """Millions of parameters, and the costs of the export."""
    found = {name: f"{number / 1e6:.0f}" for name, number in results["parameters"].items()}
    for export in results["exports"].values():
        found |= {
            "export_s": f"{export['cpu_s']:.0f}",
            "export_gb": f"{export['peak_bytes'] / 1e9:.1f}",
            "export_parity": export["said"],
        }
    return found


def _routings(results: Results) -> dict[str, str]:
    """Experts used by a chunk, and entropies of the load."""
    names = {OWN: "own", EVEN: "even", AS_DEMO: "as_demo", DEMO: "demo"}
    found = {}
    for title, item in results["routings"].items():
        found[f"touched.{names[title]}"] = f"{item['touched']:.1f}"
        found[f"entropy.{names[title]}"] = f"{item['load_entropy']:.2f}"
    return found


def _limits(results: Results) -> dict[str, str]:
    """What limits streaming: reading experts, and products that first read and then multiply; and full context."""
    bound, streaming, full = (cell_of(results, name) for name in ("bound-streaming", "streaming", "bound-full"))
    if not bound or not streaming or not full:
        return {}
    arithmetic = {
        name: sum(part["arithmetic_s"] for part in encoder_parts(full[name]).values()) for name in (SMALL, MIXTURE)
    }
    entry, parts = bound[MIXTURE], encoder_parts(bound[MIXTURE])
    touched = results["routings"][EVEN]["touched"] / results["routings"][OWN]["touched"]
    read_s = parts["feed_forward"]["read_s"] * touched * _per_chunk("bound-streaming", entry)
    dense_s, mixture_s = (spread(streaming, "streaming", name).median * CHUNK_S for name in (SMALL, MIXTURE))
    least_s = sum(part["least_s"] for part in parts.values())
    return {
        "read_ms": f"{1e3 * read_s:.0f}",
        "chunk_ms": f"{1e3 * mixture_s:.0f}",
        "read_rate": f"{entry['rates']['read'] / 1e9:.0f}",
        "read_share": f"{read_s / dense_s:.2f}",
        "arithmetic": f"{arithmetic[MIXTURE] / arithmetic[SMALL]:.2f}",
        "in_turn": f"{sum(part['arithmetic_s'] + part['read_s'] for part in parts.values()) / least_s:.2f}",
        "above.feed_forward": f"{(parts['feed_forward']['seconds'] - parts['feed_forward']['least_s']) / least_s:.2f}",
    }
