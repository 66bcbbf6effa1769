"""One mapping of a yaml file, read key by key with types checked; unknown keys are refused at the end."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from u2moe.runtime.errors import CheckpointError, UnsupportedError

Choice = TypeVar("Choice", bound=str)
LONGEST_QUOTE = 80
MOST_NAMES = 10
LARGEST_SIZE = 1 << 20
"""Default limit for whole numbers in the file: the product of three such sizes fits in 64 bits."""
LARGEST_NUMBER = sys.float_info.max
NAMEABLE = re.compile("[^\0\ud800-\udfff]*")


def quoted(value: object) -> str:
    """The value for use in a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print huge integers
        return "an integer of thousands of digits"
    return _shortened(text)


def _key(key: object) -> str:
    """A key for use in a message, in quotes only if it needs them."""
    return _shortened(key) if isinstance(key, str) and key.isprintable() else quoted(key)


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


class Section:
    """A mapping named `name` of the file `file`; the empty name is the top level. An absent section reads as empty."""

    def __init__(self, file: str, name: str, values: object, *, is_whole: bool = True) -> None:
        self.file = file
        self.is_whole = is_whole
        self.name = name
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise CheckpointError(f"{self._place('')} must be a mapping, found {quoted(values)}")
        self._values: dict[Any, Any] = values
        self._known: set[str] = set()
        self._sections: list[Section] = []

    def _place(self, key: str) -> str:
        parts = [part for part in (self.name, key) if part]
        return f"{self.file}: {'.'.join(parts)}" if parts else self.file

    def _take(self, key: str, default: object) -> Any:
        self._known.add(key)
        return self._values.get(key, default)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def names(self) -> list[str]:
        """All keys that are text; others are refused in the end."""
        return [key for key in self._values if isinstance(key, str)]

    def value(self, key: str) -> object:
        """The value of `key`, None if there is none."""
        return self._take(key, None)

    def wrong(self, key: str, found: object, expected: str) -> CheckpointError:
        """The error for an invalid value."""
        return CheckpointError(f"{self._place(key)} must be {expected}, found {quoted(found)}")

    def unsupported(self, key: str, found: object, supported: Iterable[str]) -> UnsupportedError:
        """The error for a value that WeNet supports and this project does not."""
        return UnsupportedError(
            f"{self._place(key)} is {quoted(found)}, which is not supported; supported: {', '.join(supported)}"
        )

    def section(self, key: str, *, is_whole: bool = True) -> Section:
        """The mapping under `key`; unless it `is_whole`, keys of it that are not read are no error."""
        name = f"{self.name}.{key}" if self.name else key
        self._sections.append(Section(self.file, name, self._take(key, None), is_whole=is_whole))
        return self._sections[-1]

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = LARGEST_SIZE) -> int:
        """A whole number from `minimum` to `maximum`; required when there is no default."""
        value = self._take(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self.wrong(key, value, f"a whole number from {minimum} to {maximum}")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A whole number of at least 1, or null."""
        return None if self.value(key) is None else self.integer(key)

    def number(self, key: str, default: float, *, minimum: float = -math.inf, maximum: float = math.inf) -> float:
        """A finite number from `minimum` to `maximum`."""
        value = self._take(key, default)
        if isinstance(value, str):  # yaml 1.1 reads 1e-5, without a dot, as text
            try:
                value = float(value)
            except ValueError:
                raise self.wrong(key, value, "a number") from None
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST_NUMBER:
            raise self.wrong(key, value, "a number")
        if not minimum <= value <= maximum:
            raise self.wrong(key, value, f"a number from {minimum} to {maximum}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """A string without characters that a file name cannot have, or null."""
        value = self._take(key, None)
        if value is not None and not (isinstance(value, str) and NAMEABLE.fullmatch(value)):
            raise self.wrong(key, value, "a string or null")
        return value

    def choice(self, key: str, default: Choice, supported: tuple[Choice, ...]) -> Choice:
        """One of the supported names."""
        value = self._take(key, default)
        for name in supported:
            if value == name:
                return name
        raise self.unsupported(key, value, supported)

    def finish(
        self, without_effect: Mapping[str, Iterable[str]], one_value: Mapping[str, Mapping[str, object]]
    ) -> None:
        """Refuse keys, here and in the sections below, that are unknown: they may change the network.

        Args:
            without_effect: by section, keys that have no effect.
            one_value: by section, keys with the only supported value, which is also the default.
        """
        for section in self._sections:
            section.finish(without_effect, one_value)
        if not self.is_whole:
            return
        for key, only in one_value.get(self.name, {}).items():
            value = self._take(key, only)
            if value != only or isinstance(value, bool) != isinstance(only, bool):
                raise self.unsupported(key, value, (repr(only),))
        self._known.update(without_effect.get(self.name, ()))
        unknown = sorted(_key(key) for key in self._values if key not in self._known)
        if unknown:
            where = f"{self._place('')} has" if self.name else f"{self.file} has"
            raise UnsupportedError(
                f"{where} unknown keys {_listed(unknown)}, which may change the network: remove those that do not; "
                f"known: {', '.join(sorted(map(_key, self._known))) or 'none'}"
            )
