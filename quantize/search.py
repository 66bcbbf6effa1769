"""A search for layer formats. It chooses formats by divergence, which is smooth, and judges them by changed tokens."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from u2moe.quantize.arithmetic import NOTHING
from u2moe.quantize.comparison import DOUBT, Difference, compare
from u2moe.quantize.damage import Damage
from u2moe.quantize.goals import Goal, Ladder, Step
from u2moe.quantize.observed import LeanSettings, Levels
from u2moe.quantize.progress import shares
from u2moe.quantize.report import encoder_times
from u2moe.quantize.run import QuantizationRun, QuantizedBundle
from u2moe.runtime.bundle.weight_formats import HALF, INT8, WEIGHT_FORMATS
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.errors import QuantizationError
from u2moe.runtime.model.settings import SessionSettings

NUM_TIMINGS, TIMED_FRAMES, CHUNK_SIZE, NUM_LEFT_CHUNKS = 5, 3000, 16, 4
"""Settings for measuring the real-time factor: number of timings (the median counts), maximum feature frames, chunk
size, left chunks."""
MOST_LONGER = 1000
"""A limit is out of reach if judging it would need more than this many times the available audio."""
LEAST_FALL, LEAST_SHARE = 0.5, 0.01
"""If a bundle exceeds the limits on damage, the target for the next bundle is between about `LEAST_SHARE` and
`LEAST_FALL` times its divergence."""


class FormatSearch:
    """A search for the layer formats of one bundle. `made` is the current bundle, in the staging folder."""

    def __init__(self, run: QuantizationRun, made: QuantizedBundle, staging: BundleWriter, goal: Goal) -> None:
        """Measure the damage of all layers of `made`, the bundle with all layers in the smallest formats.

        The better formats to choose from are float16 and, for weights with fewer than 8 bits, int8. Bundles that have
        them replace `made` in `staging`.
        """
        self._run, self._staging, self._goal, self._recipe, self.made = run, staging, goal, made.recipe, made
        self._audio = run.audio
        versions = {HALF.name: run.source}
        groups = made.recipe.groups
        middle = {group: INT8.name for group, kind in groups.items() if WEIGHT_FORMATS[kind].bits < INT8.bits}
        if middle:
            with BundleWriter(run.folder / INT8.name) as other:
                recipe = dataclasses.replace(made.recipe, groups={**groups, **middle}, packed=False)
                versions[INT8.name] = other.finish(run.quantize(recipe, other).bundle.manifest)
        self._formats = list(versions)
        with BundleWriter(run.folder / "last") as other:  # the staged files will change
            for name in made.bundle.manifest.files:
                other.add(name, made.bundle.path / name)
            self._versions = [*versions.values(), other.finish(made.bundle.manifest)]
        self._smallest, self._size = made, made.num_bytes
        self._meter = run.meter(self._versions)
        self._damage: Damage = self._meter.measure(shares(run.progress, "damage of each layer"))
        layers = [
            dataclasses.replace(item, bytes=[item.bytes[0] // 2, *item.bytes[1:]]) for item in self._damage.layers
        ]  # level 0 is written in half precision
        self._bytes = {item.layer: item.bytes for item in layers}
        smallest = {"bytes": self._size, "divergence": self._damage.divergence}
        self._met: dict[frozenset[tuple[str, int]], dict[str, Any]] = {frozenset(self._meter.most.items()): smallest}
        self._ladder = Ladder(dataclasses.replace(self._damage, layers=layers))
        self._steps: list[Step] = []
        self._difference: Difference | None = None

    def choose(self) -> QuantizedBundle:
        """Choose formats that meet the goal of the search, and return the bundle that has them.

        Raises QuantizationError if no choice of formats meets the goal. The message describes the nearest one.
        """
        goal = self._goal
        if goal.max_damage is not None or goal.max_divergence is not None:
            self._keep_limits_on_damage()
            size, factor = self._costs()
            if size > (goal.max_bytes or math.inf) or factor > (goal.target_rtf or math.inf):
                raise QuantizationError(self._nearest())
        elif goal.searched:
            self._use_budgets()
        return self.made

    def _keep_limits_on_damage(self) -> None:
        """Build the smallest bundle whose damage, measured on recordings reserved for judging, is within the limits.

        Each attempt halves the accepted probability of error, so that the intervals of all attempts stay reliable.
        """
        self._meter.unload()
        lean, doubt = LeanSettings(), DOUBT
        found = compare(self._run.source.load(lean), self._versions[-1].load(lean), self._audio.chooses)
        more = sum(map(len, self._audio.judges)) / sum(map(len, self._audio.chooses))
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
        goal, ladder = self._goal, self._ladder
        timed = self._versions if goal.target_rtf else []
        times = [real_time_factor(version, self._audio.chooses) for version in timed]
        budgets = [(goal.max_bytes or math.inf) - self._size, (goal.target_rtf or math.inf) - (times or [0])[-1]]

        def costs(step: Step) -> Sequence[float]:
            seconds = self._meter.share(step.layer) * (times[step.level] - times[step.after]) if times else 0.0
            return step.bytes, seconds

        while True:
            found = ladder.most(costs, budgets)
            self._build(found or [])
            limits, sizes = [goal.max_bytes or math.inf, goal.target_rtf or math.inf], self._costs()
            if found is not None and all(size <= limit for size, limit in zip(sizes, limits, strict=True)):
                return
            if not found:
                raise QuantizationError(self._nearest())
            for index, (size, limit) in enumerate(zip(sizes, limits, strict=True)):
                if size > limit:  # the budget may reach zero, which forces the smallest formats
                    least = 0.0 if budgets[index] > 0 else -math.inf
                    budgets[index] = max(budgets[index] - max(1.1 * (size - limit), 0.02 * limit), least)

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
        found, divergence = self._compared(), self._divergence(self._levels)
        damage = {**dataclasses.asdict(self._damage), "divergence": divergence, "front": self._front(found, divergence)}
        return {**damage, **found.summary(), "formats": [*self._formats, self._recipe.name], "steps": steps}

    def _front(self, found: Difference, divergence: float) -> list[dict[str, Any]]:
        """Return evaluated choices as a `report.Front`. `at_most` is estimated for those without a written bundle."""

        def at_most(nats: float) -> float:
            return min(found.scaled(nats / max(divergence, NOTHING)).changed_tokens().high, 1.0)

        return sorted(
            ({"at_most": at_most(point["divergence"]), "written": "at_most" in point, **point}
             for point in self._met.values()),
            key=lambda point: (point["bytes"], -point["divergence"]),
        )  # fmt: skip

    def goal(self) -> dict[str, float]:
        """Return the manifest's entry `goal`: limits, and measurements rounded to be the same on all processors."""
        changed = self._compared().changed_tokens()
        found = {"changed_tokens": round(changed.value, 4), "changed_tokens_at_most": round(changed.high, 4)}
        return {**self._goal.limits, **found}

    @property
    def _levels(self) -> Levels:
        return self._ladder.levels(self._steps)

    def _divergence(self, levels: Levels) -> float:
        better = sum(level < self._meter.most[layer] for layer, level in levels.items())
        show = shares(self._run.progress, f"divergence with {better} layers in better formats")
        nats = self._meter.divergence(levels, show)
        size = self._size + sum(self._bytes[layer][level] - self._bytes[layer][-1] for layer, level in levels.items())
        self._met.setdefault(frozenset(levels.items()), {"bytes": size}).update(divergence=nats)
        return nats

    def _compared(self) -> Difference:
        """Compare the current bundle with float32 on the recordings that are reserved for judging."""
        if self._difference is None:
            self._difference = self._run.compare(self.made)
            self._divergence(self._levels)
            written = {"bytes": self.made.num_bytes, "at_most": self._difference.changed_tokens().high}
            self._met[frozenset(self._levels.items())].update(written)
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
        levels = self._levels
        better = {layer: self._formats[level] for layer, level in levels.items() if level < self._meter.most[layer]}
        if not better and self.made is self._smallest:
            return
        recipe = dataclasses.replace(self._recipe, exceptions={**self._recipe.exceptions, **better})
        self.made = self._run.quantize(recipe, self._staging)

    def _costs(self) -> tuple[float, float]:
        """Return the size in bytes and the real-time factor, which is measured only if it has a limit (otherwise 0)."""
        factor = real_time_factor(self.made.bundle, self._audio.chooses) if self._goal.target_rtf else 0.0
        return self.made.num_bytes, factor

    def _nearest(self) -> str:
        size, factor = self._costs()
        layers = defaultdict(list)
        for layer, level in self._levels.items():
            if level < self._meter.most[layer]:
                layers[self._formats[level]].append(layer)
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
            f"{self._described()} of the tokens: {self._recipe.name}{', ' + chosen if chosen else ''}"
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
