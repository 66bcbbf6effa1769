"""Plots of a report of `u2moe bench`, one question each. Needs matplotlib, which the extra `plots` installs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.terminal import MEMORY, STARTS, WAITS, Report, count_threads, in_order
from u2moe.benchmarks.instruments.operators import PARTS
from u2moe.runtime.errors import U2moeError
from u2moe.runtime.installation import install_command

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
"""The palette of Okabe and Ito, safe for any colour vision; a bundle, stage or group keeps its colour."""
_PERCENTILES = {"p50": "o", "p90": "D", "p95": "s", "p99": ">"}
_SINCE = {
    "first_partial_s": "from the start of the first word to a result that shows one",
    "word_s": "from the end of a word until it is shown to stay",
    "finalisation_s": "from the end of the last word to the final result",
}
_GROUPS_SHOWN = 6
_WIDTH = 8.0
_ROW = 0.24
"""Inches: the width of all plots, and the height of a row."""

Axes = Any  # matplotlib has no types of its own
Entry = Mapping[str, Any]


def require_matplotlib() -> None:
    """Check that matplotlib is installed, before anything is measured.

    Raises:
        U2moeError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise U2moeError(f"plots need matplotlib: {install_command('plots')}") from error


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw the plots for which a report has data, as PNG files in an existing folder; returns the files.

    Args:
        report: a report of `u2moe bench`.
        folder: where to write them.

    Raises:
        U2moeError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415 - not everybody has it

    plots = {
        "speed": _speed,
        "stages": _stages,
        "chunks": _chunks,
        "waits": _waits,
        "footprint": _footprint,
        "experts": _experts,
        "bound": _bound,
    }
    files = []
    for name, plot in plots.items():
        figure = Figure(layout="constrained", dpi=100)
        if plot(figure, report):
            figure.suptitle(_machine(report), fontsize=7, color="0.4", x=0.99, ha="right")
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1])
    return files


def _machine(report: Report) -> str:
    machine = report["machine"]
    commit = f" {machine['commit']}" if machine["commit"] else ""
    return f"{machine['processor']}, onnxruntime {machine['onnxruntime']}, u2moe {machine['u2moe']}{commit}"


def _speed(figure: Any, report: Report) -> bool:
    """Real-time factor of each mode, for each bundle and number of threads."""
    entries = in_order(report)
    modes = list(dict.fromkeys(entry["mode"] for entry in entries))
    series = list(dict.fromkeys((entry["threads"], entry["bundle"]) for entry in entries))
    figure.set_size_inches(_WIDTH, 1.2 + len(modes) * (0.1 + 0.17 * len(series)))
    axes, height, bundles = figure.subplots(), 0.84 / len(series), list(report["bundles"])
    shades = _shades([threads for threads, _ in series])
    for place, (threads, bundle) in enumerate(series):
        found = {entry["mode"]: entry["real_time_factor"] for entry in entries
                 if (entry["threads"], entry["bundle"]) == (threads, bundle)}  # fmt: skip
        rows = [modes.index(mode) + (place + 0.5) * height - 0.42 for mode in found]
        _bars(axes, rows, list(found.values()), height, color=_colour(bundles, bundle), alpha=shades[threads],
              label=f"{bundle}, {count_threads(threads)}")  # fmt: skip
    axes.set_yticks(range(len(modes)), modes)
    axes.invert_yaxis()
    _label(axes, "real-time factor, end to end: seconds of work per second of audio (median, quartiles)")
    _legend(figure, axes, columns=len(bundles))
    return True


