"""Print runtime/cpp/source/letter_case.hpp: the letters whose other case is one letter, as Python knows them."""

import sys
import unicodedata
from collections.abc import Callable

_HEAD = """// Upper and lower case of single letters (Unicode {version}). Written by tests/cpp/make_letter_case.py.
#pragma once

#include <cstdint>

namespace u2moe::runtime {{

/// Letters `first`, `first` + `step`, ... `last`, whose other case is `change` after each.
struct LetterRange {{
  std::uint32_t first, last, step;
  std::int32_t change;
}};

// The lower case of a letter is the first one of which it is the upper case, unless kLower has another.
"""


def cases(convert: Callable[[str], str]) -> dict[int, int]:
    """All letters that `convert` turns into one other letter, and that."""
    found = ((code, convert(chr(code))) for code in range(0x110000))
    return {code: ord(other) for code, other in found if len(other) == 1 and ord(other) != code}


def as_table(name: str, letters: dict[int, int]) -> str:
    """C++ for an array of ranges."""
    ranges: list[tuple[int, int, int, int]] = []
    for code, other in letters.items():
        first, last, step, change = ranges[-1] if ranges else (0, 0, 0, 0)
        if change == other - code and (code - last == step or (first == last and code - last <= 2)):
            ranges[-1] = (first, code, code - last, change)
        else:
            ranges.append((code, code, 1, other - code))
    lines = [""]
    for first, last, step, change in ranges:
        item = f"{{{first:#x}, {last:#x}, {step}, {change}}},"
        if len(lines[-1]) + len(item) > 148:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else '    '}{item}"
    return "\n".join([f"inline constexpr LetterRange {name}[] = {{", *lines, "};\n\n"])


def header() -> str:
    """The content of the header."""
    upper, lower = cases(str.upper), cases(str.lower)
    inverse = {other: code for code, other in reversed(upper.items())}
    if not inverse.keys() <= lower.keys():
        raise ValueError("a letter is its own lower case, and another one's upper case")
    others = {code: other for code, other in lower.items() if inverse.get(code) != other}
    head = _HEAD.format(version=unicodedata.unidata_version)
    return f"{head}{as_table('kUpper', upper)}{as_table('kLower', others)}}}  // namespace u2moe::runtime\n"


if __name__ == "__main__":
    sys.stdout.write(header())
