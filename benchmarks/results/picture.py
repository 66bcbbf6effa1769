"""The picture at the top of the project's README, from the JSON files beside this one. Measures nothing.

python -m u2moe.benchmarks.results.picture
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.plots import require_matplotlib
from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.benchmarks.instruments.workload import audio_seconds
from u2moe.benchmarks.results.files import read_json, repository, results_file
from u2moe.benchmarks.results.provenance import kind_of
from u2moe.benchmarks.studies.full_size import cell_of, spread
from u2moe.benchmarks.studies.native import DENSE, INT4, INT8
from u2moe.benchmarks.studies.shared.random_models import LARGE, MIXTURE, SMALL
from u2moe.benchmarks.studies.shared.script import run_script

PICTURE = Path("docs/images/speed.png")
"""In a clone."""
PANELS = {"streaming": "streaming, chunks of 0.64 s", "full": "whole utterances of 10 s"}
_TORCH = "torch eager, WeNet's loop over experts"
_OURS, _MIXTURE, _OTHERS = "#8fb3d9", "#0b5394", "#b7b7b7"

Axes = Any  # matplotlib has no types of its own


@dataclass(frozen=True)
class Bar:
    """One row: what runs, its real-time factor, and the colour of who made it."""

    label: str
    factor: Spread
    colour: str


def bars(mode: str) -> list[Bar]:
    """The rows of one panel, from top to bottom.

    Ours and torch are the encoder and the CTC head alone. sherpa-onnx is timed from samples to text, which adds its
    features and its greedy search: some percent at this size.
    """
    sizes = cell_of(read_json(results_file("full_size")), mode)
    torch_s = read_json(results_file("same_weights"))["cells"][f"torch/{mode}"][_TORCH]["seconds"]
    sherpa = read_json(results_file("sherpa"))["cells"][f"dense-225m/{mode}"]
    return [
        *_native(mode),
        Bar("MoE-1B, u2moe int8", spread(sizes, mode, MIXTURE), _MIXTURE),
        Bar("Dense-225M, u2moe int8", spread(sizes, mode, SMALL), _OURS),
        Bar("Dense-1B, u2moe int8", spread(sizes, mode, LARGE), _OURS),
        Bar(
            "Dense-225M, sherpa-onnx int8",
            Spread.of([seconds / sherpa["audio_s"] for seconds in sherpa["sherpa-onnx"]["seconds"]]),
            _OTHERS,
        ),
        Bar("MoE-1B, torch (WeNet) fp32", Spread.of([value / audio_seconds(mode) for value in torch_s]), _OTHERS),
    ]


def _native(mode: str) -> list[Bar]:
    """Rows of native kernels, if they were measured on the machine of the other rows."""
    machine = kind_of(read_json(results_file("full_size"))["machine"])
    found = [
        content["seconds"][mode]
        for content in read_json(results_file("native"))["machines"].values()
        if kind_of(content["machine"]) == machine
    ]
    return [
        Bar(
            f"{name}, native kernels {case.precision}",
            Spread.of([value / audio_seconds(mode) for value in seconds[case.key]]),
            colour,
        )
        for seconds in found[-1:]
        for name, case, colour in (
            ("MoE-1B", INT4, _MIXTURE),
            ("MoE-1B", INT8, _MIXTURE),
            ("Dense-225M", DENSE, _OURS),
        )
    ]


def draw(file: Path) -> None:
    """Write the picture.

    Raises:
        U2moeError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415 - not everybody has it

    figure = Figure(figsize=(9, 1.2 + 0.4 * len(bars("full"))), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (mode, title) in zip(panels, PANELS.items(), strict=True):
        _panel(axes, title, bars(mode))
    panels[0].invert_yaxis()
    machine = read_json(results_file("full_size"))["machine"]
    figure.suptitle("Seconds of one processor core for a second of speech: less is better", fontsize=11)
    figure.supxlabel(
        f"One thread of an {machine['processor']} with AVX-512 VNNI, onnxruntime {machine['onnxruntime']}. "
        "Random weights; sizes are ours.",
        fontsize=7,
        color="0.35",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _panel(axes: Axes, title: str, rows: list[Bar]) -> None:
    places = range(len(rows))
    widths = [row.factor.median for row in rows]
    drawn = axes.barh(places, widths, color=[row.colour for row in rows], height=0.7)
    axes.bar_label(drawn, fmt="%.3f", padding=3, fontsize=9)
    axes.set_yticks(places, [row.label for row in rows], fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.set_xlim(0, max(widths) * 1.15)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """The command line."""
    draw(repository() / PICTURE)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    run_script(main)