def _stages(figure: Any, report: Report) -> bool:
    """Where the time goes: a stacked bar for each mode and bundle, with the first number of threads."""
    entries = [entry for entry in report["speed"] if entry["threads"] == report["plan"]["threads"][0]]
    stages = list(entries[0]["shares"])
    figure.set_size_inches(_WIDTH, 1.4 + _ROW * len(entries))
    axes = figure.subplots()
    ends = [0.0] * len(entries)
    for colour, stage in zip((*_COLOURS[: len(stages) - 1], _COLOURS[-1]), stages, strict=True):
        values = [entry["stages"][stage]["median"] * 1e3 for entry in entries]
        axes.barh(range(len(entries)), values, 0.8, left=ends, label=stage, color=colour)
        ends = [before + value for before, value in zip(ends, values, strict=True)]
    _rows(axes, entries)
    _label(axes, f"milliseconds of work per second of audio, {count_threads(entries[0]['threads'])}")
    _legend(figure, axes, columns=len(stages))
    return True


def _chunks(figure: Any, report: Report) -> bool:
    """Percentiles of the chunk latency and the budget, at full speed and in real time."""
    first = report["plan"]["threads"][0]
    kinds = {
        "at full speed": [item for item in report["speed"] if "chunk_latency_s" in item and item["threads"] == first],
        "in real time": [item for item in report["latency"] if "chunk_latency_s" in item],
    }
    kinds = {kind: entries for kind, entries in kinds.items() if entries}
    if not kinds:
        return False
    sizes = [len(entries) + 1 for entries in kinds.values()]
    figure.set_size_inches(_WIDTH, 1.4 + _ROW * sum(sizes) + 0.3 * len(sizes))
    panels = figure.subplots(len(kinds), squeeze=False, sharex=True, height_ratios=sizes)[:, 0]
    for axes, (kind, entries) in zip(panels, kinds.items(), strict=True):
        rows = range(len(entries))
        found = [entry["chunk_latency_s"] for entry in entries]
        axes.hlines(rows, [item["p50"] * 1e3 for item in found], [item["p99"] * 1e3 for item in found], color="0.7")
        for colour, (name, marker) in zip(_COLOURS, _PERCENTILES.items(), strict=False):
            axes.plot([item[name] * 1e3 for item in found], rows, marker, color=colour, markersize=5, label=name)
        budgets = [entry["chunk_budget_s"] * 1e3 for entry in entries]
        axes.plot(budgets, rows, "k|", markersize=12, markeredgewidth=2, label="budget: the next chunk")
        axes.set_xscale("log", subs=())
        axes.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.xaxis.set_major_formatter("{x:g}")
        _rows(axes, entries)
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.set_title(kind, fontsize=9, loc="left")
        axes.grid(axis="x", which="both", alpha=0.2)
    _label(panels[-1], f"chunk latency, ms, {count_threads(first)}")
    _legend(figure, panels[0], columns=5)
    return True


def _waits(figure: Any, report: Report) -> bool:
    """The wait in real time: audio that must arrive first, and compute."""
    entries = report["latency"]
    waits = {name: title for name, title in WAITS.items() if any(name in entry for entry in entries)}
    if not waits:
        return False
    figure.set_size_inches(_WIDTH, 1.2 + len(waits) * (0.4 + _ROW * len(entries)))
    panels = figure.subplots(len(waits), squeeze=False, sharex=True)[:, 0]
    for axes, (name, title) in zip(panels, waits.items(), strict=True):
        able = [entry for entry in entries if name in entry]
        rows = range(len(able))
        audio, compute = ([entry[name][kind]["p50"] * 1e3 for entry in able] for kind in ("algorithmic", "compute"))
        axes.barh(rows, audio, 0.7, color="0.8", label="audio that must come first")
        axes.barh(rows, compute, 0.7, left=audio, color=_COLOURS[0], label="compute")
        for row, waited, worked in zip(rows, audio, compute, strict=True):
            axes.text(waited + worked, row, f" {waited:.0f} + {worked:.1f}", va="center", fontsize=8)
        _rows(axes, able)
        axes.margins(x=0.15)
        axes.set_title(f"{title}: {_SINCE[name]}", fontsize=9, loc="left")
    _label(panels[-1], f"ms in real time, medians, {count_threads(entries[0]['threads'])}")
    _legend(figure, panels[0], columns=2)
    return True


