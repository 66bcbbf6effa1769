"""Bundles of seeded random weights at full size, created if missing, and routers that spread tokens evenly.

A folder holds `MODEL/checkpoint` in WeNet's layout, `MODEL/bundle` in float32, and one bundle for each of `RECIPES`.
Random routers favour some experts because tokens have something in common: their mean. Without the direction of the
mean, a router treats all experts alike. The graphs do not change: sessions get the adjusted routers as initializers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime

from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, Frames, random_frames
from u2moe.export.random_checkpoint import PRESETS, random_config, write_random_checkpoint
from u2moe.quantize.observed import ExpertInputs, RoutedLayer
from u2moe.quantize.quantizer import quantize_bundle
from u2moe.quantize.recipes import recipe
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.model.encoder import Windows
from u2moe.runtime.model.settings import SessionSettings

MODELS = ("dense-225m", "moe-1b", "dense-1b")
SMALL, MIXTURE, LARGE = MODELS
NAMES = {SMALL: "Dense-225M", MIXTURE: "MoE-1B", LARGE: "Dense-1B"}
FLOAT = "bundle"
"""Folder of the bundle in float32."""
SIZES = PRESETS | {
    f"{experts}x{top_k}x{hidden}": {
        name: {**part, "n_expert": experts, "n_expert_activated": top_k, "linear_units": hidden}
        if isinstance(part, dict)
        else part
        for name, part in PRESETS[MIXTURE].items()
    }
    for experts, top_k, hidden in ((8, 1, 1920), (16, 2, 960), (32, 4, 480))
}
"""Arguments of `random_config`, of mixtures of as many parameters, too: experts x top-k x hidden units."""
RECIPES = {
    "int8": recipe("int8"),
    "int4": recipe("int4-experts"),
    "packed": recipe("int8", packed=True),
}
"""Recipe of the other bundles, by folder."""
Gates = Mapping[str, Frames]
"""Routers [dim, experts] by the name of the weight."""
_ROUNDS = 3
"""An adjusted layer slightly changes the inputs of later ones, which the next round adjusts again."""


def make_bundle(name: str, kind: str, root: Path) -> Bundle:
    """A bundle of preset `name` in `root`/`name`/`kind`, created from the checkpoint if it is missing.

    Raises:
        CalledProcessError: the export failed; its message is on stderr.
    """
    folder = root / name
    if not (folder / "checkpoint").is_dir():
        show_progress(f"{name}: random weights")
        unfinished = folder / "checkpoint.partial"
        write_random_checkpoint(unfinished, random_config(**PRESETS[name]))
        unfinished.rename(folder / "checkpoint")
    if not (folder / FLOAT).is_dir():
        show_progress(f"{name}: export, compared with torch")
        export = ["-m", "u2moe", "export", str(folder / "checkpoint"), str(folder / FLOAT)]
        subprocess.run([sys.executable, *export], check=True)  # noqa: S603 - ourselves; its memory goes with it
    if kind != FLOAT and not (folder / kind).is_dir():
        show_progress(f"{name}: {kind}")
        quantize_bundle(folder / FLOAT, folder / kind, RECIPES[kind])
    return Bundle.open(folder / kind, verify=False)


def even_gates(name: str, root: Path) -> dict[str, Frames]:
    """Routers that spread tokens evenly over all experts, the worst case for reading; empty without experts."""
    if "n_expert" not in PRESETS[name]["encoder_conf"]:
        return {}
    file = root / name / "routers-all.npz"
    if not file.exists():
        bundle = make_bundle(name, "int8", root)
        np.savez(file, **turned_gates(bundle, random_frames(bundle)))  # type: ignore[arg-type]
    with np.load(file) as arrays:
        return dict(arrays)


def turned_gates(bundle: Bundle, frames: Frames) -> dict[str, Frames]:
    """Routers without the direction of the mean token, for chunks of `frames` [frames, mel]."""
    gates: dict[str, Frames] = {}
    for _ in range(_ROUNDS):
        layers, chunks = _expert_inputs(bundle, frames, gates)
        turned = {}
        for layer in layers:
            mean = np.concatenate([chunk[layer.name] for chunk in chunks]).mean(axis=0)
            change = np.outer(mean, -(mean @ layer.gate)) / (mean @ mean)
            turned[layer.gate_name] = np.ascontiguousarray(layer.gate + change, np.float32)
        gates = turned
    return gates


def touched(bundle: Bundle, frames: Frames, gates: Gates) -> float:
    """Experts of a layer that a chunk of `frames` uses with these routers, averaged over chunks and layers."""
    layers, chunks = _expert_inputs(bundle, frames, gates)
    layers = [replace(layer, gate=gates.get(layer.gate_name, layer.gate)) for layer in layers]
    counts = np.array([[layer.counts(chunk[layer.name]) for layer in layers] for chunk in chunks])
    return float((counts > 0).sum(axis=-1).mean())


def _expert_inputs(bundle: Bundle, frames: Frames, gates: Gates) -> tuple[list[RoutedLayer], list[dict[str, Frames]]]:
    """The layers with experts, and the inputs [tokens, dim] of each in each chunk."""
    inputs = ExpertInputs(bundle, gates)
    cutter = Windows(bundle.manifest.model, CHUNK_SIZE)
    whole = (len(frames) - cutter.length) // cutter.stride * cutter.stride + cutter.length
    return list(inputs.layers.values()), list(inputs.chunks(frames[:whole], CHUNK_SIZE, NUM_LEFT_CHUNKS))


class GateSettings:
    """Session options that supply these routers; must outlive the sessions, which read them in place."""

    def __init__(self, gates: Gates) -> None:
        self._values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(gate) for name, gate in gates.items()}

    def options(self, num_threads: int = 1, kernels: str = "onnxruntime") -> onnxruntime.SessionOptions:
        """The runtime's options, with these routers."""
        options = SessionSettings(num_threads=num_threads, kernels=kernels).session_options()
        for name, value in self._values.items():
            options.add_initializer(name, value)
        return options
