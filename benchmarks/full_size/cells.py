"""The full-size measurements: models, cases, and cells, each one setting for all models in turn; and their content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from u2moe.benchmarks.instruments.probe import Mode
from u2moe.benchmarks.instruments.statistics import Spread, ratios, spread_of
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, NUM_STREAMS, UTTERANCE_S, audio_seconds

MODELS = ("dense-225m", "moe-1b", "dense-1b")
SMALL, MIXTURE, LARGE = MODELS
ROUTED = "routed"
"""Suffix of a case of a model with experts: routers turned so that it is routed like the demo model."""
AS_ROUTED = f"{MIXTURE}/{ROUTED}"
OWN, EVEN, AS_DEMO, DEMO = "own routers, speech", "even", "as the demo model", "demo model, speech"
"""Kinds of routing."""

TIMED = ("streaming", "streaming-8", "full", "second-pass")
BOUNDS = {
    "bound-streaming": Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS),
    "bound-full": Mode(),
}
MODES = ("start", *TIMED, *BOUNDS)
"""`start`: a fresh process loads a model. `bound-...`: encoder and bound, with the models' own routers and speech. The
others are those of `utterances.one_round`, evenly routed."""
BOUND_S = {"bound-streaming": 5.0, "bound-full": UTTERANCE_S}
"""Seconds of speech; a profile has a line for each kernel of each chunk."""

NAMES = {SMALL: "Dense-225M", MIXTURE: "MoE-1B", AS_ROUTED: "MoE-1B, routed as the demo model", LARGE: "Dense-1B"}
TITLES = {
    "streaming": "streaming",
    "streaming-8": f"streaming, batch of {NUM_STREAMS}",
    "full": "full context",
    "second-pass": "second pass",
    "bound-streaming": "streaming",
    "bound-full": "full context",
}
ENCODER_PARTS = ("subsampling", "feed_forward", "attention", "convolution", "other")

Results = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting, measured for all models in turn.

    Attributes:
        precision: "fp32" or "int8".
        num_threads: threads of onnxruntime.
        mode: one of `MODES`.
    """

    precision: str
    num_threads: int
    mode: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.precision}/{self.num_threads}/{self.mode}"


def all_cells() -> list[Cell]:
    """All settings, those with targets first; float32 has no targets and takes minutes for a few starts."""
    modes = {("int8", 1): MODES, ("int8", 2): TIMED, ("fp32", 1): TIMED, ("fp32", 2): TIMED}
    return [
        Cell(precision=precision, num_threads=num_threads, mode=mode)
        for (precision, num_threads), own in modes.items()
        for mode in own
    ]


def cell_of(results: Results, mode: str, precision: str = "int8", num_threads: int = 1) -> Mapping[str, Any]:
    """The measurements in one setting, by model; empty if there are none."""
    key = Cell(precision=precision, num_threads=num_threads, mode=mode).key
    found: Mapping[str, Any] = results["cells"].get(key, {})
    return found


def spread(cell: Mapping[str, Any], mode: str, model: str) -> Spread:
    """Median and quartiles of a cell's real-time factor; for the second pass, of its seconds."""
    scale = 1.0 if mode == "second-pass" else audio_seconds(mode)
    return Spread.of([value / scale for value in cell[model]["seconds"]])


def ratio(cell: Mapping[str, Any], model: str, other: str) -> Spread:
    """Ratio of the time of `model` to that of `other`."""
    return ratios(cell[model]["seconds"], cell[other]["seconds"])


def encoder_parts(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The parts of a bound entry that belong to the encoder."""
    return {name: entry["parts"][name] for name in ENCODER_PARTS if name in entry["parts"]}


def encoder_ratio(entry: Mapping[str, Any]) -> Spread:
    """Seconds of the encoder over the sum of the bounds of its parts."""
    least_s = sum(part["least_s"] for part in encoder_parts(entry).values())
    return spread_of(entry["stages"]["encoder"], 1 / least_s)
