"""Grammars in the style of JSGF: phrases with alternatives and slots.

    set the timer to <number> (minute | minutes) [please]
    <number> = one | two | twenty [five]
    [unk]

This module parses and checks grammars, without a vocabulary. `decoding/phrases.py` applies them in the search.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from u2moe.runtime.errors import GrammarError

UNKNOWN = "[unk]"
"""In a grammar, the line that allows any other words. In texts, the word that represents them."""
LONGEST_LINE = 20_000
"""Longest line in characters."""
MOST_NESTED, MOST_STEPS = 100, 1 << 21
"""Deepest nesting of brackets and slots, and default of `Grammar.most_steps`."""

Expression = tuple[tuple[Any, ...], ...]
"""Alternatives, each a sequence of words, slots ("<number>") and nested alternatives."""

_DEFINITION = re.compile(r"\s*(<[^<>=|]+>)\s*=(.*)", re.DOTALL)
_PART = re.compile(r"\s*(\[unk\]|<[^<>]*>|[()\[\]|]|[^\s()\[\]|<>]+)")
_CLOSING = {"(": ")", "[": "]"}


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """The sentences to recognise: any number of phrases, one after the other.

    Attributes:
        lines: phrases, definitions of slots ("<name> = one | two"), and "[unk]" to allow other words. In a phrase,
            "(a | b)" are alternatives, "[a]" is optional, and "<name>" is a slot.
        most_steps: maximum work: words, slots, brackets, and ways from one character to the next; about 1 us each.
        phrases: the parsed phrases, by line.
        slots: the parsed definitions of slots, by name ("<name>").
        has_rest: whether other words are allowed.

    Raises:
        GrammarError: a line cannot be parsed, a slot is defined twice, or there are only definitions.
    """

    lines: tuple[str, ...]
    most_steps: int = field(default=MOST_STEPS, repr=False, compare=False)
    phrases: dict[str, Expression] = field(init=False, repr=False, compare=False)
    slots: dict[str, Expression] = field(init=False, repr=False, compare=False)
    has_rest: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given: object = self.lines
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise GrammarError(f"grammar must be a list of phrases, got {given!r:.80}")
        lines, phrases, slots = tuple(given), dict[str, Expression](), dict[str, Expression]()
        for line in lines:
            if not isinstance(line, str) or len(line) > LONGEST_LINE:
                expected = f"phrases of at most {LONGEST_LINE} characters"
                raise GrammarError(f"grammar must be a list of {expected}, got {line!r:.80}")
            if line.strip() == UNKNOWN:
                continue
            if (definition := _DEFINITION.fullmatch(line)) is None:
                phrases[line] = _parsed(line, f"phrase {line!r:.80}")
            elif definition[1] in slots:
                raise GrammarError(f"grammar: slot {definition[1]}: found two definitions, expected one")
            else:
                slots[definition[1]] = _parsed(definition[2], f"slot {definition[1]}")
        if not phrases:
            raise GrammarError("grammar: found no phrase, expected at least one")
        has_rest = any(line.strip() == UNKNOWN for line in lines)
        for name, value in {"lines": lines, "phrases": phrases, "slots": slots, "has_rest": has_rest}.items():
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, content: str) -> Self:
        """Parse the lines of a file; comments ("# ...") and empty lines are skipped."""
        lines = (line.strip() for line in content.removeprefix("\ufeff").splitlines())
        return cls(lines=tuple(line for line in lines if line and not line.startswith("#")))


def _parsed(text: str, what: str) -> Expression:
    parts, place = [], 0
    while found := _PART.match(text, place):
        parts.append(found[1])
        place = found.end()
    if text[place:].strip():
        raise GrammarError(f"grammar: {what}: found {text[place:].strip()[0]!r}, expected words, (), [], | or <slot>")
    return _alternatives(iter(parts), "", what)


def check_nested(num: int, what: str) -> None:
    """Raise GrammarError if brackets and slots are nested too deeply."""
    if num > MOST_NESTED:
        found = f"more than {MOST_NESTED} nested brackets or slots"
        raise GrammarError(f"{what}: found {found}, expected at most {MOST_NESTED}")


def _alternatives(parts: Iterator[str], closing: str, what: str, num_around: int = 0) -> Expression:
    """Parse alternatives up to the bracket `closing`, or up to the end if `closing` is ""."""
    check_nested(num_around, f"grammar: {what}")
    found: list[list[Any]] = [[]]
    for part in parts:
        if part in _CLOSING:
            nested = _alternatives(parts, _CLOSING[part], what, num_around + 1)
            found[-1].append((*nested, ()) if part == "[" else nested)
        elif part == "|":
            found.append([])
        elif part == closing:
            closing = ""
            break
        elif part in (*_CLOSING.values(), UNKNOWN):
            words = f"{closing!r} or words" if closing else "words"
            expected = f"{UNKNOWN} on a line of its own" if part == UNKNOWN else words
            raise GrammarError(f"grammar: {what}: found {part!r}, expected {expected}")
        else:
            found[-1].append(part)
    if closing:
        raise GrammarError(f"grammar: {what}: found the end, expected {closing!r}")
    if not all(found):
        raise GrammarError(f"grammar: {what}: found nothing, expected words")
    return tuple(map(tuple, found))
