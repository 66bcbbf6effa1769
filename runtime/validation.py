"""Checks types and ranges of options at construction. Values are returned as Python numbers."""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from typing import TypeVar

T = TypeVar("T")

MOST_INTEGER = 1_000_000
"""Above every sensible count, and low enough for products of two of them to be exact everywhere."""


def checked_integer(name: str, value: object, *, least: int, most: int = MOST_INTEGER) -> int:
    """Check a count: an integer of Python or numpy, but not a bool.

    Raises:
        ValueError: another type, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")  # noqa: TRY004 - wrong options are all one error
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return number


def checked_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    unit: str = "",
) -> float:
    """Check a quantity: a finite number of Python or numpy, but not a bool.

    Args:
        name: name of the option, for the error.
        value: the value to check.
        least: smallest allowed value.
        above: alternatively, an exclusive lower limit.
        most: largest allowed value.
        unit: unit for the error, such as "seconds".

    Raises:
        ValueError: another type, NaN, infinite, or out of range.
    """
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:
        found = math.inf
    too_small = (least is not None and found < least) or (above is not None and found <= above)
    if not math.isfinite(found) or too_small or (most is not None and found > most):
        expected = f"a number of {unit}" if unit else "a number"
        if least is not None:
            expected += f", at least {least:g}" if most is None else f" between {least:g} and {most:g}"
        if above is not None:
            expected += f" above {above:g}" if most is None else f" above {above:g} and at most {most:g}"
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return found


def checked_flag(name: str, value: object) -> bool:
    """Check a bool.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")  # noqa: TRY004
    return value


def checked_options(name: str, value: T | None, default: T) -> T:
    """Options of the same class as the default, which stands for None.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return default
    if not isinstance(value, type(default)):
        raise ValueError(f"{name} must be {type(default).__name__} or None, got {value!r}")  # noqa: TRY004
    return value


def first_difference(one: object, other: object, name: str) -> tuple[str, object, object]:
    """Where two values of options or of JSON differ first, such as ("options.beam_size", 10, 5)."""
    pair = [vars(each) if dataclasses.is_dataclass(each) else each for each in (one, other)]
    one, other = pair
    if isinstance(one, dict) and isinstance(other, dict):
        for key in (*one, *other):
            if one.get(key) != other.get(key):
                return first_difference(one.get(key), other.get(key), f"{name}.{key}")
    return name, one, other
