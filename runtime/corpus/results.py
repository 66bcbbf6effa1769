"""The results of a run: rows as the contents of files, read in order, and merged into one file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from u2moe.runtime.corpus.rows import Outcome, Row, as_json, outcome_of
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.whole_file import replacing

OUTPUT_FORMATS = ("jsonl", "parquet")
"""Formats of results, which are also the suffixes of their files; "parquet" needs pyarrow."""


def encode(rows: Iterable[Row], output_format: str) -> bytes:
    """Rows as the content of a file."""
    if output_format == "jsonl":
        return b"".join(_json_line(row) for row in rows)
    from u2moe.runtime.corpus import parquet  # noqa: PLC0415 - an extra

    return parquet.encode_rows(rows)


def decode(content: bytes, output_format: str) -> Iterator[Row]:
    """Rows from the content of a file."""
    if output_format == "jsonl":
        return map(json.loads, content.splitlines())
    from u2moe.runtime.corpus import parquet  # noqa: PLC0415 - an extra

    return parquet.decode_rows(content)


def _json_line(row: Row) -> bytes:
    try:
        return as_json(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a name that is not valid text
        return as_json(row).encode() + b"\n"


def read_outcomes(folder: OutputFolder) -> Iterator[Outcome]:
    """What the rows of a run say, in the order of the list.

    Raises:
        CorpusError: there is no run in the folder, or a file of its results is damaged.
    """
    output_format = folder.description().output_format
    for _, file, content in folder.contents():
        try:
            outcomes = [outcome_of(row) for row in decode(content, output_format)]
        except (ValueError, TypeError, KeyError) as error:
            raise CorpusError(
                f"{file}: is damaged: {error}: recognise its utterances again with --retry-failed"
            ) from error
        yield from outcomes


def is_faultless(content: bytes, output_format: str) -> bool:
    """Whether the content of a file is undamaged, and none of its rows has an error."""
    try:
        return all(row["error"] is None for row in decode(content, output_format))
    except (ValueError, TypeError, KeyError):
        return False


def merge(folder: OutputFolder, target: str | os.PathLike[str], *, allow_missing: bool = False) -> int:
    """Write all rows into one file of the same format, in the order of the list. Returns their number.

    Args:
        folder: the folder of a run.
        target: the file, which appears when it is whole.
        allow_missing: whether utterances may be missing.

    Raises:
        CorpusError: there is no run in the folder, or utterances are missing.
        OSError: the file cannot be written.
    """
    output_format = folder.description().output_format
    num_missing = folder.num_missing()
    if num_missing != 0 and not allow_missing:
        missing = "the list was not read to its end" if num_missing is None else f"{num_missing} are missing"
        raise CorpusError(f"{folder.path}: {missing}: run it to its end, or merge what is there with --partial")
    contents = (content for _, _, content in folder.contents())
    with replacing(Path(target)) as part, part.open("wb") as stream:
        if output_format == "jsonl":
            num_rows = 0
            for content in contents:
                stream.write(content)
                num_rows += content.count(b"\n")
            return num_rows
        from u2moe.runtime.corpus import parquet  # noqa: PLC0415 - an extra

        return parquet.merge(contents, stream)
