"""Streams the lines of a list; a line that cannot be parsed becomes an unreadable entry."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from u2moe.runtime.corpus.entry import Entry, Unreadable
from u2moe.runtime.corpus.storage import base_name, open_binary
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.text.lines import read_lines as text_lines
from u2moe.runtime.validation import Record, wrong

_PIECE = 1 << 20


def read_lines(list_path: str) -> Iterator[tuple[int, str]]:
    """Numbers and contents of the lines of a text file, compressed by gzip or not, without those that are blank.

    Names of files need not be UTF-8: other bytes become surrogates, as in `os.fsdecode`.

    Raises:
        CorpusError: the file cannot be read.
    """
    opened = open_binary(list_path)
    lines = text_lines(list_path, "a list of recordings", CorpusError, opened=opened, errors="surrogateescape")
    return ((number, line.strip()) for number, line in lines)


def count_lines(list_path: str) -> int:
    """The number of lines that are not blank."""
    return sum(1 for _ in read_lines(list_path))


def content_of(list_path: str, _options: object = None) -> Iterator[bytes]:
    """The content of a file; OSError: it cannot be read."""
    with open_binary(list_path) as stream:
        while piece := stream.read(_PIECE):
            yield piece


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
