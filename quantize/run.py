"""Make versions of a bundle in other formats: smooth, quantize, pack and measure them."""

import contextlib
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from u2moe.quantize.changes import finite_numbers
from u2moe.quantize.comparison import Difference, compare
from u2moe.quantize.damage import DamageMeter
from u2moe.quantize.layers import Change, layer_of
from u2moe.quantize.observed import LeanSettings
from u2moe.quantize.packing import pack_graph, save_mapped
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.progress import Progress, shares
from u2moe.quantize.recipes import BLOCK_SIZES, Goal, Recipe
from u2moe.quantize.recordings import Audio, read_audio
from u2moe.quantize.rounding import Activations, recorded
from u2moe.quantize.smoothing import add_others, rewritten_bundle, smooth
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.weight_formats import quantized
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.errors import BundleError, QuantizationError
from u2moe.runtime.graph.file import group_of, save_graph, shape_of, with_external
from u2moe.runtime.model.native import CPU, choose_kernels
from u2moe.runtime.whole_file import locked

GOAL_BYTES = 400
TEMPORARY, LOCK_FILE = "quantizing-", "lock"  # prefix of temporary folders, and the file in them that is locked
UNROUNDED = {"embeddings", "subsampling"}  # groups of weights that are rounded without recordings
UNLOCKED_S = 10  # seconds that a process may take to lock its temporary folder


@dataclass(frozen=True, kw_only=True)
class QuantizedBundle:
    """A quantized bundle in a temporary folder, and the same bundle packed in another one, if its recipe packs.

    `changes` contains the replaced weights, by the names of the new weights.
    """

    recipe: Recipe
    bundle: Bundle
    changes: Mapping[str, Change]
    packed: Bundle | None = None

    @property
    def written(self) -> Bundle:
        """The bundle to write."""
        return self.packed or self.bundle

    @property
    def num_bytes(self) -> int:
        """Bytes of all files to write, plus room for the manifest's entry `goal`."""
        return sum(file.stat().st_size for file in self.written.path.iterdir()) + GOAL_BYTES


@dataclass(frozen=True)
class QuantizationRun:
    """Makes quantized versions of one float32 bundle and measures their damage; see `opened_run`."""

    source: Bundle  # smoothed if there are recordings
    folder: Path  # for temporary files
    progress: Progress
    audio: Audio = field(default_factory=Audio)
    activations: Activations | None = None  # inputs of layers on the calibration recordings
    journal: Path | None = None  # file of measurements
    layout: int = 0  # version of the native kernels' layout; 0 for recipes that do not pack

    def quantize(self, recipe: Recipe, staging: BundleWriter) -> QuantizedBundle:
        """Stage the bundle with quantized graphs, replacing what was staged before. The manifest records the recipe.

        Raises BundleError if a layer in `exceptions` or a group requested by name is missing, or nothing can be packed.
        """
        changes, kept, layers = dict[str, Change](), set[str](), set[str]()
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
            raise BundleError(f"{self.source.path}: has no layer {' or '.join(unknown)}; layers are {known}")
        counts = Counter(change.group for change in changes.values())
        if not recipe.exceptions:
            _check_found(self.source, recipe, counts)
        add_others(staging, self.source)
        record = self._record(recipe, counts)
        if kept:
            record["beyond_half_precision"] = sorted(kept)
        manifest = with_external(replace(self.source.manifest, quantization=record), staging.path)
        made = QuantizedBundle(recipe=recipe, bundle=staging.seal(manifest), changes=changes)
        return replace(made, packed=self._packed(made.bundle)) if recipe.packed else made

    def smallest(self, recipe: Recipe, staging: BundleWriter, limit: float | None) -> QuantizedBundle:
        """Quantize the bundle. While a result exceeds `limit` bytes, try larger blocks. Return the smallest result."""
        made = self.quantize(recipe, staging)
        sizes = {made.num_bytes: recipe}
        has_blocks = any(kind.block_sizes for kind in quantized(recipe.groups))
        for size in BLOCK_SIZES if limit and has_blocks else ():
            if size > recipe.block_size and made.num_bytes > (limit or 0):
                made = self.quantize(replace(recipe, block_size=size), staging)
                sizes.setdefault(made.num_bytes, made.recipe)
        best = sizes[min(sizes)]  # larger blocks may take more bytes, because few rows do not fill them
        return made if best == made.recipe else self.quantize(best, staging)

    def compare(self, made: QuantizedBundle) -> Difference:
        """Compare with float32 on `audio.judges`. Raises QuantizationError if a graph returns NaN or infinity."""
        judges, show = self.audio.judges, shares(self.progress, "comparing with float32")
        with finite_numbers("on the recordings"):
            reference = self.source.load(LeanSettings())
            written = made.written.load(LeanSettings(kernels="native" if made.packed else None))
            return compare(reference, written, judges, lambda number: show(number / len(judges)))

    def damage(self, made: QuantizedBundle) -> dict[str, Any]:
        """Return the damage of every layer and of the whole quantized bundle, as plain data."""
        meter = DamageMeter([self.source, made.bundle], self.audio.chooses, self.journal)
        damage, written = meter.measure(shares(self.progress, "damage of each layer")), self.compare(made)
        return {**asdict(damage), "formats": ["fp32", made.recipe.name], **written.summary()}

    def _packed(self, made: Bundle) -> Bundle:
        """Write and return a copy of the bundle with packed weights."""
        num_packed = 0
        with BundleWriter(self.folder / "packed", overwrite=True) as other:
            for graph in made.manifest.model.graphs():
                self.progress(f"packing {graph.file}")
                model = ir.load(made.path / graph.file)
                num_packed += pack_graph(model, self.layout)
                save_mapped(model, other.path / graph.file, self.progress)
            if not num_packed:
                found = made.manifest.quantization["recipe"]
                raise BundleError(f"with recipe {found}, native kernels use none of the weights; nothing can be packed")
            add_others(other, made)
            quantization = {**made.manifest.quantization, contract.PACKED: self.layout}
            manifest = replace(made.manifest, quantization=quantization)
            return other.finish(with_external(manifest, other.path))

    def _record(self, recipe: Recipe, changed: Counter[str]) -> dict[str, Any]:
        """Return the manifest's record of the recipe."""
        record: dict[str, Any] = {"recipe": recipe.name, "groups": dict(recipe.quantized), "whole": recipe.whole}
        record |= {"block_size": recipe.block_size, "num_weights": dict(sorted(changed.items()))}
        record |= {f"{kind.name}_version": kind.version for kind in quantized(recipe.groups) if kind.version}
        if self.activations:
            products = {name: self.activations.products[name] for name in ("compensated_products", "plain_products")}
            record["calibration"] = {"seconds": round(self.audio.seconds, 2), **products}
        if recipe.exceptions:
            record["exceptions"] = dict(recipe.exceptions)
        return record


