"""A search for layer formats. It chooses formats by divergence, which is smooth, and judges them by changed tokens."""

import bisect
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from u2moe.quantize.arithmetic import NOTHING
from u2moe.quantize.comparison import DOUBT, Difference, compare
from u2moe.quantize.damage import Damage, DamageMeter
from u2moe.quantize.observed import LeanSettings, Levels
from u2moe.quantize.progress import shares
from u2moe.quantize.recipes import Goal
from u2moe.quantize.report import encoder_times
from u2moe.quantize.run import QuantizationRun, QuantizedBundle
from u2moe.runtime.bundle.weight_formats import HALF, INT8, WEIGHT_FORMATS
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.errors import QuantizationError
from u2moe.runtime.model.settings import SessionSettings

NUM_TIMINGS, TIMED_FRAMES = 5, 3000  # for the real-time factor: number of timings, maximum feature frames
CHUNK_SIZE, NUM_LEFT_CHUNKS = 16, 4
MOST_LONGER = 1000  # a limit is out of reach if judging it would need more than this many times the available audio
LEAST_FALL, LEAST_SHARE = 0.5, 0.01
"""If a bundle exceeds the limits on damage, the target for the next bundle is between about `LEAST_SHARE` and
`LEAST_FALL` times its divergence."""


@dataclass(frozen=True)
class Step:
    """A change of one layer to a better format: from the level `after` to the lower level `level`."""

    layer: str
    after: int
    level: int
    gain: float  # divergence that the step removes, in nats per frame
    bytes: int  # what it adds to the bundle


class Ladder:
    """Steps to better formats, ordered by gain per byte, the largest first; a greedy search takes them in this order.

    Before the first step, all layers are at their last levels; after the last step, at level 0.
    """

    def __init__(self, damage: Damage) -> None:
        self._most = {item.layer: len(item.bytes) - 1 for item in damage.layers}
        self.steps: list[Step] = []
        for item in damage.layers:
            level = self._most[item.layer]
            while level > 0:  # by decreasing gain per byte; a step skips levels if it gains more per byte that way
                options = [
                    Step(item.layer, level, lower, item.alone[level] - item.alone[lower], size - item.bytes[level])
                    for lower, size in enumerate(item.bytes[:level])
                ]
                self.steps.append(max(options, key=lambda step: (step.gain / max(step.bytes, 1), step.level)))
                level = self.steps[-1].level
        # a stable sort by rounded gain per byte, because processors differ in the last digits
        self.steps.sort(key=lambda step: -float(f"{step.gain / max(step.bytes, 1):.3g}"))

    def levels(self, steps: Sequence[Step]) -> Levels:
        """Return the level of each layer after these steps."""
        levels = dict(self._most)
        for step in steps:
            levels[step.layer] = min(levels[step.layer], step.level)
        return levels

    def fewest(self, is_enough: Callable[[Levels], bool]) -> list[Step]:
        """Find, by bisection, the shortest prefix of steps that is enough. If no prefix is enough, return all steps."""
        numbers = range(len(self.steps))
        number = bisect.bisect_left(numbers, 1, key=lambda number: is_enough(self.levels(self.steps[:number])))
        return self.steps[:number]

    def most(self, costs: Callable[[Step], Sequence[float]], budgets: Sequence[float]) -> list[Step] | None:
        """Return the steps that fit the budgets, or None if a budget is below zero and no steps compensate for it."""
        levels, chosen, left = dict(self._most), [], list(budgets)
        for step in sorted(self.steps, key=lambda step: min(costs(step)) >= 0):  # first those that reduce a cost
            after = [budget - cost for budget, cost in zip(left, costs(step), strict=True)]
            gets_better = all(new >= min(old, 0) for new, old in zip(after, left, strict=True))
            if step.after == levels[step.layer] and gets_better:
                levels[step.layer], left = step.level, after
                chosen.append(step)
        return chosen if min(left) >= 0 else None


