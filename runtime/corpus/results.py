"""The results of a run: read in order, and merged into one file."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from u2moe.runtime.corpus.rows import Outcome, Row, outcome_of
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.whole_file import replacing


def rows_by_block(folder: OutputFolder) -> Iterator[list[Row]]:
    """The rows of each block of a run, in the order of the list.

    Raises:
        CorpusError: there is no run in the folder, or a file of its results is damaged.
    """
    folder.description()
    for _, file, content in folder.contents():
        try:
            rows = [json.loads(line) for line in content.splitlines()]
            for row in rows:
                outcome_of(row)
        except (ValueError, TypeError, KeyError) as error:
            raise CorpusError(
                f"{file}: is damaged: {error}: recognise its utterances again with --retry-failed"
            ) from error
        yield rows


def read_outcomes(folder: OutputFolder) -> Iterator[Outcome]:
    """The rows of a run, in the order of the list; for errors see `rows_by_block`."""
    for rows in rows_by_block(folder):
        yield from map(outcome_of, rows)


def is_faultless(content: bytes) -> bool:
    """Whether the content of a block's file is undamaged, and none of its rows has an error."""
    try:
        return all(json.loads(line)["error"] is None for line in content.splitlines())
    except (ValueError, TypeError, KeyError):
        return False


def merge(folder: OutputFolder, target: str | os.PathLike[str]) -> int:
    """Write all rows into one file, in the order of the list. Returns their number.

    Args:
        folder: the folder of a run.
        target: the file, which appears when it is whole. Its name says what it is: .jsonl, a JSON object on a line for
            each row; .csv, the fields that are one value; .parquet, which needs pyarrow.

    Raises:
        CorpusError: there is no run in the folder, utterances are missing, or a file of the results is damaged.
        OSError: the file cannot be written.
    """
    num_missing = folder.num_missing()
    folder.description()
    if num_missing != 0:
        missing = "the list was not read to its end" if num_missing is None else f"{num_missing} are missing"
        raise CorpusError(f"{folder.path}: {missing}: run it to its end")
    target = Path(target)
    if target.suffix not in (".jsonl", ".csv", ".parquet"):
        raise ValueError(f"{target}: the name must end in .jsonl, .csv or .parquet")
    if target.suffix == ".csv":
        with replacing(target) as part:
            return _write_csv(itertools.chain.from_iterable(rows_by_block(folder)), part)
    if target.suffix == ".parquet":
        from u2moe.runtime.corpus import parquet  # noqa: PLC0415 - an extra

        with replacing(target) as part:
            return parquet.write(rows_by_block(folder), part)
    num_rows = 0
    with replacing(target) as part, part.open("wb") as stream:
        for _, _, content in folder.contents():
            stream.write(content)
            num_rows += content.count(b"\n")
    return num_rows


def _write_csv(rows: Iterator[Row], file: Path) -> int:
    """Write a table with the fields of all rows that are one value; returns the number of rows."""
    num_rows, first = 0, next(rows, {})
    columns = [name for name in first if name not in ("segments", "options", "fields", "warnings", "model")]
    with file.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        for row in itertools.chain([first] if first else [], rows):
            writer.writerow(row)
            num_rows += 1
    return num_rows