def _rounding(model: ir.Model, recipe: Recipe, file: str, progress: Progress) -> Callable[[int], None]:
    """Return a callback for `Activations.done` that reports the progress of rounding a graph's weights."""
    groups = recipe.quantized.keys() - UNROUNDED
    shapes = [shape_of(value) for value in model.graph.initializers.values() if group_of(value) in groups]
    total, done = sum(math.prod(shape) for shape in shapes if len(shape) == 2), 0
    show = shares(progress, f"rounding {file}")

    def report(size: int) -> None:
        nonlocal done
        done += size
        show(min(done / max(total, 1), 1.0))

    return report


@contextlib.contextmanager
def opened_run(
    bundle: Bundle, recipe: Recipe, goal: Goal, beside: Path, progress: Progress, journal: Path | None = None
) -> Iterator[QuantizationRun]:
    """Open a run for a float32 bundle, which is smoothed first if the recipe has recordings for calibration.

    Temporary files are kept in a folder in `beside`, because the system's temporary folder is often in memory. They
    include a copy of the bundle and the inputs of its layers. Measurements are kept in the file `journal`, if given.

    Raises the errors of `read_audio` and `recorded`, and QuantizationError if even the smallest formats exceed
    `goal.max_bytes`.
    """
    layout = choose_kernels("native", [CPU]).layout if recipe.packed else 0
    with temporary_folder(beside) as folder:
        run = QuantizationRun(bundle, folder, progress, journal=journal, layout=layout)
        if not recipe.calibration:
            yield run
            return
        if goal.max_bytes is not None:
            with BundleWriter(folder / "smallest") as other:  # calibration does not change the size
                size = run.smallest(replace(recipe, calibration=()), other, goal.max_bytes).num_bytes
            if size > goal.max_bytes:
                raise QuantizationError(
                    f"no choice of formats meets the goal (at most {goal.max_bytes / 1e6:g} MB): even the smallest "
                    f"formats (recipe {recipe.name}) need {size / 1e6:.2f} MB"
                )
        audio = read_audio(bundle, recipe, goal)
        activations = recorded(bundle, audio.calibrates, folder, progress)
        show = shares(progress, "smoothing channels")
        smoothed = rewritten_bundle(
            bundle, folder / "smooth", lambda models: progress(f"smoothed {smooth(models, activations, show)} channels")
        )
        yield replace(run, source=smoothed, audio=audio, activations=activations)


@contextlib.contextmanager
def temporary_folder(beside: Path) -> Iterator[Path]:
    """Create a folder for temporary files, and remove the folders that killed processes left behind."""
    for other in beside.glob(f"{TEMPORARY}*"):
        is_new = not (other / LOCK_FILE).exists() and time.time() - other.stat().st_mtime < UNLOCKED_S
        if not is_new and sys.platform != "win32":  # on Windows, the process that made it may be alive
            with contextlib.suppress(OSError), locked(other / LOCK_FILE):
                shutil.rmtree(other, ignore_errors=True)
    made = tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=beside, ignore_cleanup_errors=True)
    with made as name, locked(Path(name) / LOCK_FILE):
        yield Path(name)


def _check_found(source: Bundle, recipe: Recipe, changed: Counter[str]) -> None:
    """Raise BundleError if nothing was quantized, or if a missing group is required or belongs in every model."""
    missing = recipe.quantized.keys() - changed.keys()
    by_nature = {"experts", "feed_forward", "pointwise_convolutions", "embeddings"} - set(recipe.required)
    if missing - by_nature or not changed:
        groups = ", ".join(sorted(missing))
        raise BundleError(f"{source.path}: recipe {recipe.name} quantizes {groups}, but no graph has such weights")
