"""The values that pages show from the report of `u2moe bench` on the demo model. Measures nothing.

`u2moe bench --output benchmarks/results/bench.json --plots docs/results/bench` measures and draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from u2moe.benchmarks.bench.terminal import Report, describe
from u2moe.runtime import Bundle
from u2moe.runtime.places import DEMO_FOLDER

_CHUNK_SIZE = 16
_BOARD_MB, _BOARD_BILLIONS = 2000, 5
"""Megabytes read and billions of products per second of the imagined board on the page "Beyond Python"."""


def values(report: Report) -> dict[str, str]:
    """The tables as the terminal shows them, and their main numbers: with full context, and in chunks of 16."""
    first = report["plan"]["threads"][0]
    speed = {entry["mode"]: entry for entry in report["speed"] if entry["threads"] == first}
    bound = {entry["mode"]: entry for entry in report["bound"] if entry["threads"] == first}
    (footprint,) = report["footprint"].values()
    found = {"table": f"```text\n{describe(report)}\n```"}
    for name, mode in (("full", "full context"), ("chunks", "chunk 16, left 4")):
        found[f"rtf_{name}"] = f"{speed[mode]['real_time_factor']['median']:.4f}"
        found[f"bound_{name}"] = f"{bound[mode]['whole']['ratio']:.1f}"
    found |= needs(bound["chunk 16, left 4"])
    found["start_ms"] = f"{1e3 * (footprint['verify_s']['median'] + footprint['load_s']['median']):.0f}"
    found["peak_mb"] = f"{footprint['peak_bytes']['median'] / 1e6:.0f}"
    return found


def needs(entry: Mapping[str, Any]) -> dict[str, str]:
    """What the demo model needs in chunks of 16: megabytes of weights, keys and values read, and billions of products.

    Args:
        entry: of the bound, see `bound.compare`.
    """
    manifest = Bundle.open(DEMO_FOLDER).manifest
    features, config = manifest.features, manifest.model
    num_frames = 1 + int((entry["audio_s"] - features.frame_length_ms / 1000) / features.frame_shift_ms * 1000)
    num_chunks = math.ceil(((num_frames - config.window) // config.subsampling_rate + 1) / _CHUNK_SIZE)

    def total(parts: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
        items = list(parts)
        products = sum(part["integer_multiply_adds"] + part["float_multiply_adds"] for part in items)
        return sum(part["bytes"] for part in items) / 1e6, products / 1e9

    first_pass = total(part for name, part in entry["parts"].items() if name != "decoder")
    both = total(entry["parts"].values())
    megabytes, billions = (value / entry["audio_s"] for value in both)
    return {
        "chunk_mb": f"{first_pass[0] / num_chunks:.1f}",
        "chunk_billions": f"{first_pass[1] / num_chunks:.2f}",
        "second_mb": f"{megabytes:.1f}",
        "second_billions": f"{billions:.2f}",
        "board_percent": f"{100 * (megabytes / _BOARD_MB + billions / _BOARD_BILLIONS):.1f}",
    }
