"""Validation of external values: options, and fields of manifests, train.yaml, lists and messages.

Each check returns the value as a plain Python type, or raises `FieldError`: "FIELD must be EXPECTED, got FOUND".
Readers of files turn it into their own kind of error, for example with `refused_as(BundleError, path)`. The server also
reports the name of the field, as `param`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
Choice = TypeVar("Choice", bound=str)

MOST_INTEGER = 1_000_000  # Upper limit of counts, above any sensible one; doubles hold the product of two exactly
_LONGEST_QUOTE = 80
_SHORT = reprlib.Repr()  # Shortens nested lists: YAML aliases can make a value too large for memory
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 2 * _LONGEST_QUOTE


class FieldError(ValueError):
    """An invalid value of a field. `field` is its full name, such as "model.blank"; empty: all content is invalid."""

    def __init__(self, field: str, expected: str, found: str) -> None:
        super().__init__(field, expected, found)
        self.field, self.expected, self.found = field, expected, found

    def __str__(self) -> str:
        return f"{self.field} must be {self.expected}, got {self.found}".lstrip()


def wrong(field: str, expected: str, found: object) -> FieldError:
    """Return the error for a field that has an invalid value."""
    return FieldError(field, expected, quoted(found))


@contextlib.contextmanager
def refused_as(error: Callable[[str], Exception], where: object) -> Iterator[None]:
    """Turn a ValueError raised in the block into `error`, with a message that begins with `where`."""
    try:
        yield
    except ValueError as refusal:
        raise error(f"{where}: {refusal}") from refusal


def quoted(value: object) -> str:
    """Return a value as text for a message, shortened if necessary."""
    try:
        return shortened(_SHORT.repr(value))
    except ValueError:  # Python refuses to print huge integers
        return "an integer of thousands of digits"


def shortened(text: str) -> str:
    """Return `text`, shortened if it is too long for a message."""
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


def checked_integer(name: str, value: object, *, least: int, most: int = MOST_INTEGER) -> int:
    """Check a Python or numpy integer. Raises FieldError for anything else, such as a bool or a number out of range."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong(name, "an integer", value)
    number = operator.index(value)
    if number < least:
        raise wrong(name, f"at least {least}", number)
    if number > most:
        raise wrong(name, f"at most {most}", number)
    return number


def checked_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    unit: str = "",
    from_text: bool = False,
) -> float:
    """Check a finite number, not a bool. `above` is exclusive; `from_text` also allows strings. Raises FieldError."""
    is_number = isinstance(value, numbers.Real | str if from_text else numbers.Real) and not isinstance(value, bool)
    try:
        found = float(value) if is_number else math.nan  # type: ignore[arg-type]  # is_number
    except (ValueError, OverflowError):
        found = math.nan
    too_small = (least is not None and found < least) or (above is not None and found <= above)
    if math.isfinite(found) and not too_small and (most is None or found <= most):
        return found
    expected = f"a number of {unit}" if unit else "a number"
    if least is not None:
        expected += f", at least {least:g}" if most is None else f" between {least:g} and {most:g}"
    if above is not None:
        expected += f" above {above:g}" + ("" if most is None else f" and at most {most:g}")
    raise wrong(name, expected, value)


def checked_flag(name: str, value: object) -> bool:
    """Check a bool. Raises FieldError for anything else."""
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def checked_text(name: str, value: object) -> str:
    """Check a non-empty string. Raises FieldError for anything else."""
    if not isinstance(value, str) or not value:
        raise wrong(name, "a non-empty string", value)
    return value


def checked_choice(name: str, value: object, choices: Collection[Choice]) -> Choice:
    """Check a string that must be one of `choices`. Raises FieldError for anything else."""
    for choice in choices if isinstance(value, str) else ():
        if value == choice:
            return choice
    raise wrong(name, f"one of {', '.join(choices)}", value)


def checked_object(name: str, value: object) -> dict[str, Any]:
    """Check a dict, such as a JSON object. Raises FieldError for anything else."""
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return value


def checked_options(name: str, value: T | None, default: T) -> T:
    """Return `value`, or `default` if it is None. Raises FieldError if `value` is not of `default`'s class."""
    if value is None:
        return default
    if not isinstance(value, type(default)):
        raise wrong(name, f"{type(default).__name__} or None", value)
    return value


class Record:
    """A mapping whose fields are checked when they are read (`known`). Errors name fields by a path from `name` on."""

    def __init__(self, values: object, name: str = "") -> None:
        self.name = name
        self.values = checked_object(name, values)
        self.known: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def field(self, key: str) -> str:
        """Return the full name of a field, as used in errors."""
        return f"{self.name}.{key}" if self.name else key

    def value(self, key: str, default: object = None) -> Any:
        """Return the value of a field, or `default` if the field is missing."""
        self.known.add(key)
        return self.values.get(key, default)

    def wrong(self, key: str, found: object, expected: str) -> FieldError:
        """Return the error for a field that has an invalid value."""
        return wrong(self.field(key), expected, found)

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST_INTEGER) -> int:
        """Return an integer field. If `default` is None, the field is required."""
        return checked_integer(self.field(key), self.value(key, default), least=least, most=most)

    def number(
        self, key: str, default: float | None = None, *, least: float | None = None, most: float | None = None
    ) -> float:
        """Return a finite number. It may be given as a string, because YAML 1.1 reads 1e-5 (no dot) as a string."""
        return checked_number(self.field(key), self.value(key, default), least=least, most=most, from_text=True)

    def seconds(self, key: str) -> float | None:
        """Return a number or string field as a time in seconds, or None if the field is missing."""
        return None if self.value(key) is None else checked_seconds(self.field(key), self.value(key))

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean field."""
        return checked_flag(self.field(key), self.value(key, default))

    def text(self, key: str) -> str:
        """Return a field that is a non-empty string."""
        return checked_text(self.field(key), self.value(key))

    def label(self, key: str) -> str | None:
        """Return a string field, or None if it is missing. A number is converted to a string."""
        value = self.value(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str | None):
            raise self.wrong(key, value, "a string")
        return value

    def record(self, key: str) -> Record:
        """Return a required field that is an object."""
        return Record(self.value(key), self.field(key))

    def records(self, key: str) -> list[Record]:
        """Return a field that is a list of objects. If it is null or missing, the list is empty."""
        values = self.value(key)
        if not isinstance(values, list | None):
            raise self.wrong(key, values, "a list of objects")
        return [Record(value, self.field(key)) for value in values or []]

    def unread(self) -> dict[str, Any]:
        """Return the fields that have not been read."""
        return {key: value for key, value in self.values.items() if key not in self.known}


def checked_seconds(name: str, value: object) -> float:
    """Check a time of at least 0 seconds, given as a number or a string. Raises FieldError for anything else."""
    return checked_number(name, value, least=0, unit="seconds", from_text=True)


def first_difference(one: object, other: object, name: str) -> tuple[str, object, object]:
    """Return the path, beginning with `name`, and both values of the first difference of two options or JSON values."""
    one, other = (vars(each) if dataclasses.is_dataclass(each) else each for each in (one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        for key in (*one, *other):
            if one.get(key) != other.get(key):
                return first_difference(one.get(key), other.get(key), f"{name}.{key}")
    return name, one, other
