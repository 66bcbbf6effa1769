"""Streams the lines of a list; a line that cannot be parsed becomes an unreadable entry."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator

from u2moe.runtime.corpus.entry import Entry, Unreadable
from u2moe.runtime.corpus.storage import base_name, open_decompressed
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.validation import Record, wrong

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
        parse: from a line to an utterance; raises ValueError with what was found and expected.

    Raises:
        CorpusError: already the first line cannot be understood: it is a list of another kind.
    """
    is_first = True
    for number, line in read_lines(list_path):
        try:
            utterance = parse(line)
        except (ValueError, RecursionError) as error:
            message = f"{list_path}: line {number}: {error}"
            if is_first:
                raise CorpusError(message) from error
            utterance = Entry(key=f"{base_name(list_path)}:{number}", source=Unreadable(error=message))
        is_first = False
        yield utterance


def json_record(line: str) -> Record:
    """The fields of the JSON object in a line; raises ValueError for anything else."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise wrong("", f"a JSON object ({error})", line) from error
    return Record(values)