def _footprint(figure: Any, report: Report) -> bool:
    """Bytes on disk by group, memory, and start-up time."""
    names, found = list(report["footprint"]), list(report["footprint"].values())
    figure.set_size_inches(_WIDTH, 4.2 + 3 * _ROW * len(names))
    disk, memory, start = figure.subplots(3)
    every: dict[str, int] = {}
    for entry in found:
        for group, size in entry["disk"]["groups"].items():
            every[group] = every.get(group, 0) + size
    groups = sorted(every, key=lambda group: -every[group])[:_GROUPS_SHOWN]
    stacks = {
        group.replace("_", " "): [entry["disk"]["groups"].get(group, 0) / 1e6 for entry in found] for group in groups
    }
    shown = [sum(values) for values in zip(*stacks.values(), strict=True)]
    stacks["all else"] = [entry["disk"]["files"] / 1e6 - size for entry, size in zip(found, shown, strict=True)]
    _stack(disk, names, stacks)
    _label(disk, "MB on disk")
    times = {title: [entry[key]["median"] * 1e3 for entry in found] for key, title in STARTS.items()}
    _stack(start, names, times)
    _label(start, "ms of a fresh process until it has recognised its first recording")
    height = 0.8 / len(MEMORY)
    for place, (key, title) in enumerate(MEMORY.items()):
        able = [(row, entry[key]) for row, entry in enumerate(found) if key in entry]
        rows = [row + (place + 0.5) * height - 0.4 for row, _ in able]
        _bars(memory, rows, [value for _, value in able], height, scale=1e-6, color=_COLOURS[place], label=title)
    memory.set_yticks(range(len(names)), names)
    memory.invert_yaxis()
    _label(memory, "MB of memory, largest until then (median, quartiles)")
    for axes in (disk, memory, start):
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return True


