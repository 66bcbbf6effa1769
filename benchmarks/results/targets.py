"""Targets: limits set before the measurement, compared with the measured values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.benchmarks.results.markdown import short, table


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit set before the measurement, and the measured value.

    Attributes:
        name: measured quantity, of int8 on one thread unless the name states otherwise.
        where: machine, if several were measured.
        found: measured value, or the spread of several, whose median is compared.
        limit: limit for the value.
        at_most: whether it is an upper limit.
        unit: suffix of measured value and limit, such as " ms".
    """

    name: str
    found: float | Spread
    limit: float
    at_most: bool
    where: str = ""
    unit: str = ""

    @property
    def value(self) -> float:
        """Value compared with the limit."""
        return self.found.median if isinstance(self.found, Spread) else self.found

    @property
    def met(self) -> bool:
        """Whether the limit was met."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """Row: name, machine, measured value, limit, and whether it was met or by how much it was missed."""
        value, limit = (f"{short(value)}{self.unit}" for value in (self.value, self.limit))
        if isinstance(self.found, Spread):
            value += f" ({short(self.found.low)}-{short(self.found.high)})"
        verdict = "met" if self.met else f"**missed** by {abs(self.value / self.limit - 1):.1%}"
        return self.name, self.where, value, f"{'≤' if self.at_most else '≥'} {limit}", verdict


def values(targets: Sequence[Target]) -> dict[str, str]:
    """Return the values for the page of targets."""
    rows = table(("target", "machine", "measured", "limit", "met"), (target.row for target in targets), left=5)
    return {"table": rows, "met": str(sum(target.met for target in targets)), "total": str(len(targets))}
