"""The results of `full_size` as Markdown, with ratios and the targets that were set for them. Measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from u2moe.benchmarks.artefacts import PRECISIONS
from u2moe.benchmarks.full_size import LARGE, MIXTURE, MODELS, MODES, NAMES, SMALL, Cell, all_cells
from u2moe.benchmarks.measurement import Spread
from u2moe.benchmarks.utterances import CHUNK_S, NUM_CHUNKS, NUM_HYPOTHESES, NUM_STREAMS, NUM_TOKENS, audio_seconds

TITLES = {
    "streaming": "streaming",
    "streaming-8": f"streaming, batch of {NUM_STREAMS}",
    "full": "full context",
    "second-pass": "second pass",
}
MEMORY_FACTOR, MEMORY_MB = 1.15, 300
TARGETS_HEADER = ["| target (int8, one thread) | found | limit | |", "|---|---|---|---|"]


def spread(results: Mapping[str, Any], cell: Cell, model: str) -> Spread:
    """Median and quartiles of the real-time factor of a cell; of the second pass, of its seconds."""
    seconds = results["cells"][cell.key][model]["seconds"]
    scale = 1.0 if cell.mode == "second-pass" else audio_seconds(cell.mode)
    return Spread.of([value / scale for value in seconds])


def ratio(results: Mapping[str, Any], cell: Cell, model: str, other: str) -> float:
    """How many times as long `model` takes as `other`: the median of the ratios of the rounds, which were in turn."""
    rounds = results["cells"][cell.key]
    pairs = zip(rounds[model]["seconds"], rounds[other]["seconds"], strict=True)
    return float(statistics.median(own / others for own, others in pairs))


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound that was set beforehand, and what was found."""

    name: str
    found: float
    limit: float
    at_most: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it was kept."""
        return self.found <= self.limit if self.at_most else self.found >= self.limit


def targets(results: Mapping[str, Any]) -> list[Target]:
    """All targets whose cells have been measured: int8, one thread."""
    measured = {mode: Cell(precision="int8", num_threads=1, mode=mode) for mode in MODES}
    measured = {mode: cell for mode, cell in measured.items() if cell.key in results["cells"]}
    found: list[Target] = []
    for mode, limit in (("streaming", 2.1), ("full", 1.55)):
        if mode in measured:
            value = ratio(results, measured[mode], MIXTURE, SMALL)
            name = f"RTF of MoE-1B / Dense-225M, {TITLES[mode]}"
            found.append(Target(name=name, found=value, limit=limit, at_most=True))
    if "full" in measured:
        value = ratio(results, measured["full"], LARGE, MIXTURE)
        found.append(Target(name="MoE-1B faster than Dense-1B, full context", found=value, limit=2.5, at_most=False))
    if "second-pass" in measured:
        value = 1e3 * spread(results, measured["second-pass"], MIXTURE).median
        found.append(Target(name="second pass of MoE-1B", found=value, limit=200, at_most=True, unit=" ms"))
    if {"streaming", "streaming-8"} <= measured.keys():
        alone, together = (spread(results, measured[mode], MIXTURE).median for mode in ("streaming", "streaming-8"))
        name = f"throughput of {NUM_STREAMS} streams of MoE-1B in a batch / one at a time"
        found.append(Target(name=name, found=alone / together, limit=1.4, at_most=False))
    if "start" in measured:
        found += _start_targets(results["cells"][measured["start"].key])
    return found


def _start_targets(cell: Mapping[str, Any]) -> list[Target]:
    found = []
    for name, item in cell.items():
        seconds = item["verify_s"]["median"] + item["load_s"]["median"]
        limit = MEMORY_FACTOR * item["disk"]["files"] / 1e6 + MEMORY_MB
        peak = item["peak_bytes"]["median"] / 1e6
        found += [
            Target(name=f"{NAMES[name]}: to check and load", found=seconds, limit=3, at_most=True, unit=" s"),
            Target(name=f"{NAMES[name]}: peak memory", found=peak, limit=limit, at_most=True, unit=" MB"),
        ]
    return found


TEXT = f"""Measured on {{machine}}. Million parameters: {{parameters}}.
The layer sizes are ours, since the paper does not tell its own, and the weights are random: their routing is nearly
uniform, the worst case for a mixture of experts, which then reads nearly all experts for every chunk.

