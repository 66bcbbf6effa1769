"""A summary of the effects of quantization: how many tokens change, and which layers cause the most changes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.quantize.arithmetic import Array
from u2moe.quantize.comparison import changed_tokens_as_text, compare, hear
from u2moe.quantize.damage import DamageMeter
from u2moe.quantize.observed import LeanSettings
from u2moe.quantize.recordings import read_features
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.errors import ProviderError, QuantizationError
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.model import Model

MOST = 0.1  # share of changed tokens above which a bundle is considered broken
MOST_NATS, FEWEST_TOKENS = 0.01, 10  # with fewer tokens, this limit in nats per frame replaces `MOST`
NUM_NAMED = 3  # maximum number of layers, and of recordings, that a message names
MEASURED_FRAMES, HEARD_FRAMES = 400, 1500  # maximum frames for measuring layers, and for recognition without a report
CLIPS = DEMO_FOLDER / "clips"  # the demo model's recordings, if it is installed
NOISE_S, NUM_NOISES = 2, 3  # duration of a noise signal in seconds, and number of signals


def noise(manifest: Manifest) -> list[Array]:
    """Return the features of noise signals whose loudness varies like that of speech."""
    size = NOISE_S * manifest.features.sample_rate
    random, loudness = np.random.default_rng(0), 0.1 * np.abs(np.sin(np.arange(size) / size * 20))
    samples = (random.standard_normal((NUM_NOISES, size)) * loudness).astype(np.float32)
    return [fbank(each, manifest.features) for each in samples]


def what_changes(
    models: tuple[Model, Model], features: Sequence[Array], files: Sequence[Path] = (), noisy: Sequence[Array] = ()
) -> dict[str, Any]:
    """Return as plain data how the results of the second model, the quantized one, differ from those of the first.

    `features` are those of the recordings `files`, then of noise; `noisy` are those of the same recordings after adding
    noise of half a 16-bit step. Returns the entries of `Difference.data`, and `heard`: the names of the recordings. If
    `noisy` is given, also `changed_texts_by_noise`: how many texts of the float32 model this noise changes.
    """
    changes = {"heard": [file.name for file in files], **compare(*models, features).data()}
    if noisy:
        pairs = zip(features, noisy, strict=True)
        num_changed = sum(hear(models[0], one).texts != hear(models[0], other).texts for one, other in pairs)
        changes["changed_texts_by_noise"] = num_changed
    return changes


@contextmanager
def finite_numbers(where: str) -> Iterator[None]:
    """Turn a ProviderError about invalid numbers into a QuantizationError whose message starts with `where`."""
    try:
        yield
    except ProviderError as error:  # the weights were checked before, so a graph overflowed
        raise QuantizationError(f"{where}: {error}, although all weights of the float32 bundle are finite") from error


def check_runs(made: Bundle) -> None:
    """Run each graph on noise and the demo's clips (if installed); raise QuantizationError for NaN or infinity."""
    model = made.load(LeanSettings())
    for file, frames in [*((Path("noise"), frames) for frames in noise(made.manifest)), *_clips(made)]:
        output = model.encode(frames)
        runs: dict[str, Callable[[], Array]] = {
            "encoder": lambda: output,  # noqa: B023 - called at once
            "ctc": lambda: model.ctc(output),  # noqa: B023
            "decoder": lambda: np.stack(model.rescore(output, [[0, 1]])),  # noqa: B023
        }
        for graph in made.manifest.model.graphs():
            with finite_numbers(f"{graph.file} on {file.name}"):
                if not np.isfinite(runs[graph.name]()).all():
                    raise ProviderError("the output contains NaN or infinity")


def _clips(bundle: Bundle) -> list[tuple[Path, Array]]:
    return read_features(bundle, sorted(CLIPS.glob("*.flac")), HEARD_FRAMES)


def changes_unreported(source: Bundle, made: Bundle, files: Sequence[Path] = ()) -> dict[str, Any]:
    """Return `what_changes` on the files or, if there are none, on noise and the demo model's clips (if installed)."""
    heard = read_features(source, files, HEARD_FRAMES) or _clips(source)
    features = [*(frames for _, frames in heard), *(() if files else noise(source.manifest))]
    models = source.load(LeanSettings()), made.load(LeanSettings())
    changes = what_changes(models, features, [file for file, _ in heard])
    if not {contract.PACKED, "calibration"} & made.manifest.quantization.keys():  # weights are packed or scaled
        changes["layers"] = worst_layers(source, made, features[0])
    return changes


def worst_layers(source: Bundle, made: Bundle, frames: Array) -> list[dict[str, Any]]:
    """Return the layers that do the most damage, measured on the beginning of a recording; see `worst_of`."""
    if made.manifest.quantization.get("whole"):
        return []  # graphs in half precision have no layers to compare
    meter = DamageMeter([source, made], [frames[: max(MEASURED_FRAMES, source.manifest.model.window)]])
    return worst_of([dataclasses.asdict(item) for item in meter.layers()])


def worst_of(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `layer` and `divergence` (nats per frame) of the layers that do the most damage when quantized alone."""
    ordered = sorted(layers, key=lambda item: -item["alone"][-1])[:NUM_NAMED]
    return [{"layer": item["layer"], "divergence": item["alone"][-1]} for item in ordered]


def is_severe(changes: Mapping[str, Any]) -> bool:
    """Return whether the changes are so large that the bundle is useless."""
    if changes["tokens"] < FEWEST_TOKENS:
        return bool(changes["divergence"]["value"] > MOST_NATS)
    return any(found["value"] > MOST for found in changes["changed_tokens"].values())


def describe_changes(changes: Mapping[str, Any]) -> list[str]:
    """Return lines that state what was measured, what changes, and which layers cause the most changes."""
    count, names, by_noise = changes["recordings"], changes["heard"], ""
    shown = ", ".join(names[:NUM_NAMED]) + f" and {len(names) - NUM_NAMED} more" * (len(names) > NUM_NAMED)
    numbers = {f"recordings ({shown})": len(names), "pieces of noise": count - len(names)}
    heard = " and ".join(f"{number} {kind}" for kind, number in numbers.items() if number)
    passes = changed_tokens_as_text(changes["changed_tokens"])
    tokens = f"changed tokens (of {changes['tokens']}): {passes}" if changes["tokens"] else "no tokens"
    if "changed_texts_by_noise" in changes:
        by_noise = f" (noise of half a 16-bit step changes {changes['changed_texts_by_noise']})"
    lines = [
        f"on {heard}, {changes['seconds']:.1f} s, {changes['frames']} encoder frames:",
        f"  {tokens}; divergence {changes['divergence']['value']:.2g} nats per frame",
        f"  changed texts (of {count}): {changes['changed_texts']}{by_noise}",
    ]
    if layers := changes.get("layers"):
        lines.append("  most by " + ", ".join(f"{item['layer']} ({item['divergence']:.2g} nats)" for item in layers))
    return lines
