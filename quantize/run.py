"""The graphs of one bundle in other formats: smoothed, quantized, packed and measured."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from u2moe.quantize.changes import finite_numbers
from u2moe.quantize.comparison import Difference, compare
from u2moe.quantize.damage import DamageMeter
from u2moe.quantize.goals import Goal
from u2moe.quantize.layers import Change, layer_of
from u2moe.quantize.observed import LeanSettings
from u2moe.quantize.packing import pack_graph, save_mapped
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.progress import shares
from u2moe.quantize.recipes import BLOCK_SIZES, Recipe
from u2moe.quantize.recordings import Audio, read_audio
from u2moe.quantize.rounding import Activations, recorded
from u2moe.quantize.smoothing import rewritten_together, smooth
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.weight_formats import quantized
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.errors import BundleError, QuantizationError
from u2moe.runtime.graph.file import group_of, save_graph, shape_of, with_external
from u2moe.runtime.model.model import Model
from u2moe.runtime.whole_file import locked

Progress = Callable[[str], None]
GOAL_BYTES = 400
TEMPORARY = "quantizing-"
"""What the names of folders for temporary files begin with."""
LOCK_FILE = "lock"
UNROUNDED = {"embeddings", "subsampling"}
"""Groups of weights that recordings do not help to round."""
UNLOCKED_S = 10
"""Seconds for which a process may not have locked such a folder."""


@dataclass(frozen=True, kw_only=True)
class QuantizedBundle:
    """A staged bundle.

    Attributes:
        recipe: what it was made by.
        bundle: still in its temporary folder, not packed.
        changes: the replaced weights, by the name of the new one.
        packed: the same, packed, in another temporary folder; None: the recipe does not ask for it.
    """

    recipe: Recipe
    bundle: Bundle
    changes: Mapping[str, Change]
    packed: Bundle | None = None

    @property
    def written(self) -> Bundle:
        """What is to be written."""
        return self.packed or self.bundle

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that are to be written, with what the manifest will say of the goal."""
        return sum(file.stat().st_size for file in self.written.path.iterdir()) + GOAL_BYTES

    def load(self) -> Model:
        """What is to be written, as a model."""
        return self.written.load(LeanSettings(kernels="native" if self.packed else None))


