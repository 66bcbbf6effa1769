"""Tables and numbers in the format of the pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from u2moe.benchmarks.instruments.statistics import Spread


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """A table; the first `left` columns are aligned left, the others right."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, marks, *rows))


def quartiles(spread: Spread, digits: int = 2) -> str:
    """A median, and the quartiles behind it: "1.20 (1.15-1.31)"."""
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def short(value: float) -> str:
    """A number with three significant digits, or all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
