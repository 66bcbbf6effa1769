"""From a float32 bundle to a quantized one, never in place: read, rewrite, save weight by weight, load."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from u2moe.quantize.config import Recipe
from u2moe.quantize.rewrites import rewrite
from u2moe.runtime.bundle import Bundle, BundleWriter
from u2moe.runtime.errors import BundleError

EXTERNAL_DATA_LIMIT = 1_500_000_000
"""Bytes of weights from which they are saved beside the graph, as the exporter does."""


def quantize_bundle(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Bundle, dict[str, int]]:
    """Quantize the bundle in folder `bundle` into a new one in folder `out`.

    Returns:
        The new bundle, and the number of weights that were quantized in each group.

    Raises:
        BundleError: not a float32 bundle of ours, a group that none of its graphs has, or a target that cannot be
            written; nothing is left at `out`.
    """
    source = Bundle.open(bundle)
    if source.manifest.quantization:
        found = source.manifest.quantization.get("recipe")
        raise BundleError(f"{source.path}: is quantized already ({found}), expected a float32 bundle")
    if Path(out).resolve() == source.path.resolve():
        raise BundleError(f"{source.path}: a bundle is not quantized in place; name another folder")
    changed: Counter[str] = Counter()
    with BundleWriter(out, overwrite=overwrite) as staging:
        for graph in source.manifest.model.graphs():
            progress(f"quantizing {graph.file}")
            model = ir.load(source.path / graph.file)
            changed += rewrite(model, recipe)
            _save(model, staging.path / graph.file, progress)
        _check_found(source, recipe, changed)
        graph_files = {name for name in source.manifest.files if name.endswith((".onnx", ".onnx.data"))}
        for name in source.manifest.files.keys() - graph_files:
            staging.add(name, source.path / name)
        manifest = dataclasses.replace(source.manifest, quantization=_record(recipe, changed))
        staging.seal(manifest).load()
        return staging.finish(manifest), dict(changed)


def _check_found(source: Bundle, recipe: Recipe, changed: Counter[str]) -> None:
    """A group that a recipe names must exist, unless a network of that kind has none by nature."""
    optional = {"experts", "feed_forward", "embeddings", "pointwise_convolutions"}
    for group in recipe.quantized.keys() - changed.keys() - optional:
        raise BundleError(f"{source.path}: recipe {recipe.name} quantizes {group}, but no graph has such weights")
    if not changed and not recipe.whole:
        groups = ", ".join(recipe.quantized)
        raise BundleError(f"{source.path}: recipe {recipe.name} quantizes {groups}, but no graph has such weights")


def _record(recipe: Recipe, changed: Counter[str]) -> dict[str, object]:
    """What the manifest keeps of a recipe."""
    return {
        "recipe": recipe.name,
        "groups": dict(recipe.quantized),
        "whole": recipe.whole,
        "block_size": recipe.block_size,
        "num_weights": dict(sorted(changed.items())),
    }


def _save(model: ir.Model, file: Path, progress: Callable[[str], None]) -> None:
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]
    external = f"{file.name}.data" if sum(sizes) > EXTERNAL_DATA_LIMIT else None

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if info.index % 100 == 0:
            progress(f"{file.name}: weight {info.index + 1} of {info.total}: {tensor.name}")

    ir.save(model, file, external_data=external, callback=report)
