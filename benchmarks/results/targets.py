"""What was set beforehand, what was found, and what bounds it: one row each. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from u2moe.benchmarks.instruments.statistics import Spread

HEADER = ("| target | measured | limit | met, or what bounds it |", "|---|---|---|---|")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit that was set beforehand, and what was found.

    Attributes:
        name: what is measured; int8 on one thread, where it says nothing else.
        found: as measured; where it was measured several times the spread, whose median counts.
        limit: as set.
        at_most: whether it is an upper limit.
        unit: behind both numbers, such as " ms".
        bound: what stands in the way, with numbers of the same measurement; shown when the target is missed.
    """

    name: str
    found: float | Spread
    limit: float
    at_most: bool
    unit: str = ""
    bound: str = ""

    @property
    def value(self) -> float:
        """What counts."""
        return self.found.median if isinstance(self.found, Spread) else self.found

    @property
    def met(self) -> bool:
        """Whether it was kept."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def row(self) -> str:
        """As a row of the table."""
        sign = "≤" if self.at_most else "≥"
        value, limit = (f"{short(value)}{self.unit}" for value in (self.value, self.limit))
        if isinstance(self.found, Spread):
            value += f" ({short(self.found.low)}-{short(self.found.high)})"
        return f"| {self.name} | {value} | {sign} {limit} | {self.verdict} |"

    @property
    def verdict(self) -> str:
        """Whether it was met; if not, by how much it was missed, and what bounds it."""
        if self.met:
            return "met"
        missed = f"**not met**, by {abs(self.value / self.limit - 1):.0%}"
        return ": ".join(part for part in (missed, self.bound) if part)


def targets_table(targets: Iterable[Target]) -> str:
    """All of them, as Markdown."""
    return "\n".join((*HEADER, *(target.row for target in targets))) + "\n"


def quartiles(spread: Spread, digits: int = 2) -> str:
    """A median, and the quartiles behind it."""
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def short(value: float) -> str:
    """A number with three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
