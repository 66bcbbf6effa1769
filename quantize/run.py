"""The graphs of one bundle in other number formats: smoothed, quantized, measured, and repaired where it hurts."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from u2moe.quantize.calibration import Activations, recorded
from u2moe.quantize.damage import DamageMeter
from u2moe.quantize.observed import Array
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.recipes import LONGEST_S, Recipe
from u2moe.quantize.report import features_of
from u2moe.quantize.smoothing import rewritten_bundle, smooth
from u2moe.quantize.weights import Change
from u2moe.runtime.bundle.weight_formats import quantized
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.errors import AudioError, BundleError
from u2moe.runtime.graph.file import save_graph, with_external

Progress = Callable[[str], None]
DAMAGE_S = 120
"""Seconds of the recordings on which damage is measured."""


@dataclass(frozen=True, kw_only=True)
class QuantizedBundle:
    """A staged bundle.

    Attributes:
        recipe: what it was made by.
        bundle: still in its temporary folder.
        changes: the replaced weights, by the name of the new one.
    """

    recipe: Recipe
    bundle: Bundle
    changes: Mapping[str, Change]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.bundle.manifest.files.values())


class QuantizationRun:
    """Makes quantized versions of one float32 bundle, and measures their damage; see `opened_run`.

    Attributes:
        source: the bundle, smoothed if there are recordings.
        measured: features of the recordings on which damage is measured: their first two minutes.
        journal: the file of what was measured; None: none.
        folder: for temporary files.
        progress: called with a line for each step.
    """

    def __init__(
        self,
        source: Bundle,
        folder: Path,
        progress: Progress,
        heard: Sequence[Array] = (),
        activations: Activations | None = None,
        seconds: float = 0.0,
        journal: Path | None = None,
    ) -> None:
        """`heard` are features of all recordings, `activations` of `seconds` of them."""
        self.source, self.folder, self.progress = source, folder, progress
        self._activations, self._seconds, self.journal = activations, seconds, journal
        frames = round(DAMAGE_S * 1000 / source.manifest.features.frame_shift_ms)
        self.measured = list(_first(heard, frames, source.manifest.model.window))

    def quantize(
        self, recipe: Recipe, staging: BundleWriter, notes: Mapping[str, Any] | None = None
    ) -> QuantizedBundle:
        """Stage the bundle with its graphs quantized, in place of what was staged before.

        The manifest records the recipe, and `notes`.

        Raises:
            BundleError: a group requested by name is missing.
        """
        changes: dict[str, Change] = {}
        if self._activations:
            self._activations.products.clear()
        graphs = self.source.manifest.model.graphs()
        for number, graph in enumerate(graphs, start=1):
            self.progress(f"[{number}/{len(graphs)}] quantizing {graph.file}")
            model = ir.load(self.source.path / graph.file)
            changes |= quantize_graph(model, recipe, self._activations)
            (staging.path / f"{graph.file}.data").unlink(missing_ok=True)
            save_graph(model, staging.path / graph.file, progress=self.progress)
        counts = Counter(change.group for change in changes.values())
        if not recipe.exceptions:
            _check_found(self.source, recipe, counts)
        staged = tuple(graph.file for graph in graphs)
        for name in self.source.manifest.files:
            if not name.startswith(staged):  # nor the weights beside a graph
                staging.add(name, self.source.path / name)
        record = {**self._record(recipe, counts), **(notes or {})}
        manifest = with_external(dataclasses.replace(self.source.manifest, quantization=record), staging.path)
        return QuantizedBundle(recipe=recipe, bundle=staging.seal(manifest), changes=changes)

    def damage(self, made: QuantizedBundle) -> dict[str, Any]:
        """The damage of every layer, as plain data."""
        damage = DamageMeter([self.source, made.bundle], self.measured, self.journal).measure(self.progress)
        return {**dataclasses.asdict(damage), "formats": ["fp32", made.recipe.name]}

    def _record(self, recipe: Recipe, changed: Counter[str]) -> dict[str, Any]:
        """The recipe as the manifest records it."""
        record: dict[str, Any] = {
            "recipe": recipe.name,
            "groups": dict(recipe.quantized),
            "whole": recipe.whole,
            "block_size": recipe.block_size,
            "num_weights": dict(sorted(changed.items())),
        }
        versions = {f"{kind.name}_version": kind.version for kind in quantized(recipe.groups) if kind.version}
        record |= versions
        if self._activations:
            products = {name: self._activations.products[name] for name in ("compensated_products", "plain_products")}
            record["calibration"] = {"seconds": round(self._seconds, 2), **products}
        if recipe.exceptions:
            record["exceptions"] = dict(recipe.exceptions)
        return record


@contextmanager
def opened_run(
    bundle: Bundle, recipe: Recipe, beside: Path, progress: Progress, journal: Path | None = None
) -> Iterator[QuantizationRun]:
    """A run for a float32 bundle, which is smoothed first if the recipe has recordings for calibration.

    Temporary files are in the folder `beside`, because the system's is often in memory: a copy of the bundle, and what
    its layers read. Measurements are kept in the file `journal`, if there is one.

    Raises:
        AudioError: a recording cannot be read, all of them are too short for the encoder, or nobody speaks in them.
    """
    if not recipe.calibration:
        yield QuantizationRun(bundle, beside, progress)
        return
    frames_s = 1000 / bundle.manifest.features.frame_shift_ms
    heard = features_of(bundle, recipe.calibration, limit=round(LONGEST_S * frames_s))
    if not heard:
        raise AudioError(f"calibration: {recipe.calibration[0]} and all others are too short for the encoder")
    with tempfile.TemporaryDirectory(prefix="quantizing-", dir=beside, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        others = after_first(heard, round(DAMAGE_S * frames_s))
        with recorded(bundle, others, folder, progress) as activations:
            smoothed = rewritten_bundle(
                bundle,
                folder / "smoothed",
                lambda model: progress(f"smoothing {model.graph.name}: {smooth(model, activations)} channels scaled"),
            )
            seconds = sum(map(len, others)) / frames_s
            yield QuantizationRun(smoothed, folder, progress, heard, activations, seconds, journal)


def after_first(heard: Sequence[Array], limit: int) -> Sequence[Array]:
    """The recordings after the first `limit` frames, on which damage is measured; all, if the others have fewer."""
    ends = itertools.accumulate(map(len, heard))
    others = [frames for frames, end in zip(heard, ends, strict=True) if end - len(frames) >= limit]
    return others if sum(map(len, others)) >= limit else heard


def _first(heard: Sequence[Array], limit: int, shortest: int) -> Iterator[Array]:
    """The first `limit` frames of all recordings, without pieces that are too short for the encoder."""
    for frames in heard:
        if len(frames[:limit]) >= shortest:
            yield frames[:limit]
        limit = max(limit - len(frames), 0)


def _check_found(source: Bundle, recipe: Recipe, changed: Counter[str]) -> None:
    """Raise BundleError if a group requested by name is missing; recipes for all groups accept networks with some."""
    missing = recipe.quantized.keys() - changed.keys()
    by_nature = {"experts", "feed_forward", "pointwise_convolutions", "embeddings"} - set(recipe.required)
    if missing - by_nature or not changed:
        groups = ", ".join(sorted(missing))
        raise BundleError(f"{source.path}: recipe {recipe.name} quantizes {groups}, but no graph has such weights")
