"""Full-size bundles of seeded random weights, with routers that spread tokens evenly. Missing bundles are created.

The folder of a model contains `train.yaml`, and a bundle for each format, such as `int8`. All formats are made from
`fp32`.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import yaml

from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, random_frames
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
HALF = f"{MIXTURE}-half"  # `MIXTURE` with experts in every second block; see `thin_out`
FLOAT = FLOAT32.name  # name of the folder of the float32 bundle
OTHERS = ("8x1x1920", "16x2x960", "32x4x480")  # as many parameters as `MIXTURE`: experts x top-k x hidden units
SIZES = {**PRESETS, HALF: PRESETS[MIXTURE]}  # arguments of `random_config`
for name in OTHERS:
    changes = dict(zip(("n_expert", "n_expert_activated", "linear_units"), map(int, name.split("x")), strict=True))
    SIZES[name] = {key: part | changes if isinstance(part, dict) else part for key, part in PRESETS[MIXTURE].items()}


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
    """Return the bundle of a model (a key of `SIZES`) in the folder `root`/`name`/`kind`. Create it if it is missing.

    Kinds are `FLOAT`, "int8", "packed" (int8, packed in advance) and "int4". The last is int8 with 4-bit experts, with
    4-bit feed-forward layers (dense networks), or with both (`HALF`).
    """
    folder = root / name
    is_missing = not (folder / kind).is_dir()
    if is_missing and not (folder / FLOAT).is_dir():
        show_progress(f"{name}: random weights")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(yaml.dump(random_config(**SIZES[name])), encoding="utf-8")
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # all its memory is freed at its end
            change = thin_out if name == HALF else None
            process.submit(export_random, folder, folder / FLOAT, change=change).result()
    if is_missing and kind != FLOAT:
        show_progress(f"{name}: {kind}")
        groups = ("experts", "feed_forward") if name == HALF else ("experts" if is_mixture(name) else "feed_forward",)
        fewer_bits = dict.fromkeys(groups, "int4") if kind == "int4" else {}
        quantize_bundle(folder / FLOAT, folder / kind, recipe("int8", fewer_bits, packed=kind == "packed"))
    return Bundle.open(folder / kind, verify=False)


def touched(bundle: Bundle) -> float:
    """Return the number of experts that a chunk of random features uses, averaged over chunks and layers."""
    inputs, frames = ExpertInputs(bundle), random_frames(bundle)
    cutter = Windows(bundle.manifest.model, CHUNK_SIZE)
    whole = (len(frames) - cutter.length) // cutter.stride * cutter.stride + cutter.length
    chunks = inputs.chunks(frames[:whole], CHUNK_SIZE, NUM_LEFT_CHUNKS)
    counts = np.array([[layer.counts(chunk[layer.name]) for layer in inputs.layers.values()] for chunk in chunks])
    return float((counts > 0).sum(axis=-1).mean())
