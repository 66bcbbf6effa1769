"""A greedy search that uses each layer's damage to find formats that meet a goal. It does not depend on graphs."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from u2moe.quantize.damage import Damage
from u2moe.quantize.observed import Levels
from u2moe.runtime.declarations import Checked, option


@dataclass(frozen=True, kw_only=True)
class Goal(Checked):
    """Limits for a quantized bundle.

    With a limit on damage, the smallest bundle within all limits is chosen; otherwise the one with the least damage.

    Attributes:
        max_damage: limit on `Difference.changed_tokens`, measured on recordings that are not used to choose
            formats (0.005: 0.5 %). The upper end of its confidence interval must not exceed the limit.
        max_divergence: limit on `Difference.divergence` on the same recordings, in nats per encoder frame. The upper
            end of its confidence interval must not exceed the limit.
        max_wer_increase: limit on the increase of the word error rate on recordings with transcripts (0.005: half a
            percentage point).
        max_bytes: limit on the size of the bundle.
        target_rtf: limit on the encoder's time per second of audio, with one thread on this machine.
        resume: until the new bundle is complete, keep measurements in a file next to it, and reuse those of an
            interrupted run.
    """

    max_damage: float | None = option("number", None, above=0, most=1)
    max_divergence: float | None = option("number", None, above=0)
    max_wer_increase: float | None = option("number", None)
    max_bytes: float | None = option("number", None, above=0)
    target_rtf: float | None = option("number", None, above=0)
    resume: bool = False

    @property
    def limits(self) -> dict[str, float]:
        """All limits."""
        return {name: value for name, value in vars(self).items() if name != "resume" and value is not None}

    @property
    def searched(self) -> dict[str, float]:
        """Limits that are met by choosing each layer's format according to the damage that the formats cause."""
        return {name: value for name, value in self.limits.items() if name != "max_wer_increase"}


@dataclass(frozen=True)
class Step:
    """A change of one layer to a better format: from the level `after` to the lower level `level`.

    `gain` is the divergence that the step removes, in nats per frame, and `bytes` what it adds to the bundle.
    """

    layer: str
    after: int
    level: int
    gain: float
    bytes: int


class Ladder:
    """Steps to better formats, ordered by gain per byte, the largest first.

    Before the first step, all layers are at their last levels; after the last step, at level 0.
    """

    def __init__(self, damage: Damage) -> None:
        self._most = {item.layer: len(item.bytes) - 1 for item in damage.layers}
        self.steps: list[Step] = []
        for item in damage.layers:
            level = len(item.bytes) - 1
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
        """Return the steps that fit the budgets, in the order in which they are taken.

        Steps that reduce a cost are taken first. Returns None if a budget is below zero and no steps compensate for it.
        """
        levels, chosen, left = dict(self._most), [], list(budgets)
        for step in sorted(self.steps, key=lambda step: min(costs(step)) >= 0):
            after = [budget - cost for budget, cost in zip(left, costs(step), strict=True)]
            gets_better = all(new >= min(old, 0) for new, old in zip(after, left, strict=True))
            if step.after == levels[step.layer] and gets_better:
                levels[step.layer], left = step.level, after
                chosen.append(step)
        return chosen if min(left) >= 0 else None
