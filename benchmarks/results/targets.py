"""Targets: limits that were set before the measurement, compared with the measured values."""

from collections.abc import Sequence
from dataclasses import dataclass

from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.benchmarks.results.markdown import short, table


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit that was set before the measurement, and the measured value. The median of a spread is compared.

    Attributes:
        name: measured quantity. Unless the name says otherwise, it was measured with int8 on one thread.
        where: machine, if several machines were measured.
        at_most: whether `limit` is an upper limit.
        unit: suffix of the measured value and the limit, such as " ms".
    """

    name: str
    found: float | Spread
    limit: float
    at_most: bool
    where: str = ""
    unit: str = ""

    @property
    def value(self) -> float:
        """Value that is compared with the limit."""
        return self.found.median if isinstance(self.found, Spread) else self.found

    @property
    def met(self) -> bool:
        """Whether the limit was met."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        """Row of the table: name, machine, measured value, limit, and verdict (met, or how far it was missed)."""
        value, limit = (f"{short(value)}{self.unit}" for value in (self.value, self.limit))
        if isinstance(self.found, Spread):
            value += f" ({short(self.found.low)}-{short(self.found.high)})"
        verdict = "met" if self.met else f"**missed** by {abs(self.value / self.limit - 1):.1%}"
        return self.name, self.where, value, f"{'≤' if self.at_most else '≥'} {limit}", verdict


def values(targets: Sequence[Target]) -> dict[str, str]:
    """Return the values for the page of targets."""
    rows = table(("target", "machine", "measured", "limit", "met"), (target.row for target in targets), left=5)
    return {"table": rows, "met": str(sum(target.met for target in targets)), "total": str(len(targets))}
