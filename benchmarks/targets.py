"""What was set beforehand, what was found, and what bounds it: one row each. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HEADER = ("| target | measured | limit | met, or what bounds it |", "|---|---|---|---|")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit that was set beforehand, and what was found.

    Attributes:
        name: what is measured; int8 on one thread, where it says nothing else.
        found: as measured.
        limit: as set.
        at_most: whether it is an upper limit.
        unit: behind both numbers, such as " ms".
        bound: what stands in the way, with numbers of the same measurement; shown when the target is missed.
    """

    name: str
    found: float
    limit: float
    at_most: bool
    unit: str = ""
    bound: str = ""

    @property
    def met(self) -> bool:
        """Whether it was kept."""
        return self.found <= self.limit if self.at_most else self.found >= self.limit

    @property
    def row(self) -> str:
        """As a row of the table."""
        verdict = "met" if self.met else ": ".join(part for part in ("**not met**", self.bound) if part)
        sign = "≤" if self.at_most else "≥"
        found, limit = (f"{short(value)}{self.unit}" for value in (self.found, self.limit))
        return f"| {self.name} | {found} | {sign} {limit} | {verdict} |"


def targets_table(targets: Iterable[Target]) -> str:
    """All of them, as Markdown."""
    return "\n".join((*HEADER, *(target.row for target in targets))) + "\n"


def short(value: float) -> str:
    """A number with three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
