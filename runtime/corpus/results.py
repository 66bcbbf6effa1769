"""The results of a run: read in order, and merged into one file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from u2moe.runtime.corpus.block_writer import decode
from u2moe.runtime.corpus.output_folder import OutputFolder
from u2moe.runtime.corpus.rows import Outcome, outcome_of
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.whole_file import replacing


def read_outcomes(folder: OutputFolder) -> Iterator[Outcome]:
    """What the rows of a run say, in the order of the list.

    Raises:
        CorpusError: there is no run in the folder, or a file of its results is damaged.
    """
    output_format = folder.description().output_format
    for start, content in folder.contents():
        try:
            outcomes = [outcome_of(row) for row in decode(content, output_format)]
        except (ValueError, TypeError, KeyError) as error:
            raise CorpusError(
                f"{folder.file_at(start)}: is damaged: {error}: recognise its utterances again with --retry-failed"
            ) from error
        yield from outcomes


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
    with replacing(Path(target)) as part, part.open("wb") as stream:
        return (_merge_lines if output_format == "jsonl" else _merge_tables)(folder, stream)


def _merge_lines(folder: OutputFolder, stream: BinaryIO) -> int:
    num_rows = 0
    for _, content in folder.contents():
        stream.write(content)
        num_rows += content.count(b"\n")
    return num_rows


def _merge_tables(folder: OutputFolder, stream: BinaryIO) -> int:
    from u2moe.runtime.corpus import parquet  # noqa: PLC0415 - an extra

    return parquet.merge((content for _, content in folder.contents()), stream)