@dataclass(frozen=True)
class QuantizationRun:
    """Makes quantized versions of one float32 bundle, and measures their damage; see `opened_run`.

    Attributes:
        source: the bundle, smoothed if there are recordings.
        folder: for temporary files.
        progress: called with a line for each step.
        audio: the recordings; None: none.
        activations: what layers read in those that calibrate.
        journal: the file of what was measured; None: none.
        layout: version of the native kernels' layout, for recipes that pack.
    """

    source: Bundle
    folder: Path
    progress: Progress
    audio: Audio | None = None
    activations: Activations | None = None
    journal: Path | None = None
    layout: int | None = None

    def quantize(self, recipe: Recipe, staging: BundleWriter) -> QuantizedBundle:
        """Stage the bundle with its graphs quantized, in place of what was staged before.

        The manifest records the recipe.

        Raises:
            BundleError: a group requested by name is missing, or nothing can be packed.
        """
        changes: dict[str, Change] = {}
        kept: set[str] = set()
        layers: set[str] = set()
        if self.activations:
            self.activations.products.clear()
        graphs = self.source.manifest.model.graphs()
        for number, graph in enumerate(graphs, start=1):
            self.progress(f"[{number}/{len(graphs)}] quantizing {graph.file}")
            model = ir.load(self.source.path / graph.file)
            layers |= {layer_of(node) for node in model.graph if node.domain == contract.MOE_DOMAIN}
            if self.activations:
                self.activations.done = _rounding(model, recipe, graph.file, self.progress)
            weights = quantize_graph(model, recipe, self.activations)
            changes |= weights.changes
            kept |= weights.kept
            (staging.path / f"{graph.file}.data").unlink(missing_ok=True)
            save_graph(model, staging.path / graph.file, progress=self.progress)
        if unknown := sorted(recipe.exceptions.keys() - layers):
            known = ", ".join(sorted(layers))
            raise BundleError(f"{self.source.path}: has no layer {', '.join(unknown)}; layers are {known}")
        counts = Counter(change.group for change in changes.values())
        if not recipe.exceptions:
            _check_found(self.source, recipe, counts)
        staged = tuple(graph.file for graph in graphs)
        for name in self.source.manifest.files:
            if not name.startswith(staged):  # nor the weights beside a graph
                staging.add(name, self.source.path / name)
        record = self._record(recipe, counts)
        if kept:
            record["beyond_half_precision"] = sorted(kept)
        manifest = with_external(dataclasses.replace(self.source.manifest, quantization=record), staging.path)
        made = QuantizedBundle(recipe=recipe, bundle=staging.seal(manifest), changes=changes)
        return dataclasses.replace(made, packed=self._packed(made.bundle)) if recipe.packed else made

    def smallest(self, recipe: Recipe, staging: BundleWriter, limit: float | None) -> QuantizedBundle:
        """The quantized bundle, with wider blocks as long as it is larger than the limit."""
        made = self.quantize(recipe, staging)
        sizes = {made.num_bytes: recipe}
        has_blocks = any(kind.block_sizes for kind in quantized(recipe.groups))
        for size in BLOCK_SIZES if limit and has_blocks else ():
            if size > recipe.block_size and made.num_bytes > (limit or 0):
                made = self.quantize(dataclasses.replace(recipe, block_size=size), staging)
                sizes.setdefault(made.num_bytes, made.recipe)
        best = sizes[min(sizes)]  # layers with few rows do not fill wide blocks
        return made if best == made.recipe else self.quantize(best, staging)

    def compare(self, made: QuantizedBundle) -> Difference:
        """What is to be written, with float32, on the recordings that judge.

        Raises:
            QuantizationError: a graph gives numbers that are not finite.
        """
        judges, show = self.heard.judges, shares(self.progress, "comparing with float32")
        with finite_numbers("on the recordings"):
            return compare(
                self.source.load(LeanSettings()), made.load(), judges, lambda number: show(number / len(judges))
            )

    def damage(self, made: QuantizedBundle) -> dict[str, Any]:
        """The damage of every layer, and of what is to be written, as plain data."""
        damage = self.meter([self.source, made.bundle]).measure(shares(self.progress, "damage of each layer"))
        written = self.compare(made)
        return {**dataclasses.asdict(damage), "formats": ["fp32", made.recipe.name], **written.summary()}

    def meter(self, versions: Sequence[Bundle]) -> DamageMeter:
        """Of these versions, on the recordings that choose."""
        return DamageMeter(versions, self.heard.chooses, self.journal)

    @property
    def heard(self) -> Audio:
        """The recordings, of which there must be some."""
        if self.audio is None:
            raise ValueError("damage is measured on the recordings of a calibration, of which there are none")
        return self.audio

    def _packed(self, made: Bundle) -> Bundle:
        """A copy with packed weights."""
        if self.layout is None:
            raise ValueError("packing needs the version of a layout")
        num_packed = 0
        with BundleWriter(self.folder / "packed", overwrite=True) as other:
            for graph in made.manifest.model.graphs():
                self.progress(f"packing {graph.file}")
                model = ir.load(made.path / graph.file)
                num_packed += pack_graph(model, self.layout)
                save_mapped(model, other.path / graph.file, self.progress)
            if not num_packed:
                found = made.manifest.quantization["recipe"]
                raise BundleError(f"native kernels use no weights of recipe {found}, so none can be packed")
            for name in made.manifest.files:
                if not (other.path / name).exists() and not name.endswith(".onnx.data"):
                    other.add(name, made.path / name)
            quantization = {**made.manifest.quantization, contract.PACKED: self.layout}
            manifest = dataclasses.replace(made.manifest, quantization=quantization)
            return other.finish(with_external(manifest, other.path))

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
        if self.activations:
            products = {name: self.activations.products[name] for name in ("compensated_products", "plain_products")}
            record["calibration"] = {"seconds": round(self.heard.seconds, 2), **products}
        if recipe.exceptions:
            record["exceptions"] = dict(recipe.exceptions)
        return record


