"""Format tables, numbers and targets, and insert them between marks in pages.

For example, a page with the mark `ratio` contains this line:

Streaming takes <!-- begin ratio -->2.35<!-- end ratio --> times as long.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from u2moe.benchmarks.instruments.statistics import Spread

_BEGIN = re.compile(r"<!-- begin ([\w.-]+) -->")
_MARKED = re.compile(r"<!-- begin (?P<name>[\w.-]+) -->(?P<old>.*?)<!-- end (?P=name) -->", re.DOTALL)


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """Return a Markdown table. Its first `left` columns are aligned left, the others right."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, marks, *rows))


def short(value: float) -> str:
    """Return a number with three significant digits. Numbers of 100 or more are rounded to an integer."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A limit that was set before the measurement, and the measured value. The median of a spread is compared."""

    name: str  # measured quantity; unless it says otherwise, measured with int8 on one thread
    found: float | Spread
    limit: float
    at_most: bool  # whether `limit` is an upper limit
    where: str = ""  # machine, if several machines were measured
    unit: str = ""  # suffix of the measured value and the limit, such as " ms"

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


def names(text: str, page: str) -> list[str]:
    """Return the names of the marks in a page. Raise ValueError if a mark has no end."""
    begun, whole = _BEGIN.findall(text), [match["name"] for match in _MARKED.finditer(text)]
    if begun != whole:
        name = next(name for name in begun if begun.count(name) != whole.count(name))
        raise ValueError(f"{page}: <!-- begin {name} --> without <!-- end {name} -->")
    return begun


def filled(text: str, values: Mapping[str, str]) -> str:
    """Return the page `text` with the values between their marks. Marks on separate lines stay on separate lines.

    Marks without a value keep their text. If the marks are on separate lines, any text before the end mark on its line,
    such as YAML's #, stays.
    """

    def marked(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in values:
            return match[0]
        value = values[name].strip("\n")
        first, last = ("\n", "\n" + match["old"].rpartition("\n")[2]) if match["old"].startswith("\n") else ("", "")
        return f"<!-- begin {name} -->{first}{value}{last}<!-- end {name} -->"

    return _MARKED.sub(marked, text)