def _stack(axes: Axes, names: Sequence[str], stacks: Mapping[str, Sequence[float]]) -> None:
    ends = [0.0] * len(names)
    for colour, (label, values) in zip(_COLOURS, stacks.items(), strict=False):
        axes.barh(range(len(names)), values, 0.7, left=ends, color=colour, label=label)
        ends = [before + value for before, value in zip(ends, values, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def _experts(figure: Any, report: Report) -> bool:
    """Each expert's share of the choices, by layer, in the last mode, for each bundle with experts."""
    found = [(name, *list(modes.items())[-1]) for name, modes in report["experts"].items() if modes]
    if not found:
        return False
    rows = max(len(entry["load"]) for _, _, entry in found)
    figure.set_size_inches(max(_WIDTH / 2, 1.5 + 3.4 * len(found)), 1.6 + 0.2 * rows)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    most = max(share for _, _, entry in found for shares in entry["load"].values() for share in shares)
    for axes, (name, mode, entry) in zip(panels, found, strict=True):
        image = axes.imshow(list(entry["load"].values()), vmin=0, vmax=most, aspect="auto", cmap="Blues")
        touched, entropy = entry["touched"]["layers"], entry["load_entropy"]["layers"]
        labels = [f"{_layer(layer)}   {touched[layer]:.1f}   {entropy[layer]:.2f}" for layer in entry["load"]]
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set_xticks(range(entry["num_experts"]))
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(f"{name}, {mode}", fontsize=8, loc="left")
        axes.text(-0.05, 1.01, "layer, touched, entropy", transform=axes.transAxes, ha="right", va="bottom", fontsize=6)
    figure.supxlabel("expert\ntouched: how many a chunk touches, mean\nentropy: of the load, 1 is even", fontsize=8)
    bar = figure.colorbar(image, ax=panels.tolist())
    bar.set_label("share of a layer's choices", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return True


def _layer(name: str) -> str:
    """A short name: "3 macaron" for encoder.encoders.3.feed_forward_macaron."""
    block, _, layer = name.removeprefix("encoder.encoders.").partition(".")
    return f"{block} {'macaron' if layer.endswith('macaron') else 'second' if layer else ''}".strip()


def _bound(figure: Any, report: Report) -> bool:
    """Time of each part and its lower bound, for each mode and bundle, with the first number of threads."""
    if not report["bound"]:
        return False
    threads = report["bound"][0]["threads"]
    entries = [entry for entry in report["bound"] if entry["threads"] == threads]
    columns = min(2, len(entries))
    lines = -(-len(entries) // columns)
    figure.set_size_inches(_WIDTH, 1.2 + 2.3 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, entry in zip(panels, entries, strict=False):
        _bound_of(axes, entry)
    for axes in panels[len(entries) - columns : len(entries)]:
        _label(axes, f"ms per second of audio, {count_threads(threads)}")
    for axes in panels[len(entries) :]:
        axes.set_axis_off()
    _legend(figure, panels[0], columns=3)
    return True


def _bound_of(axes: Axes, entry: Entry) -> None:
    parts = {part: entry["parts"][part] for part in PARTS if part in entry["parts"]}
    scale, rows = 1e3 / entry["audio_s"], range(len(parts))
    axes.barh(rows, [part["seconds"] * scale for part in parts.values()], 0.8, color="0.85", label="time taken")
    for key, colour, shift in (("arithmetic_s", _COLOURS[0], -0.18), ("read_s", _COLOURS[1], 0.18)):
        values = [part[key] * scale for part in parts.values()]
        label = f"the least for {'arithmetic' if key == 'arithmetic_s' else 'reading memory'}"
        axes.barh([row + shift for row in rows], values, 0.36, color=colour, label=label)
    for row, part in zip(rows, parts.values(), strict=True):
        if part["ratio"]:
            end = max(part["seconds"], part["least_s"]) * scale
            axes.text(end, row, f" {part['ratio']:.1f} x", va="center", fontsize=7)
    axes.set_yticks(rows, [part.replace("_", " ") for part in parts], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.tick_params(axis="x", labelsize=8)
    title = f"{entry['bundle']}, {entry['mode']}: {entry['whole']['ratio']:.1f} times the bound"
    axes.set_title(title, fontsize=8, loc="left")


def _bars(
    axes: Axes, rows: Sequence[float], spreads: Sequence[Mapping[str, float]], height: float, *, scale: float = 1.0,
    **style: Any,
) -> None:  # fmt: skip
    """Bars for medians, lines for quartiles."""
    medians = [value["median"] * scale for value in spreads]
    below = [(value["median"] - value["low"]) * scale for value in spreads]
    above = [(value["high"] - value["median"]) * scale for value in spreads]
    axes.barh(rows, medians, height, xerr=(below, above), error_kw={"ecolor": "0.2", "elinewidth": 1}, **style)


def _shades(threads: Sequence[int]) -> dict[int, float]:
    """Opacity by number of threads: one is the darkest."""
    numbers = sorted(set(threads))
    return {number: 1.0 - 0.6 * place / len(numbers) for place, number in enumerate(numbers)}


def _colour(names: Sequence[str], name: str) -> str:
    return _COLOURS[names.index(name) % len(_COLOURS)]


def _rows(axes: Axes, entries: Sequence[Entry]) -> None:
    """A line for each entry, the first on top."""
    several = len({entry["bundle"] for entry in entries}) > 1
    labels = [f"{entry['mode']}: {entry['bundle']}" if several else entry["mode"] for entry in entries]
    axes.set_yticks(range(len(entries)), labels, fontsize=8)
    axes.set_ylim(len(entries) - 0.5, -0.5)


def _label(axes: Axes, text: str) -> None:
    axes.set_xlabel(text, fontsize=9)
    axes.tick_params(labelsize=8)


def _legend(figure: Any, axes: Axes, columns: int) -> None:
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, ncols=columns, loc="outside lower center", frameon=False)
