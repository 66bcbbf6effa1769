"""From the damage of each layer to a choice of formats that meets a goal: a greedy search. Independent of graphs."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from u2moe.quantize.damage import Damage
from u2moe.quantize.observed import Levels
from u2moe.runtime.declarations import check_options, option


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Limits that a bundle must keep. The smallest that keeps them is wanted; without limits on damage, the best one.

    Attributes:
        max_damage: limit on `Difference.changed_tokens` on recordings that chose nothing (0.005: 0.5 %); the upper end
            of the interval keeps it.
        max_divergence: the same for `Difference.divergence`, in nats a frame.
        max_wer_increase: limit on the increase of the word error rate on recordings with transcripts (0.005: half a
            percentage point).
        max_bytes: limit on the size of the bundle.
        target_rtf: limit on the encoder's time over the duration of the audio, with one thread on this machine.
        resume: keep measurements in a file beside the bundle until it is written, and use those of an interrupted run.
    """

    max_damage: float | None = option("number", None, above=0, most=1)
    max_divergence: float | None = option("number", None, above=0)
    max_wer_increase: float | None = option("number", None)
    max_bytes: float | None = option("number", None, above=0)
    target_rtf: float | None = option("number", None, above=0)
    resume: bool = False

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def limits(self) -> dict[str, float]:
        """All limits."""
        return {name: value for name, value in vars(self).items() if name != "resume" and value is not None}

    @property
    def searched(self) -> dict[str, float]:
        """Those that choose formats by what layers change."""
        return {name: value for name, value in self.limits.items() if name != "max_wer_increase"}


@dataclass(frozen=True)
class Step:
    """A better format for one layer.

    Attributes:
        layer: its name.
        after: the level before it; `level`: the new one, which is lower.
        gain: divergence that it takes away, in nats.
        bytes: by which the bundle grows.
    """

    layer: str
    after: int
    level: int
    gain: float
    bytes: int


class Ladder:
    """Better formats for one layer after the other, those that gain most for their size first.

    Attributes:
        steps: in this order; with none, each layer is at its last level, with all, at level 0.
    """

    def __init__(self, damage: Damage) -> None:
        self._most = {item.layer: len(item.bytes) - 1 for item in damage.layers}
        self.steps: list[Step] = []
        for item in damage.layers:
            self.steps += _steps(item.layer, item.bytes, item.alone)
        # stable, and rounded: processors differ in the last digits
        self.steps.sort(key=lambda step: -float(f"{step.gain / max(step.bytes, 1):.3g}"))

    def levels(self, steps: Sequence[Step]) -> Levels:
        """The level of each layer after these steps."""
        levels = dict(self._most)
        for step in steps:
            levels[step.layer] = min(levels[step.layer], step.level)
        return levels

    def fewest(self, is_enough: Callable[[Levels], bool]) -> list[Step]:
        """The fewest steps from the first that are enough, by bisection; all if these are not."""
        numbers = range(len(self.steps))
        number = bisect.bisect_left(numbers, 1, key=lambda number: is_enough(self.levels(self.steps[:number])))
        return self.steps[:number]

    def most(self, costs: Callable[[Step], Sequence[float]], budgets: Sequence[float]) -> list[Step] | None:
        """All steps, in this order, that several budgets allow; those that cost less than nothing come first.

        None: there are none, and a budget is below zero.
        """
        levels, chosen, left = dict(self._most), [], list(budgets)
        for step in sorted(self.steps, key=lambda step: min(costs(step)) >= 0):
            after = [budget - cost for budget, cost in zip(left, costs(step), strict=True)]
            gets_better = all(new >= min(old, 0) for new, old in zip(after, left, strict=True))
            if step.after == levels[step.layer] and gets_better:
                levels[step.layer], left = step.level, after
                chosen.append(step)
        return chosen if min(left) >= 0 else None


def _steps(layer: str, sizes: Sequence[int], alone: Sequence[float]) -> list[Step]:
    """Steps of a layer whose gain for each byte falls; a level that gains less than a later one is left out."""
    level, steps = len(sizes) - 1, []
    while level > 0:
        options = [
            Step(layer, level, lower, alone[level] - alone[lower], sizes[lower] - sizes[level])
            for lower in range(level)
        ]
        best = max(options, key=lambda step: (step.gain / max(step.bytes, 1), step.level))
        steps.append(best)
        level = best.level
    return steps
