"""Reads one mapping of a yaml file key by key and checks types. Unknown keys are refused at the end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from u2moe.runtime.errors import UnsupportedError
from u2moe.runtime.validation import Record, quoted, shortened

Choice = TypeVar("Choice", bound=str)
MOST_NAMES = 10
LARGEST_SIZE = 1 << 20
"""Default limit for whole numbers in the file. The product of three such sizes fits in 64 bits."""
NAMEABLE = re.compile("[^\0\ud800-\udfff]*")


class Section(Record):
    """A mapping in a file; the top level if `name` is empty. If `is_whole` is false, keys may remain unread."""

    def __init__(self, file: str, values: object, name: str = "", *, is_whole: bool = True) -> None:
        super().__init__(values, name)
        self.file = file
        self._is_whole = is_whole
        self._sections: list[Section] = []

    def names(self) -> list[str]:
        """Return all keys that are text. `finish` refuses other keys."""
        return [key for key in self.values if isinstance(key, str)]

    def unsupported(self, key: str, found: object, supported: Iterable[str]) -> UnsupportedError:
        """Return the error for a value that WeNet supports and this project does not."""
        told = f"{self.file}: {self.field(key)} is {quoted(found)}, which is not supported; supported: "
        return UnsupportedError(told + ", ".join(supported))

    def refuse(self, keys: Iterable[str], reason: str) -> None:
        """Refuse each of `keys` that is present and not null."""
        for key in keys:
            if self.value(key) is not None:
                raise self.unsupported(key, self.value(key), (f"none, because {reason}",))

    def section(self, key: str, *, is_whole: bool = True) -> Section:
        """Return the mapping under `key`; an empty section if there is none."""
        value = self.value(key)
        self._sections.append(Section(self.file, {} if value is None else value, self.field(key), is_whole=is_whole))
        return self._sections[-1]

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = LARGEST_SIZE) -> int:
        """Return the whole number under `key`. Without a default, the key is required."""
        return super().integer(key, default, least=least, most=most)

    def optional_integer(self, key: str) -> int | None:
        """Return the whole number under `key`, at least 1; None if it is null or missing."""
        return None if self.value(key) is None else self.integer(key)

    def optional_text(self, key: str) -> str | None:
        """Return the string under `key`; None if it is null or missing. It must be possible as a file name."""
        value = self.value(key)
        if value is not None and not (isinstance(value, str) and NAMEABLE.fullmatch(value)):
            raise self.wrong(key, value, "a string or null")
        return value

    def choice(self, key: str, default: Choice, supported: tuple[Choice, ...]) -> Choice:
        """Return the name under `key`; `default` if it is missing. A name that is not in `supported` is refused."""
        value = self.value(key, default)
        for name in supported:
            if value == name:
                return name
        raise self.unsupported(key, value, supported)

    def finish(
        self, without_effect: Mapping[str, Iterable[str]], one_value: Mapping[str, Mapping[str, object]]
    ) -> None:
        """Refuse unknown keys here and in the sections below, because they may change the network.

        Args:
            without_effect: by section, keys that have no effect.
            one_value: by section and key, the only supported value, which is also the default.
        """
        for section in self._sections:
            section.finish(without_effect, one_value)
        if not self._is_whole:
            return
        for key, only in one_value.get(self.name, {}).items():
            value = self.value(key, only)
            if value != only or isinstance(value, bool) != isinstance(only, bool):
                raise self.unsupported(key, value, (repr(only),))
        self.known.update(without_effect.get(self.name, ()))
        unknown = sorted(map(_key, self.unread()))
        if unknown:
            where = f"{self.file}: {self.name}" if self.name else self.file
            raise UnsupportedError(
                f"{where} has unknown keys {_listed(unknown)}, which may change the network: "
                f"remove those that have no effect; known keys: {', '.join(sorted(map(_key, self.known))) or 'none'}"
            )


def _key(key: object) -> str:
    """Return a key for use in a message, in quotes only if it needs them."""
    return shortened(key) if isinstance(key, str) and key.isprintable() else quoted(key)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
