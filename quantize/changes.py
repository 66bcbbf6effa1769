"""What a written bundle changes, in a few lines: how many tokens, which layers do most of it, and what repairs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.quantize.comparison import Array, compare, hear
from u2moe.quantize.damage import DamageMeter
from u2moe.quantize.features import read_features
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.errors import ProviderError, QuantizationError
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.model import Model

MOST = 0.1
"""Share of tokens beyond which a bundle is taken for broken."""
MOST_NATS, FEWEST_TOKENS = 0.01, 10
"""The same in nats a frame, where there are fewer tokens than this."""
NUM_NAMED, MEASURED_FRAMES, HEARD_FRAMES = 3, 400, 1500
"""Layers and recordings that are named, and feature frames on which layers are found; and those that are heard without
a report."""
CLIPS = DEMO_FOLDER / "clips"
"""Recordings of the demo model, if it is installed."""
NOISE_S, NUM_NOISES = 2, 3
"""Seconds of a piece of noise, and pieces."""


def noise(manifest: Manifest) -> list[Array]:
    """Features of noise that is loud and soft in turn, as speech is."""
    size = NOISE_S * manifest.features.sample_rate
    random, loudness = np.random.default_rng(0), 0.1 * np.abs(np.sin(np.arange(size) / size * 20))
    samples = (random.standard_normal((NUM_NOISES, size)) * loudness).astype(np.float32)
    return [fbank(each, manifest.features) for each in samples]


def what_changes(
    models: tuple[Model, Model], features: Sequence[Array], files: Sequence[Path] = (), noisy: Sequence[Array] = ()
) -> dict[str, Any]:
    """What the second model changes of the results of the first, as plain data.

    Args:
        models: in float32, and quantized.
        features: of recordings or of noise.
        files: the recordings, which come before noise.
        noisy: features of the recordings with noise of half a step of 16 bits.

    Returns:
        See `Difference.data`; `heard`: names of the recordings; `changed_texts_by_noise`: texts of the first model that
        such noise changes, if it was given.
    """
    changes = {"heard": [file.name for file in files], **compare(*models, features).data()}
    if noisy:
        pairs = zip(features, noisy, strict=True)
        num_changed = sum(hear(models[0], one).texts != hear(models[0], other).texts for one, other in pairs)
        changes["changed_texts_by_noise"] = num_changed
    return changes


@contextmanager
def finite_numbers(where: str) -> Iterator[None]:
    """Raise QuantizationError, whose message begins with `where`, for numbers that are not finite or not probabilities.

    All weights of the bundles have been looked at: it is what graphs compute that is beyond their formats.
    """
    try:
        yield
    except ProviderError as error:
        raise QuantizationError(f"{where}: {error}; all weights of the float32 bundle are finite") from error


def check_runs(made: Bundle) -> None:
    """Run each graph of a staged bundle for noise and, if they are installed, for the demo model's clips.

    Raises:
        QuantizationError: a graph gives numbers that are not finite.
    """
    model = made.load()
    for file, frames in [*((Path("noise"), frames) for frames in noise(made.manifest)), *_clips(made)]:
        output = model.encode(frames)
        runs: dict[str, Callable[[], Array]] = {
            "encoder": lambda: output,  # noqa: B023 - called at once
            "ctc": lambda: model.ctc(output),  # noqa: B023
            "decoder": lambda: np.stack(model.rescore(output, [[0, 1]])),  # noqa: B023
        }
        for graph in made.manifest.model.graphs():
            with finite_numbers(f"{graph.file}, for {file.name}"):
                if not np.isfinite(runs[graph.name]()).all():
                    raise ProviderError("numbers that are not finite")


def _clips(bundle: Bundle) -> list[tuple[Path, Array]]:
    return read_features(bundle, sorted(CLIPS.glob("*.flac")), HEARD_FRAMES)


def changes_unreported(source: Bundle, made: Bundle, files: Sequence[Path] = ()) -> dict[str, Any]:
    """As `what_changes` on files or, if there are none, on noise and the demo model's clips, if they are installed.

    It has `layers` where both bundles have the same ones.
    """
    heard = read_features(source, files, HEARD_FRAMES) or _clips(source)
    features = [*(frames for _, frames in heard), *(() if files else noise(source.manifest))]
    quantization = made.manifest.quantization
    changes = what_changes((source.load(), made.load()), features, [file for file, _ in heard])
    is_other = contract.PACKED in quantization or "calibration" in quantization  # whose channels are scaled
    return changes if is_other else {**changes, "layers": worst_layers(source, made, features[0])}


def worst_layers(source: Bundle, made: Bundle, frames: Array) -> list[dict[str, Any]]:
    """The layers that cost most by themselves at the beginning of a recording, see `worst_of`."""
    if made.manifest.quantization.get("whole"):
        return []  # there, no layer is left that can be compared
    meter = DamageMeter([source, made], [frames[: max(MEASURED_FRAMES, source.manifest.model.window)]])
    return worst_of([dataclasses.asdict(item) for item in meter.layers()])


def worst_of(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The `layer` and the `divergence` of those that cost most by themselves, in nats a frame."""
    ordered = sorted(layers, key=lambda item: -item["alone"][-1])[:NUM_NAMED]
    return [{"layer": item["layer"], "divergence": item["alone"][-1]} for item in ordered]


def share_changed(changes: Mapping[str, Any]) -> float:
    """Of the tokens, by the pass that changes more."""
    return float(max(found["value"] for found in changes["changed_tokens"].values()))


def is_severe(changes: Mapping[str, Any]) -> bool:
    """Whether so much changes that the bundle is of no use."""
    if changes["tokens"] < FEWEST_TOKENS:
        return bool(changes["divergence"]["value"] > MOST_NATS)
    return share_changed(changes) > MOST


def describe_changes(changes: Mapping[str, Any]) -> list[str]:
    """Lines: on what it was measured, what changes, and the layers that do most of it."""
    count = changes["recordings"]
    names = changes["heard"]
    shown = ", ".join(names[:NUM_NAMED]) + f" and {len(names) - NUM_NAMED} more" * (len(names) > NUM_NAMED)
    numbers = {f"recordings ({shown})": len(names), "pieces of noise": count - len(names)}
    heard = " and ".join(f"{number} {kind}" for kind, number in numbers.items() if number)
    passes = ", ".join(
        f"{name.replace('_', ' ')} {found['value']:.2%} ({found['low']:.2%} to {found['high']:.2%})"
        for name, found in changes["changed_tokens"].items()
    )
    tokens = f"of {changes['tokens']} tokens change {passes}" if changes["tokens"] else "no tokens"
    number = changes.get("changed_texts_by_noise")
    by_noise = "" if number is None else f" (half a step of 16-bit noise changes {number})"
    nats = changes["divergence"]["value"]
    lines = [
        f"on {heard}, {changes['seconds']:.1f} s, {changes['frames']} encoder frames:",
        f"  {tokens}; divergence {nats:.2g} nats a frame",
        f"  of {count} texts change {changes['changed_texts']}{by_noise}",
    ]
    if layers := changes.get("layers"):
        lines.append("  most by " + ", ".join(f"{item['layer']} ({item['divergence']:.2g} nats)" for item in layers))
    return lines
