"""Streams the lines of a list; a line that cannot be parsed becomes an unreadable entry."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from u2moe.runtime.corpus.entry import Entry, Unreadable
from u2moe.runtime.corpus.storage import base_name, open_decompressed
from u2moe.runtime.errors import CorpusError

_LONGEST_QUOTE = 60
_LONGEST_LINE = 1 << 24
"""Longest line in bytes, so that a file of another kind is not read into memory."""


def read_lines(list_path: str) -> Iterator[tuple[int, str]]:
    """Numbers and contents of the lines of a text file, compressed by gzip or not, without those that are blank.

    Names of files need not be UTF-8: other bytes become surrogates, as in `os.fsdecode`.

    Raises:
        CorpusError: the file cannot be read.
    """
    try:
        with open_decompressed(list_path) as content:
            number = 0
            while line := content.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise CorpusError(f"{list_path}: line {number} is longer than {_LONGEST_LINE} bytes")
                text = line.decode("utf-8", "surrogateescape").strip()
                if text:
                    yield number, text.removeprefix("\ufeff") if number == 1 else text
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(f"{list_path}: cannot be read as a list of recordings: {reason}") from error


def first_line(list_path: str) -> str:
    """The first line that is not blank.

    Raises:
        CorpusError: there is none, or the file cannot be read.
    """
    for _, line in read_lines(list_path):
        return line
    raise CorpusError(f"{list_path}: lists no recordings")


def parse_lines(list_path: str, parse: Callable[[str], Entry]) -> Iterator[Entry]:
    """Utterances from lines; a line that cannot be understood becomes an `Unreadable` one, named by its number.

    Args:
        list_path: the file.
        parse: from a line to an utterance; raises ValueError or TypeError with what was found and expected.

    Raises:
        CorpusError: already the first line cannot be understood: it is a list of another kind.
    """
    is_first = True
    for number, line in read_lines(list_path):
        try:
            utterance = parse(line)
        except (ValueError, TypeError, RecursionError) as error:
            message = f"{list_path}: line {number}: {error}"
            if is_first:
                raise CorpusError(message) from error
            utterance = Entry(key=f"{base_name(list_path)}:{number}", source=Unreadable(error=message))
        is_first = False
        yield utterance


def json_object(line: str) -> dict[str, Any]:
    """The JSON object in a line; raises ValueError for anything else."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"found {line[:_LONGEST_QUOTE]!r}, expected a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise TypeError(f"found {line[:_LONGEST_QUOTE]!r}, expected a JSON object")
    return record


def text_of(record: Mapping[str, Any], name: str) -> str:
    """A field that must be a text with content; raises TypeError otherwise."""
    value = record.get(name)
    if not isinstance(value, str) or not value:
        raise TypeError(f"field {name!r}: found {value!r:.60}, expected a text")
    return value


def optional_text(record: Mapping[str, Any], name: str) -> str | None:
    """A field that is a text if it is there; numbers count as their digits, raises TypeError for anything else."""
    value = record.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"field {name!r}: found {value!r:.60}, expected a text")
    return value


def seconds_of(record: Mapping[str, Any], name: str) -> float | None:
    """A field that is a number of seconds if it is there; raises ValueError for one that cannot be a time."""
    value = record.get(name)
    if value is None:
        return None
    return seconds(value, f"field {name!r}")


def seconds(value: Any, name: str) -> float:
    """A number of seconds from a number or its digits; raises ValueError for one that cannot be a time."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name}: found {value!r:.60}, expected seconds")
    return number


def others(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The fields that have none of these names."""
    return {name: value for name, value in record.items() if name not in names}
