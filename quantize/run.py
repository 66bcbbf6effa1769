"""The graphs of one bundle in other number formats: smoothed, quantized, measured, and repaired where it hurts."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from u2moe.quantize.calibration import ExpertTokens, recorded
from u2moe.quantize.damage import Array, Damage, DamageMeter, layers_to_spare
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.recipes import LONGEST_S, Recipe
from u2moe.quantize.report import features_of
from u2moe.quantize.smoothing import smoothed_bundle
from u2moe.quantize.weights import Change
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.bundle.contract import INT4_VERSION
from u2moe.runtime.bundle.writer import BundleWriter
from u2moe.runtime.errors import AudioError, BundleError, QuantizationError
from u2moe.runtime.graph.external import with_external
from u2moe.runtime.graph.file import save_graph

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


class QuantizationRun:
    """Makes quantized versions of one float32 bundle, and measures their damage; see `opened_run`."""

    def __init__(
        self,
        source: Bundle,
        heard: Sequence[Array],
        folder: Path,
        tokens: ExpertTokens | None,
        progress: Progress,
    ) -> None:
        """`heard` are features of the calibration's recordings; `folder` is for temporary files."""
        self._source, self._heard, self._folder, self._tokens, self._progress = source, heard, folder, tokens, progress
        shift_s = source.manifest.features.frame_shift_ms / 1000
        self._seconds = sum(map(len, heard)) * shift_s
        self._measured = list(_first(heard, round(DAMAGE_S / shift_s), source.manifest.model.window))

    def quantize(self, recipe: Recipe, staging: BundleWriter) -> QuantizedBundle:
        """Stage the bundle with its graphs quantized, in place of what was staged before.

        Raises:
            BundleError: a group requested by name is missing.
        """
        changes: dict[str, Change] = {}
        graphs = self._source.manifest.model.graphs()
        for number, graph in enumerate(graphs, start=1):
            self._progress(f"[{number}/{len(graphs)}] quantizing {graph.file}")
            model = ir.load(self._source.path / graph.file)
            changes |= quantize_graph(model, recipe, self._tokens)
            (staging.path / f"{graph.file}.data").unlink(missing_ok=True)
            save_graph(model, staging.path / graph.file, progress=self._progress)
        counts = Counter(change.group for change in changes.values())
        if not recipe.exceptions:
            _check_found(self._source, recipe, counts)
        quantized = tuple(graph.file for graph in self._source.manifest.model.graphs())
        for name in self._source.manifest.files:
            if not name.startswith(quantized):  # nor the weights beside a graph
                staging.add(name, self._source.path / name)
        record = self._record(recipe, counts)
        manifest = with_external(dataclasses.replace(self._source.manifest, quantization=record), staging.path)
        return QuantizedBundle(recipe=recipe, bundle=staging.seal(manifest), changes=changes)

    def damage(self, made: QuantizedBundle) -> Damage:
        """The damage of every layer on the first two minutes of the recordings."""
        return self._meter(made).measure(self._progress)

    def repaired(self, made: QuantizedBundle, staging: BundleWriter, limit: float) -> QuantizedBundle:
        """`made` with better formats where it hurts most, so that at most a share `limit` of the tokens changes.

        The better format is int8 for experts in 4 bits if there are any, and else float32.

        Raises:
            QuantizationError: the better format of all these layers is not enough.
        """
        meter = self._meter(made)
        if meter.num_tokens * limit < 1:
            raise AudioError(
                f"calibration: found {meter.num_tokens} tokens in the first {DAMAGE_S} s, but one of them is more than "
                f"{limit:.2%}: expected recordings with at least {math.ceil(1 / limit)} tokens"
            )
        if meter.total(meter.layers)[1] <= limit:
            return made
        if made.recipe.groups.get("experts") == "int4":
            better = "int8"
            recipe = dataclasses.replace(made.recipe, groups={**made.recipe.groups, "experts": better})
            with BundleWriter(self._folder / "better") as other:
                base = self.quantize(recipe, other).bundle
                meter = DamageMeter(base, made.bundle, self._measured, meter.log_probs)
                spared, share = self._spared(meter, limit)
        else:
            better = "fp32"
            spared, share = self._spared(meter, limit)
        if share > limit:
            raise QuantizationError(
                f"{share:.2%} of the tokens change with all of {', '.join(spared)} in {better}, more than {limit:.2%}; "
                f"allow more, or start from a better recipe than {made.recipe.name}"
            )
        self._progress(f"damage: {better} for {', '.join(spared) or 'no layer'}; {share:.2%} of the tokens change")
        exceptions = {**made.recipe.exceptions, **dict.fromkeys(spared, better)}
        return self.quantize(dataclasses.replace(made.recipe, exceptions=exceptions), staging)

    def _spared(self, meter: DamageMeter, limit: float) -> tuple[list[str], float]:
        return layers_to_spare(meter, meter.measure(self._progress), limit, self._progress)

    def _meter(self, made: QuantizedBundle) -> DamageMeter:
        return DamageMeter(self._source, made.bundle, self._measured)

    def _record(self, recipe: Recipe, changed: Counter[str]) -> dict[str, Any]:
        """The recipe as the manifest records it."""
        record: dict[str, Any] = {
            "recipe": recipe.name,
            "groups": dict(recipe.quantized),
            "whole": recipe.whole,
            "block_size": recipe.block_size,
            "num_weights": dict(sorted(changed.items())),
        }
        if "int4" in recipe.quantized.values():
            record["int4_version"] = INT4_VERSION
        if self._heard:
            experts = self._tokens.data() if self._tokens else {}
            record["calibration"] = {"seconds": round(self._seconds, 2), **experts}
        if recipe.exceptions:
            record["exceptions"] = dict(recipe.exceptions)
        return record


@contextmanager
def opened_run(bundle: Bundle, recipe: Recipe, beside: Path, progress: Progress) -> Iterator[QuantizationRun]:
    """A run for a float32 bundle, which is smoothed first if the recipe has recordings for calibration.

    Temporary files are in the folder `beside`, because the system's is often in memory: a copy of the bundle, and the
    tokens of 4-bit experts.

    Raises:
        AudioError: a recording cannot be read, or all of them are too short for the encoder.
    """
    if not recipe.calibration:
        yield QuantizationRun(bundle, [], beside, None, progress)
        return
    limit = round(LONGEST_S * 1000 / bundle.manifest.features.frame_shift_ms)
    heard = features_of(bundle, recipe.calibration, limit=limit)
    if not heard:
        raise AudioError(f"calibration: {recipe.calibration[0]} and all others are too short for the encoder")
    with tempfile.TemporaryDirectory(prefix="quantizing-", dir=beside, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        smoothed = smoothed_bundle(bundle, folder / "smoothed", heard, progress)
        tokens: AbstractContextManager[ExpertTokens | None] = nullcontext()
        if recipe.groups.get("experts") == "int4":
            tokens = recorded(smoothed, heard, folder, progress)
        with tokens as by_expert:
            yield QuantizationRun(smoothed, heard, folder, by_expert, progress)


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