class FormatSearch:
    """A search for the layer formats of one bundle. `made` is the current bundle, in the staging folder."""

    def __init__(self, run: QuantizationRun, made: QuantizedBundle, staging: BundleWriter, goal: Goal) -> None:
        """Measure the damage of all layers of `made`, the bundle with all layers in the smallest formats.

        The better formats to choose from are float16 and, for weights with fewer than 8 bits, int8.
        """
        self._run, self._staging, self._goal, self._smallest, self.made = run, staging, goal, made, made
        self._limits = goal.max_bytes or math.inf, goal.target_rtf or math.inf
        versions, groups = {HALF.name: run.source}, made.recipe.groups
        middle = {group: INT8.name for group, kind in groups.items() if WEIGHT_FORMATS[kind].bits < INT8.bits}
        if middle:
            with BundleWriter(run.folder / INT8.name) as other:
                recipe = replace(made.recipe, groups={**groups, **middle}, packed=False)
                versions[INT8.name] = other.finish(run.quantize(recipe, other).bundle.manifest)
        self._formats = list(versions)
        with BundleWriter(run.folder / "last") as other:  # the staged files will change
            for name in made.bundle.manifest.files:
                other.add(name, made.bundle.path / name)
            self._versions = [*versions.values(), other.finish(made.bundle.manifest)]
        self._size = made.num_bytes
        self._meter = DamageMeter(self._versions, run.audio.chooses, run.journal)
        self._damage = self._meter.measure(shares(run.progress, "damage of each layer"))
        # level 0 is written in half precision
        layers = [replace(item, bytes=[item.bytes[0] // 2, *item.bytes[1:]]) for item in self._damage.layers]
        self._bytes = {item.layer: item.bytes for item in layers}
        smallest = {"bytes": self._size, "divergence": self._damage.divergence}
        self._met: dict[frozenset[tuple[str, int]], dict[str, Any]] = {frozenset(self._meter.most.items()): smallest}
        self._ladder = Ladder(replace(self._damage, layers=layers))
        self._steps: list[Step] = []
        self._difference: Difference | None = None

    def choose(self) -> QuantizedBundle:
        """Return the bundle with formats that meet the goal. Raises QuantizationError, which names the nearest."""
        if self._goal.max_damage is not None or self._goal.max_divergence is not None:
            self._keep_limits_on_damage()
            if any(self._excesses()):
                raise QuantizationError(self._nearest())
        elif self._goal.searched:
            self._use_budgets()
        return self.made

    def _keep_limits_on_damage(self) -> None:
        """Build the smallest bundle whose damage, measured on recordings reserved for judging, is within the limits."""
        # Each attempt halves the accepted probability of error, so that the intervals of all attempts stay reliable.
        self._meter.unload()
        lean, doubt, audio = LeanSettings(), DOUBT, self._run.audio
        found = compare(self._run.source.load(lean), self._versions[-1].load(lean), audio.chooses)
        more = sum(map(len, audio.judges)) / sum(map(len, audio.chooses))
        target = self._damage.divergence * self._bearable(found, doubt, more)
        while True:
            steps = self._ladder.fewest(lambda levels: self._divergence(levels) <= target)  # noqa: B023 - called at once
            self._build(steps)
            found = self._compared()
            if self._holds(found, doubt):
                return
            if len(steps) == len(self._ladder.steps):
                raise QuantizationError(f"{self._nearest()}; {self._audio_needed(found, doubt)}")
            now = min(target, self._divergence(self._ladder.levels(steps)))
            target, doubt = now * min(self._bearable(found, doubt / 2), LEAST_FALL), doubt / 2

    def _use_budgets(self) -> None:
        """Build the best bundle within the budgets for size and time; reduce them while it exceeds a limit."""
        times = [0.0] * len(self._versions)
        if self._goal.target_rtf:
            times = [real_time_factor(version, self._run.audio.chooses) for version in self._versions]
        budgets = [limit - cost for limit, cost in zip(self._limits, (self._size, times[-1]), strict=True)]

        def costs(step: Step) -> Sequence[float]:
            return step.bytes, self._meter.share(step.layer) * (times[step.level] - times[step.after])

        while True:
            found = self._ladder.most(costs, budgets)
            self._build(found or [])
            excesses = self._excesses()
            if found is not None and not any(excesses):
                return
            if not found:
                raise QuantizationError(self._nearest())
            for index, excess in enumerate(excesses):
                if excess:  # the budget may reach zero, which forces the smallest formats
                    least = 0.0 if budgets[index] > 0 else -math.inf
                    budgets[index] = max(budgets[index] - max(1.1 * excess, 0.02 * self._limits[index]), least)

    def improve(self) -> bool:
        """Double the number of steps taken. If no steps are left or the goal limits size or time, only return False."""
        others = [step for step in self._ladder.steps if step not in self._steps]
        if not others or self._goal.max_bytes or self._goal.target_rtf:
            return False
        self._build([*self._steps, *others[: max(len(self._steps), 1)]])
        return True

    def report(self) -> dict[str, Any]:
        """Return plain data: the layers' damage, the evaluated choices, and the chosen steps with their gains."""
        steps = [
            {"layer": step.layer, "format": self._formats[step.level], "gain": step.gain, "bytes": step.bytes}
            for step in self._steps
        ]
        found, divergence = self._compared(), self._divergence(self._ladder.levels(self._steps))
        damage = {**asdict(self._damage), "divergence": divergence, "front": self._front(found, divergence)}
        formats = [*self._formats, self._smallest.recipe.name]
        return {**damage, **found.summary(), "formats": formats, "steps": steps}

    def _front(self, found: Difference, divergence: float) -> list[dict[str, Any]]:
        """Return evaluated choices as a `report.Front`. `at_most` is estimated for those without a written bundle."""

        def at_most(nats: float) -> float:
            return min(found.scaled(nats / max(divergence, NOTHING)).changed_tokens().high, 1.0)

        met = self._met.values()
        points = [{"at_most": at_most(own["divergence"]), "written": "at_most" in own, **own} for own in met]
        return sorted(points, key=lambda point: (point["bytes"], -point["divergence"]))

    def goal(self) -> dict[str, float]:
        """Return the manifest's entry `goal`: limits, and measurements rounded to be the same on all processors."""
        changed = self._compared().changed_tokens()
        found = {"changed_tokens": round(changed.value, 4), "changed_tokens_at_most": round(changed.high, 4)}
        return {**self._goal.limits, **found}

    def _better(self, levels: Levels) -> dict[str, str]:
        """Return the formats of the layers that are above their last levels."""
        return {layer: self._formats[level] for layer, level in levels.items() if level < self._meter.most[layer]}

    def _divergence(self, levels: Levels) -> float:
        show = shares(self._run.progress, f"divergence with {len(self._better(levels))} layers in better formats")
        nats = self._meter.divergence(levels, show)
        size = self._size + sum(self._bytes[layer][level] - self._bytes[layer][-1] for layer, level in levels.items())
        self._met.setdefault(frozenset(levels.items()), {"bytes": size}).update(divergence=nats)
        return nats

    def _compared(self) -> Difference:
        """Compare the current bundle with float32 on the recordings that are reserved for judging."""
        if self._difference is None:
            self._difference = self._run.compare(self.made)
            levels = self._ladder.levels(self._steps)
            self._divergence(levels)
            written = {"bytes": self.made.num_bytes, "at_most": self._difference.changed_tokens().high}
            self._met[frozenset(levels.items())].update(written)
            self._run.progress(
                f"changed tokens (of {self._difference.num_tokens} in other recordings): {self._described()}"
            )
        return self._difference

    def _described(self) -> str:
        passes = self._compared().passes().items()
        return ", ".join(f"{found} ({name.replace('_', ' ')})" for name, found in passes)

    def _holds(self, found: Difference, doubt: float, times: float = 1.0) -> bool:
        """Return whether the upper ends of the intervals would meet the limits, given `times` times as much audio."""
        goal = self._goal
        return found.changed_tokens(doubt, times).high <= (goal.max_damage or math.inf) and (
            found.divergence(doubt, times).high <= (goal.max_divergence or math.inf)
        )

    def _bearable(self, found: Difference, doubt: float, times: float = 1.0) -> float:
        """Return roughly the largest share of the divergence that would meet the limits, but at least `LEAST_SHARE`."""
        share = 1.0
        while share > LEAST_SHARE and not self._holds(found.scaled(share), doubt, times):
            share *= 0.95
        return share

    def _build(self, steps: Sequence[Step]) -> None:
        self._steps, self._difference = list(steps), None
        self._meter.unload()
        better, recipe = self._better(self._ladder.levels(steps)), self._smallest.recipe
        if better or self.made is not self._smallest:
            recipe = replace(recipe, exceptions={**recipe.exceptions, **better})
            self.made = self._run.quantize(recipe, self._staging)

    def _costs(self) -> tuple[float, float]:
        """Return the size in bytes and the real-time factor, which is measured only if it has a limit (otherwise 0)."""
        factor = real_time_factor(self.made.bundle, self._run.audio.chooses) if self._goal.target_rtf else 0.0
        return self.made.num_bytes, factor

    def _excesses(self) -> list[float]:
        return [max(cost - limit, 0.0) for cost, limit in zip(self._costs(), self._limits, strict=True)]

    def _nearest(self) -> str:
        size, factor = self._costs()
        layers = defaultdict(list)
        for layer, kind in self._better(self._ladder.levels(self._steps)).items():
            layers[kind].append(layer)
        limits = {
            f"at most {self._goal.max_damage or 0:.2%} of the tokens change": self._goal.max_damage,
            f"at most {self._goal.max_divergence or 0:g} nats of divergence": self._goal.max_divergence,
            f"at most {(self._goal.max_bytes or 0) / 1e6:g} MB": self._goal.max_bytes,
            f"real-time factor at most {self._goal.target_rtf or 0:g}": self._goal.target_rtf,
        }
        wanted = ", ".join(text for text, limit in limits.items() if limit is not None)
        chosen = "; ".join(f"{kind} for {', '.join(names)}" for kind, names in layers.items())
        speed = f", a real-time factor of {factor:.3f}" if factor else ""
        return (
            f"no choice of formats meets the goal ({wanted}); the nearest has {size / 1e6:.1f} MB{speed} and changes "
            f"{self._described()} of the tokens: {self._smallest.recipe.name}{', ' + chosen if chosen else ''}"
        )

    def _audio_needed(self, found: Difference, doubt: float) -> str:
        times = 1.0  # roughly the factor by which the audio must grow
        while not self._holds(found, doubt, times):
            times *= 1.1
            if times > MOST_LONGER:
                return "more recordings would not change that"
        return (
            f"bundles were judged on {found.seconds:.0f} s of recordings; "
            f"about {times * found.seconds:.0f} s would be enough"
        )


def real_time_factor(bundle: Bundle, features: Sequence[Any]) -> float:
    """Return the encoder's time on one thread per second of audio. A model that can stream encodes chunks."""
    model = bundle.load(SessionSettings(num_threads=1))
    frames = max(features, key=len)[:TIMED_FRAMES]
    config = model.config
    chunks = (config.whole_chunk(CHUNK_SIZE), NUM_LEFT_CHUNKS) if config.streaming else (None, -1)
    (seconds,) = encoder_times([model], frames, chunks, NUM_TIMINGS)
    return statistics.median(seconds) / (len(frames) * bundle.manifest.features.frame_shift_ms / 1000)
