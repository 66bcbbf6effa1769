"""Print u2moe/letter_case.hpp: the letters whose upper or lower case is one other letter, as Python knows them."""

import unicodedata
from collections.abc import Callable

_HEAD = """// Upper and lower case of single letters (Unicode {version}). Written by make_letter_case.py.
#pragma once

#include <cstdint>

namespace u2moe {{

/// Letters `first`, `first` + `step`, ... `last`, whose other case is `change` after each.
struct LetterRange {{
  std::uint32_t first, last, step;
  std::int32_t change;
}};
"""


def letter_ranges(convert: Callable[[str], str]) -> list[tuple[int, int, int, int]]:
    """Ranges (first, last, step, change) of all letters that `convert` turns into one other letter."""
    ranges: list[tuple[int, int, int, int]] = []
    for code in range(0x110000):
        other = convert(chr(code))
        if len(other) != 1 or ord(other) == code:
            continue
        change = ord(other) - code
        if ranges:
            first, last, step, before = ranges[-1]
            gap = code - last
            if change == before and (gap == step or (first == last and gap <= 2)):
                ranges[-1] = (first, code, gap, change)
                continue
        ranges.append((code, code, 1, change))
    return ranges


def _lines(name: str, ranges: list[tuple[int, int, int, int]]) -> list[str]:
    items = [f"{{{first:#x}, {last:#x}, {step}, {change}}}," for first, last, step, change in ranges]
    lines = [f"\ninline constexpr LetterRange {name}[] = {{", ""]
    for item in items:
        if len(lines[-1]) + len(item) > 124:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else '    '}{item}"
    return [*lines, "};"]


if __name__ == "__main__":
    tables = _lines("kUpper", letter_ranges(str.upper)) + _lines("kLower", letter_ranges(str.lower))
    print(_HEAD.format(version=unicodedata.unidata_version) + "\n".join(tables) + "\n\n}  // namespace u2moe")
