"""Quantizes a float32 bundle: writes a new bundle weight by weight, checks that it runs, and reports on it."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from u2moe.quantize.changes import check_runs, finite_numbers, worst_layers, worst_of
from u2moe.quantize.damage import damage_picture
from u2moe.quantize.progress import Progress
from u2moe.quantize.recipes import Goal, Recipe
from u2moe.quantize.recordings import KEPT, read_features
from u2moe.quantize.report import build_report, compare_bytes, front_picture
from u2moe.quantize.run import opened_run
from u2moe.quantize.search import FormatSearch
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.corpus.lists import Recording
from u2moe.runtime.errors import AudioError, BundleError, QuantizationError
from u2moe.runtime.graph.file import array_of
from u2moe.runtime.model.native import CPU, choose_kernels
from u2moe.runtime.text.word_errors import words

Folder = str | os.PathLike[str]


def quantize_bundle(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    recipe: Recipe,
    *,
    audio: Sequence[Path] = (),
    recordings: Sequence[Recording] = (),
    goal: Goal | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Bundle, dict[str, Any] | None]:
    """Quantize the bundle in folder `bundle` into a new one in folder `out`.

    Args:
        bundle: folder of a float32 bundle.
        out: folder to write; unchanged if anything fails.
        recipe: weights to quantize and their formats.
        audio: audio files for the measurements in the report.
        recordings: recordings with transcripts, for word error rates in the report; their audio is added to `audio`.
        goal: limits that the bundle must meet; None: no limits. If the recipe has recordings for calibration, layers
            get better formats where the limits require or permit it. Otherwise only `max_wer_increase` is checked.
        overwrite: replace an existing bundle.
        progress: called with a line for each step.

    Returns:
        The new bundle, and its report (None without audio), which is also saved in the bundle as report.json.

    Raises:
        AudioError: audio cannot be read, or all of it is too short for the encoder.
        BundleError: the bundle is not float32, a file of weights has several names (hard links), a group of weights in
            the recipe exists in no graph, or the target cannot be written.
        KernelsError: the recipe packs weights, but native kernels are not installed or cannot run here.
        QuantizationError: a weight is NaN or infinite, a written graph returns NaN or infinity, the word error rate
            rose by more than `max_wer_increase` (the error then carries the report), or no choice of formats meets the
            goal.
    """
    goal = goal or Goal()
    if goal.max_wer_increase is not None and not any(words(recording.transcript) for recording in recordings):
        raise ValueError("max_wer_increase needs recordings with transcripts that contain words")
    if goal.searched and not recipe.calibration:
        raise ValueError("limits on damage, size and time require recordings for calibration (--calibrate)")
    if goal.resume and not (goal.limits and recipe.calibration):
        raise ValueError("resume needs at least one limit, such as max_damage, and recordings for calibration")
    kept = next((file for file in recipe.calibration if file.suffix == KEPT), None)
    journal = Path(f"{kept or os.fspath(out)}.damage.jsonl") if kept or goal.resume else None
    source = _open_float32(bundle, out, recipe)
    with BundleWriter(out, overwrite=overwrite) as staging:  # rejects an invalid target before any work
        measured = [*audio, *(recording.path for recording in recordings)]
        heard = read_features(source, measured)
        if measured and not heard:
            raise AudioError(
                f"{measured[0]} and all other recordings are too short for the encoder; nothing can be measured"
            )
        with opened_run(source, recipe, goal, staging.path.parent, progress, journal) as run:
            made, search = run.smallest(recipe, staging, goal.max_bytes), None
            if recipe.calibration and goal.limits:
                search = FormatSearch(run, made, staging, goal)
                made = search.choose()
            check_runs(made.bundle)
            report: dict[str, Any] | None = None
            while heard:
                with finite_numbers("on the recordings"):
                    report = build_report(run.source, made.bundle, made.changes, heard, recordings, progress)
                risen = _risen(report, goal.max_wer_increase)
                if not risen:
                    break
                if search is None or not search.improve():
                    raise QuantizationError(risen, report)
                made = search.made
            if report is not None:
                damage = None
                if recipe.calibration:
                    damage = report["damage"] = search.report() if search else run.damage(made)
                progress("most damaging layers")
                layers = worst_of(damage["layers"]) if damage else worst_layers(run.source, made.bundle, heard[0][1])
                report["changes"]["layers"] = layers
            manifest = made.written.manifest
            if search:
                manifest = dataclasses.replace(manifest, quantization={**manifest.quantization, "goal": search.goal()})
            if made.packed:
                check_runs(made.packed)
                for graph in manifest.model.graphs():
                    (staging.path / f"{graph.file}.data").unlink(missing_ok=True)
                    for file in made.packed.path.glob(f"{graph.file}*"):
                        shutil.move(file, staging.path / file.name)
                if report is not None:
                    report["bytes"] = compare_bytes(source, staging.seal(manifest))
        if report is not None:
            if damage:
                staging.add("damage.svg", damage_picture(damage))
                if front := damage.get("front"):
                    staging.add("front.svg", front_picture(front, goal.max_damage))
            staging.add("report.json", json.dumps(report, indent=1) + "\n")
        written = staging.finish(manifest)
    if journal is not None and not kept:
        journal.unlink(missing_ok=True)
    return written, report


def sizes_of(
    bundle: Folder, out: Folder, recipe: Recipe, *, overwrite: bool = False, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Return `compare_bytes` of what `quantize_bundle` would write without a goal or report. Nothing is measured."""
    source = _open_float32(bundle, out, recipe)
    with (
        BundleWriter(out, overwrite=overwrite) as staging,
        opened_run(source, recipe, Goal(), staging.path.parent, progress) as run,
    ):
        return compare_bytes(source, run.quantize(recipe, staging).written)


def _open_float32(bundle: Folder, out: Folder, recipe: Recipe) -> Bundle:
    if recipe.packed:
        choose_kernels("native", [CPU])  # raises an error if they cannot run, before any work
    source = Bundle.open(bundle)
    if source.manifest.quantization:
        found = source.manifest.quantization.get("recipe")
        raise BundleError(f"{source.path}: is already quantized ({found}), expected a float32 bundle")
    if Path(out).resolve() == source.path.resolve():
        raise BundleError(f"{source.path}: a bundle cannot be quantized in place; choose another folder")
    for name in source.manifest.files:
        names = (source.path / name).stat().st_nlink
        if name.endswith(".onnx.data") and names > 1:  # onnx-ir rejects hard links as an attack
            raise BundleError(f"{source.path / name}: has {names} names (hard links), expected one; copy the bundle")
    for graph in source.manifest.model.graphs():
        weights = ir.load(source.path / graph.file).graph.initializers.items()
        if bad := [name for name, value in weights if not np.isfinite(array_of(value)).all()]:
            raise QuantizationError(f"{source.path / graph.file}: has weights that are not finite: {', '.join(bad)}")
    return source


def _risen(report: dict[str, Any], limit: float | None) -> str:
    """Return a message about a word error rate that rose by more than the limit; "" if none did."""
    for name, item in report.get("text", {}).items():
        if limit is not None and item["wer_after"] - item["wer_before"] > limit:
            return (
                f"{name}: word error rate rose from {item['wer_before']:.2%} to {item['wer_after']:.2%}, "
                f"by more than {limit:.2%}"
            )
    return ""
