"""The API keys of a server: a name and a number of streams for each, from a file that can be read anew."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.validation import checked_integer


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key.

    Attributes:
        name: its name in logs and errors.
        secret: what clients send.
        num_streams: streams and files that it may have at once, in each worker; None: all.
    """

    name: str
    secret: str
    num_streams: int | None = None

    def __post_init__(self) -> None:
        if not (self.secret and self.secret.isascii() and self.secret.isprintable()) or " " in self.secret:
            raise ValueError(f"the API key {self.name} must be printable ASCII without spaces: it is sent in headers")
        if self.num_streams is not None:
            checked_integer(f"the number of streams of the key {self.name}", self.num_streams, least=1)


def read_keys(file: Path) -> tuple[Key, ...]:
    """The keys in a file: a single one, or on each line a name, a key and, if it is limited, a number of streams.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no key, or a line of another kind; names the line, not what it holds.
    """
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip() and line.lstrip()[0] != "#"]
    if not rows:
        raise ValueError(f"{file}: holds no API key")
    if len(rows) == 1 and len(rows[0][1]) == 1:
        return (Key(name="default", secret=rows[0][1][0]),)
    keys = []
    for number, row in rows:
        if len(row) not in (2, 3) or not all(part.isdecimal() for part in row[2:]):
            raise ValueError(f"{file}: line {number} must be a name, a key and, if you like, a number of streams")
        keys.append(Key(name=row[0], secret=row[1], num_streams=int(row[2]) if len(row) == 3 else None))
    for attribute in ("name", "secret"):
        if len({getattr(key, attribute) for key in keys}) < len(keys):
            raise ValueError(f"{file}: two keys have the same {attribute}")
    return tuple(keys)


class Keys:
    """The keys in force.

    Attributes:
        by_name: each key, by its name; empty: none is needed.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._file = options.keys_file
        self.by_name: Mapping[str, Key] = {}
        if self._file is None and options.api_key is not None:
            self.by_name = {"default": Key(name="default", secret=options.api_key)}
        self.reload()

    def reload(self) -> None:
        """Read the file anew, if there is one.

        Raises:
            OSError: it cannot be read; the keys stay as they were.
            ValueError: it holds something else; the keys stay as they were.
        """
        if self._file is not None:
            self.by_name = {key.name: key for key in read_keys(self._file)}

    def find(self, candidates: Iterable[str]) -> Key | None:
        """The key among the candidates; each is compared with all, in the same time wherever they differ."""
        given = [candidate.encode() for candidate in candidates]
        equal = [
            key
            for key in self.by_name.values()
            if sum(hmac.compare_digest(candidate, key.secret.encode()) for candidate in given)
        ]
        return equal[0] if equal else None
