"""Format tables and numbers, and insert them between marks in pages.

For example, a page with the mark `ratio` contains this line:

Streaming takes <!-- begin ratio -->2.35<!-- end ratio --> times as long.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from u2moe.benchmarks.instruments.statistics import Spread


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """Return a Markdown table. Its first `left` columns are aligned left, the others right."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, marks, *rows))


def quartiles(spread: Spread, digits: int = 2) -> str:
    """Return a median with its quartiles, for example "1.20 (1.15-1.31)"."""
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f}-{spread.high:.{digits}f})"


def short(value: float) -> str:
    """Return a number with three significant digits. Numbers of 100 or more are rounded to an integer."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


_BEGIN = re.compile(r"<!-- begin ([\w.-]+) -->")
_MARKED = re.compile(r"<!-- begin (?P<name>[\w.-]+) -->(?P<old>.*?)<!-- end (?P=name) -->", re.DOTALL)


def names(text: str, page: str) -> list[str]:
    """Return the names of the marks in a page.

    Raises:
        ValueError: a mark has no end.
    """
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
