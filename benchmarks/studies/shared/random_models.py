"""Full-size bundles of seeded random weights, with routers that spread tokens evenly. Missing bundles are created.

The folder of a model contains `train.yaml`, and a bundle for each format, such as `int8`. All formats are made from
`fp32`.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import yaml

from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, Frames
from u2moe.export import export_random
from u2moe.export.model import SpeechModel
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.random_checkpoint import PRESETS, random_config
from u2moe.export.training_config import CONFIG_FILE
from u2moe.quantize.observed import ExpertInputs
from u2moe.quantize.quantizer import quantize_bundle
from u2moe.quantize.recipes import recipe
from u2moe.runtime.bundle.weight_formats import FLOAT32
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.model.encoder import Windows

MODELS = ("dense-225m", "moe-1b", "dense-1b")
SMALL, MIXTURE, LARGE = MODELS
NAMES = {SMALL: "Dense-225M", MIXTURE: "MoE-1B", LARGE: "Dense-1B"}
HALF = f"{MIXTURE}-half"
"""`MIXTURE` with experts in every second block; see `thin_out`."""
FLOAT = FLOAT32.name
"""Name of the folder of the float32 bundle."""
SIZES = PRESETS | {
    f"{experts}x{top_k}x{hidden}": {
        name: {**part, "n_expert": experts, "n_expert_activated": top_k, "linear_units": hidden}
        if isinstance(part, dict)
        else part
        for name, part in PRESETS[MIXTURE].items()
    }
    for experts, top_k, hidden in ((8, 1, 1920), (16, 2, 960), (32, 4, 480))
}
SIZES[HALF] = SIZES[MIXTURE]
"""Arguments of `random_config`. The added mixtures, named experts x top-k x hidden units, have about as many parameters
as `MIXTURE`."""


def is_mixture(name: str) -> bool:
    """Return whether a model has experts."""
    return "n_expert" in SIZES[name]["encoder_conf"]


def thin_out(network: SpeechModel) -> None:
    """In every second block, keep only the first expert, without a router. WeNet's train.yaml cannot express this."""
    decoders = [own for own in (network.left_decoder, network.right_decoder) if own is not None]
    blocks = [*network.encoder.encoders, *(block for own in decoders for block in own.decoders)]
    for block in blocks[::2]:
        for name, layer in list(block.named_children()):
            if isinstance(layer, MixtureOfExperts):
                block.add_module(name, layer.experts[0])


def make_bundle(name: str, kind: str, root: Path) -> Bundle:
    """Return the bundle of a model in the folder `root`/`name`/`kind`. Create it if it is missing.

    Args:
        name: name of the model, a key of `SIZES`.
        kind: `FLOAT`, "int8", "packed" (int8, packed in advance) or "int4". The last is int8 with 4-bit experts, with
            4-bit feed-forward layers (dense networks), or with both (`HALF`).
        root: folder of all models.
    """
    folder = root / name
    missing = [each for each in (kind, FLOAT) if not (folder / each).is_dir()]
    if kind in missing and FLOAT in missing:
        show_progress(f"{name}: random weights")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(yaml.dump(random_config(**SIZES[name])), encoding="utf-8")
        change = thin_out if name == HALF else None
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # all its memory is freed at its end
            process.submit(export_random, folder, folder / FLOAT, change=change).result()
    if kind != FLOAT and kind in missing:
        show_progress(f"{name}: {kind}")
        groups = ("experts", "feed_forward") if name == HALF else ("experts" if is_mixture(name) else "feed_forward",)
        fewer_bits = dict.fromkeys(groups, "int4") if kind == "int4" else {}
        quantize_bundle(folder / FLOAT, folder / kind, recipe("int8", fewer_bits, packed=kind == "packed"))
    return Bundle.open(folder / kind, verify=False)


def touched(bundle: Bundle, frames: Frames) -> float:
    """Return the number of experts that a chunk of `frames` [frames, mel] uses, averaged over chunks and layers."""
    inputs = ExpertInputs(bundle)
    cutter = Windows(bundle.manifest.model, CHUNK_SIZE)
    whole = (len(frames) - cutter.length) // cutter.stride * cutter.stride + cutter.length
    chunks = inputs.chunks(frames[:whole], CHUNK_SIZE, NUM_LEFT_CHUNKS)
    counts = np.array([[layer.counts(chunk[layer.name]) for layer in inputs.layers.values()] for chunk in chunks])
    return float((counts > 0).sum(axis=-1).mean())