def _rounding(model: ir.Model, recipe: Recipe, file: str, progress: Progress) -> Callable[[int], None]:
    """A function that reports the share of a graph's products that are rounded; see `Activations.done`."""
    sizes = [math.prod(shape_of(value)) for value in model.graph.initializers.values()
             if group_of(value) in recipe.quantized.keys() - UNROUNDED and len(shape_of(value)) == 2]  # fmt: skip
    show, done = shares(progress, f"rounding {file}"), 0

    def report(size: int) -> None:
        nonlocal done
        done += size
        show(min(done / max(sum(sizes), 1), 1.0))

    return report


@contextmanager
def opened_run(
    bundle: Bundle,
    recipe: Recipe,
    goal: Goal,
    beside: Path,
    progress: Progress,
    *,
    journal: Path | None = None,
    layout: int | None = None,
) -> Iterator[QuantizationRun]:
    """A run for a float32 bundle, which is smoothed first if the recipe has recordings for calibration.

    Temporary files are in a folder in `beside`, because the system's is often in memory: a copy of the bundle, and what
    its layers read. Measurements are kept in the file `journal`, if there is one; `layout` is for packing.

    Raises:
        AudioError: a recording cannot be read, all of them are too short for the encoder or for the goal, or nobody
            speaks in them.
        QuantizationError: the smallest formats are too large for the goal.
    """
    with temporary_folder(beside) as folder:
        run = QuantizationRun(bundle, folder, progress, journal=journal, layout=layout)
        if not recipe.calibration:
            yield run
            return
        if goal.max_bytes is not None:
            with BundleWriter(folder / "smallest") as other:  # calibration makes no bundle smaller
                size = run.smallest(dataclasses.replace(recipe, calibration=()), other, goal.max_bytes).num_bytes
            if size > goal.max_bytes:
                raise QuantizationError(
                    f"no choice of formats meets the goal (at most {goal.max_bytes / 1e6:g} MB): the smallest formats, "
                    f"{recipe.name}, take {size / 1e6:.2f} MB"
                )
        audio = read_audio(bundle, recipe, goal)
        activations = recorded(bundle, audio.calibrates, folder, progress)
        show = shares(progress, "smoothing channels")
        smoothed = rewritten_together(
            bundle,
            folder / "smoothed",
            lambda models: progress(f"smoothed {smooth(models, activations, show)} channels"),
        )
        yield dataclasses.replace(run, source=smoothed, audio=audio, activations=activations)


@contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """A folder for temporary files; those of processes that were killed are removed."""
    for other in beside.glob(f"{TEMPORARY}*"):
        is_new = not (other / LOCK_FILE).exists() and time.time() - other.stat().st_mtime < UNLOCKED_S
        if not is_new and sys.platform != "win32":  # where nothing tells whether its process lives
            with contextlib.suppress(OSError), locked(other / LOCK_FILE):
                shutil.rmtree(other, ignore_errors=True)
    made = tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=beside, ignore_cleanup_errors=True)
    with made as name, locked(Path(name) / LOCK_FILE):
        yield Path(name)


def _check_found(source: Bundle, recipe: Recipe, changed: Counter[str]) -> None:
    """Raise BundleError if a group requested by name is missing; recipes for all groups accept networks with some."""
    missing = recipe.quantized.keys() - changed.keys()
    by_nature = {"experts", "feed_forward", "pointwise_convolutions", "embeddings"} - set(recipe.required)
    if missing - by_nature or not changed:
        groups = ", ".join(sorted(missing))
        raise BundleError(f"{source.path}: recipe {recipe.name} quantizes {groups}, but no graph has such weights")
