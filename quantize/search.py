"""The formats of a bundle's layers for a goal: measured, chosen, built, and tried."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from u2moe.quantize.damage import DamageMeter
from u2moe.quantize.goals import Goal, Ladder, Step
from u2moe.quantize.report import encoder_times
from u2moe.quantize.run import DAMAGE_S, QuantizationRun, QuantizedBundle
from u2moe.quantize.switches import Levels
from u2moe.runtime.bundle.weight_formats import HALF, INT8, WEIGHT_FORMATS
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.errors import AudioError, QuantizationError
from u2moe.runtime.model.settings import SessionSettings

NUM_TIMINGS, TIMED_FRAMES, CHUNK_SIZE, NUM_LEFT_CHUNKS = 5, 3000, 16, 4
"""Of the real-time factor: the median of how many, feature frames at most, and chunk size and left chunks."""


class Search:
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
        damage = {**dataclasses.asdict(self._damage), **dataclasses.asdict(total)}
        return {**damage, "formats": [*self._formats, self._recipe.name], "steps": steps}

    def _is_harmless(self, levels: Levels) -> bool:
        found, limit = self._meter.total(levels), self._goal.max_damage or math.inf
        better = sum(level < most for level, most in zip(levels.values(), self._meter.most.values(), strict=True))
        self._run.progress(
            f"damage: {found.changed_tokens:.2%} of the tokens change with {better} layers in better formats"
        )
        return found.changed_tokens <= limit

    def _build(self, steps: Sequence[Step]) -> None:
        self._steps = list(steps)
        levels = self._ladder.levels(steps)
        better = {layer: self._formats[level] for layer, level in levels.items() if level < self._meter.most[layer]}
        recipe = dataclasses.replace(self._recipe, exceptions={**self._recipe.exceptions, **better})
        found = round(self._meter.total(levels).changed_tokens, 4)  # without the digits in which processors differ
        goal = {**self._goal.limits, "changed_tokens": found}
        self.made = self._run.quantize(recipe, self._staging, {"goal": goal})

    def _nearest(self, size: float, factor: float) -> str:
        total = self._meter.total(self._ladder.levels(self._steps))
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
            f"{total.changed_tokens:.2%} of the tokens change: {self._recipe.name}{', ' + chosen if chosen else ''}"
        )


def real_time_factor(bundle: Bundle, features: Sequence[Any]) -> float:
    """Seconds of the encoder, with one thread, for a second of audio; in chunks if it can stream."""
    model = bundle.load(SessionSettings(num_threads=1))
    frames = max(features, key=len)[:TIMED_FRAMES]
    config = model.config
    chunks = (config.whole_chunk(CHUNK_SIZE), NUM_LEFT_CHUNKS) if config.streaming else (None, -1)
    (seconds,) = encoder_times([model], frames, chunks, NUM_TIMINGS)
    return statistics.median(seconds) / (len(frames) * bundle.manifest.features.frame_shift_ms / 1000)