Median real-time factor of encoder and CTC head, quartiles in brackets; features and search are left out. Streaming:
chunks of 16 frames ({CHUNK_S:g} s) with 4 chunks left, {NUM_CHUNKS["streaming"]} chunks in steady state. Full context:
ten seconds of people's speech. Second pass: {NUM_HYPOTHESES} hypotheses of {NUM_TOKENS} tokens over these. Ratios are
medians of the ratios of single rounds, in which the models took turns.
"""


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown, with the targets."""
    machine = results["machine"]
    text = TEXT.format(
        machine=f"{machine['processor']}, onnxruntime {machine['onnxruntime']}, commit {machine['commit']}",
        parameters=", ".join(f"{NAMES[name]} {number / 1e6:.0f}" for name, number in results["parameters"].items()),
    )
    header = ("", "threads", *NAMES.values(), "MoE-1B / Dense-225M", "MoE-1B / Dense-1B")
    lines = [text, f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    measured = [cell for cell in all_cells() if cell.key in results["cells"] and cell.mode != "start"]
    lines += [_row(results, cell) for cell in measured]
    lines += [
        "",
        *_experts_lines(results),
        "",
        *_start_table(results),
        "",
        "| target (int8, one thread) | found | limit | |",
        "|---|---|---|---|",
    ]
    for item in targets(results):
        sign = "≤" if item.at_most else "≥"
        verdict = "met" if item.met else "**not met**"
        lines.append(
            f"| {item.name} | {_short(item.found)}{item.unit} | {sign} {_short(item.limit)}{item.unit} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _row(results: Mapping[str, Any], cell: Cell) -> str:
    spreads = [spread(results, cell, name) for name in MODELS]
    if cell.mode == "second-pass":
        shown = [f"{1e3 * item.median:.0f} ms ({1e3 * item.low:.0f}-{1e3 * item.high:.0f})" for item in spreads]
    else:
        shown = [f"{item.median:.4f} ({item.low:.4f}-{item.high:.4f})" for item in spreads]
    ratios = [f"{ratio(results, cell, MIXTURE, other):.2f}" for other in (SMALL, LARGE)]
    return f"| {cell.precision}, {TITLES[cell.mode]} | {cell.num_threads} | {' | '.join((*shown, *ratios))} |"


def _experts_lines(results: Mapping[str, Any]) -> list[str]:
    """How many experts a chunk touches, with random weights and with trained ones."""
    lines = []
    for title, modes in results["experts"].items():
        for mode, item in modes.items():
            lines.append(
                f"Of {item['num_experts']} experts of a layer, a chunk ({mode}) of people's speech touches "
                f"{item['touched']:.1f} in {title} (entropy of the load {item['load_entropy']:.2f} of 1)."
            )
    return lines


def _start_table(results: Mapping[str, Any]) -> list[str]:
    """Load times and memory."""
    lines = [
        "| fresh process, one thread | bundle | check of sha256 | sessions | memory then | at its peak |",
        "|---|---|---|---|---|---|",
    ]
    for precision in reversed(PRECISIONS):
        key = Cell(precision=precision, num_threads=1, mode="start").key
        for name, item in results["cells"].get(key, {}).items():
            seconds = [f"{item[part]['median']:.2f} s" for part in ("verify_s", "load_s")]
            sizes = [item["disk"]["files"], item["loaded_bytes"]["median"], item["peak_bytes"]["median"]]
            bundle, *memory = [f"{size / 1e6:.0f} MB" for size in sizes]
            lines.append(f"| {NAMES[name]}, {precision} | {' | '.join((bundle, *seconds, *memory))} |")
    return lines
