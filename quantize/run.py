"""The graphs of one bundle in other formats: smoothed, quantized, measured, and chosen for a goal."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from u2moe.quantize.damage import DamageMeter
from u2moe.quantize.goals import Goal, Ladder, Step
from u2moe.quantize.layers import Change
from u2moe.quantize.observed import Array, Levels
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.recipes import LONGEST_S, Recipe
from u2moe.quantize.report import encoder_times, features_of
from u2moe.quantize.rounding import Activations, recorded
from u2moe.quantize.smoothing import rewritten_together, smooth
from u2moe.runtime.bundle.weight_formats import HALF, INT8, WEIGHT_FORMATS, quantized
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.errors import AudioError, BundleError, ProviderError, QuantizationError
from u2moe.runtime.graph.file import save_graph, with_external
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.settings import SessionSettings

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


@dataclass(frozen=True)
class QuantizationRun:
    """Makes quantized versions of one float32 bundle, and measures their damage; see `opened_run`.

    Attributes:
        source: the bundle, smoothed if there are recordings.
        folder: for temporary files.
        progress: called with a line for each step.
        measured: features of the recordings on which damage is measured: their first two minutes.
        activations: what layers read in `seconds` of recordings.
        journal: the file of what was measured; None: none.
    """

    source: Bundle
    folder: Path
    progress: Progress
    measured: Sequence[Array] = ()
    activations: Activations | None = None
    seconds: float = 0.0
    journal: Path | None = None

    def quantize(
        self, recipe: Recipe, staging: BundleWriter, notes: Mapping[str, Any] | None = None
    ) -> QuantizedBundle:
        """Stage the bundle with its graphs quantized, in place of what was staged before.

        The manifest records the recipe, and `notes`.

        Raises:
            BundleError: a group requested by name is missing.
        """
        changes: dict[str, Change] = {}
        kept: set[str] = set()
        if self.activations:
            self.activations.products.clear()
        graphs = self.source.manifest.model.graphs()
        for number, graph in enumerate(graphs, start=1):
            self.progress(f"[{number}/{len(graphs)}] quantizing {graph.file}")
            model = ir.load(self.source.path / graph.file)
            weights = quantize_graph(model, recipe, self.activations)
            changes |= weights.changes
            kept |= weights.kept
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
        if kept:
            record["beyond_half_precision"] = sorted(kept)
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
        if self.activations:
            products = {name: self.activations.products[name] for name in ("compensated_products", "plain_products")}
            record["calibration"] = {"seconds": round(self.seconds, 2), **products}
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
    features = features_of(bundle, recipe.calibration, limit=round(LONGEST_S * frames_s))
    if not features:
        raise AudioError(f"calibration: {recipe.calibration[0]} and all others are too short for the encoder")
    with tempfile.TemporaryDirectory(prefix="quantizing-", dir=beside, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        first = round(DAMAGE_S * frames_s)
        others = after_first(features, first)
        activations = recorded(bundle, others, folder, progress)
        smoothed = rewritten_together(
            bundle, folder / "smoothed", lambda models: progress(f"smoothed {smooth(models, activations)} channels")
        )
        measured = list(_first(features, first, bundle.manifest.model.window))
        seconds = sum(map(len, others)) / frames_s
        yield QuantizationRun(smoothed, folder, progress, measured, activations, seconds, journal)


def check_runs(made: Bundle) -> None:
    """Run each graph of a staged bundle once, for two seconds of noise.

    Raises:
        QuantizationError: a graph gives numbers that are not finite.
    """
    model, config = made.load(), made.manifest.features
    noise = np.random.default_rng(0).normal(scale=0.1, size=2 * config.sample_rate).astype(np.float32)
    output = model.encode(fbank(noise, config))
    runs: dict[str, Callable[[], Array]] = {
        "encoder": lambda: output,
        "ctc": lambda: model.ctc(output),
        "decoder": lambda: np.stack(model.rescore(output, [[0, 1]])),
    }
    for graph in made.manifest.model.graphs():
        found = "numbers that are not finite"
        try:
            if np.isfinite(runs[graph.name]()).all():
                continue
        except ProviderError as error:
            found = str(error)
        raise QuantizationError(f"{graph.file}, for noise: {found}; all weights of the float32 bundle are finite")


def after_first(features: Sequence[Array], limit: int) -> Sequence[Array]:
    """The recordings after the first `limit` frames, on which damage is measured; all, if the others have fewer."""
    ends = itertools.accumulate(map(len, features))
    others = [frames for frames, end in zip(features, ends, strict=True) if end - len(frames) >= limit]
    return others if sum(map(len, others)) >= limit else features


def _first(features: Sequence[Array], limit: int, shortest: int) -> Iterator[Array]:
    """The first `limit` frames of all recordings, without pieces that are too short for the encoder."""
    for frames in features:
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


NUM_TIMINGS, TIMED_FRAMES, CHUNK_SIZE, NUM_LEFT_CHUNKS = 5, 3000, 16, 4
"""Of the real-time factor: the median of how many, feature frames at most, and chunk size and left chunks."""


class FormatSearch:
    """A search for the formats of one bundle.

    Attributes:
        made: the bundle as it is now, in the staging folder.
    """

    def __init__(self, run: QuantizationRun, made: QuantizedBundle, staging: BundleWriter, goal: Goal) -> None:
        """Measure the damage of all layers.

        Args:
            run: makes and measures.
            made: all layers in the smallest formats; each can get a better one: int8 instead of fewer bits, or float16.
            staging: where to put others.
            goal: what the bundle must hold.

        Raises:
            AudioError: the recordings are too short to tell.
        """
        self._run, self._staging, self._goal, self._recipe, self.made = run, staging, goal, made.recipe, made
        versions = {HALF.name: run.source}
        groups = made.recipe.groups
        middle = {group: INT8.name for group, kind in groups.items() if WEIGHT_FORMATS[kind].bits < INT8.bits}
        if middle:
            with BundleWriter(run.folder / INT8.name) as other:
                recipe = dataclasses.replace(made.recipe, groups={**groups, **middle})
                versions[INT8.name] = other.finish(run.quantize(recipe, other).bundle.manifest)
        self._formats = list(versions)
        self._versions = [*versions.values(), made.bundle]
        self._size = made.num_bytes
        self._meter = meter = DamageMeter(self._versions, run.measured, run.journal)
        if goal.max_damage is not None and meter.num_tokens * goal.max_damage < 1:
            raise AudioError(
                f"calibration: found {meter.num_tokens} tokens in the first {DAMAGE_S} s, but one of them is more than "
                f"{goal.max_damage:.2%}: expected recordings with at least {math.ceil(1 / goal.max_damage)} tokens"
            )
        self._damage = meter.measure(run.progress)
        layers = [
            dataclasses.replace(item, bytes=[item.bytes[0] // 2, *item.bytes[1:]]) for item in self._damage.layers
        ]  # written in half precision
        self._ladder = Ladder(dataclasses.replace(self._damage, layers=layers))
        self._steps: list[Step] = []

    def choose(self) -> QuantizedBundle:
        """The bundle for the goal.

        Raises:
            QuantizationError: none meets it; the nearest is described.
        """
        goal, ladder = self._goal, self._ladder
        times = [real_time_factor(version, self._run.measured) for version in self._versions] if goal.target_rtf else []
        budgets = [(goal.max_bytes or math.inf) - self._size, (goal.target_rtf or math.inf) - (times or [0])[-1]]

        def costs(step: Step) -> Sequence[float]:
            seconds = self._meter.share(step.layer) * (times[step.level] - times[step.after]) if times else 0.0
            return step.bytes, seconds

        while True:
            if goal.max_damage is not None:
                found = ladder.fewest(self._is_harmless)
                steps = ladder.steps if found is None else found
            elif goal.max_bytes is None and goal.target_rtf is None:
                found = steps = []
            else:
                found = ladder.most(costs, budgets)
                steps = found or []
            self._build(steps)
            limits = [self._goal.max_bytes or math.inf, self._goal.target_rtf or math.inf]
            sizes = [self.made.num_bytes, real_time_factor(self.made.bundle, self._run.measured) if times else 0.0]
            if found is not None and all(size <= limit for size, limit in zip(sizes, limits, strict=True)):
                return self.made
            if not steps or goal.max_damage is not None:
                raise QuantizationError(self._nearest(*sizes))
            for index, (size, limit) in enumerate(zip(sizes, limits, strict=True)):
                if size > limit:  # at last nothing is left, for which the smallest formats may be enough
                    least = 0.0 if budgets[index] > 0 else -math.inf
                    budgets[index] = max(budgets[index] - max(1.1 * (size - limit), 0.02 * limit), least)

    def improve(self) -> bool:
        """Take twice as many steps; False: there are no more, or the goal allows none."""
        others = [step for step in self._ladder.steps if step not in self._steps]
        if not others or self._goal.max_bytes or self._goal.target_rtf:
            return False
        self._build([*self._steps, *others[: max(len(self._steps), 1)]])
        return True

    def report(self) -> dict[str, Any]:
        """The damage of all layers, and what was chosen why, as plain data."""
        total = self._meter.total(self._ladder.levels(self._steps))
        steps = [
            {"layer": step.layer, "format": self._formats[step.level], "gain": step.gain, "bytes": step.bytes}
            for step in self._steps
        ]
        damage = {**dataclasses.asdict(self._damage), **total}
        return {**damage, "formats": [*self._formats, self._recipe.name], "steps": steps}

    def _is_harmless(self, levels: Levels) -> bool:
        found = self._meter.total(levels)["changed_tokens"]
        better = sum(level < most for level, most in zip(levels.values(), self._meter.most.values(), strict=True))
        self._run.progress(f"damage: {found:.2%} of the tokens change with {better} layers in better formats")
        return found <= (self._goal.max_damage or math.inf)

    def _build(self, steps: Sequence[Step]) -> None:
        self._steps = list(steps)
        levels = self._ladder.levels(steps)
        better = {layer: self._formats[level] for layer, level in levels.items() if level < self._meter.most[layer]}
        recipe = dataclasses.replace(self._recipe, exceptions={**self._recipe.exceptions, **better})
        found = round(self._meter.total(levels)["changed_tokens"], 4)  # without the digits in which processors differ
        goal = {**self._goal.limits, "changed_tokens": found}
        self.made = self._run.quantize(recipe, self._staging, {"goal": goal})

    def _nearest(self, size: float, factor: float) -> str:
        changed = self._meter.total(self._ladder.levels(self._steps))["changed_tokens"]
        layers = defaultdict(list)
        for step in self._steps:
            layers[self._formats[step.level]].append(step.layer)
        limits = {
            f"at most {self._goal.max_damage or 0:.2%} of the tokens change": self._goal.max_damage,
            f"at most {(self._goal.max_bytes or 0) / 1e6:g} MB": self._goal.max_bytes,
            f"real-time factor at most {self._goal.target_rtf or 0:g}": self._goal.target_rtf,
        }
        wanted = ", ".join(text for text, limit in limits.items() if limit is not None)
        chosen = "; ".join(f"{kind} for {', '.join(names)}" for kind, names in layers.items())
        speed = f", its real-time factor is {factor:.3f}" if factor else ""
        return (
            f"no choice of formats meets the goal ({wanted}); the nearest has {size / 1e6:.1f} MB{speed}, and "
            f"{changed:.2%} of the tokens change: {self._recipe.name}{', ' + chosen if chosen else ''}"
        )


def real_time_factor(bundle: Bundle, features: Sequence[Any]) -> float:
    """Seconds of the encoder, with one thread, for a second of audio; in chunks if it can stream."""
    model = bundle.load(SessionSettings(num_threads=1))
    frames = max(features, key=len)[:TIMED_FRAMES]
    config = model.config
    chunks = (config.whole_chunk(CHUNK_SIZE), NUM_LEFT_CHUNKS) if config.streaming else (None, -1)
    (seconds,) = encoder_times([model], frames, chunks, NUM_TIMINGS)
    return statistics.median(seconds) / (len(frames) * bundle.manifest.features.frame_shift_ms / 1000)
