"""Lists of recordings with transcripts, and word errors of recognised text. Independent of models."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from u2moe.runtime.errors import AudioError


@dataclass(frozen=True, kw_only=True)
class Recording:
    """An audio file and its transcript."""

    path: Path
    transcript: str


def read_manifest(file: str | os.PathLike[str]) -> list[Recording]:
    """Recordings from a text file with lines of "path<TAB>transcript"; paths are relative to the file's folder.

    Raises:
        AudioError: the file cannot be read, or a line is malformed; names file and line.
    """
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AudioError(f"{path}: cannot be read as a list of recordings: {error}") from error
    recordings = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, tab, transcript = line.partition("\t")
        if not tab or not name.strip():
            raise AudioError(f"{path}: line {number}: found {line[:60]!r}, expected path<TAB>transcript")
        recordings.append(Recording(path=path.parent / name.strip(), transcript=transcript.strip()))
    if not recordings:
        raise AudioError(f"{path}: lists no recordings")
    return recordings


def words(text: str) -> list[str]:
    """The words to compare: upper case, without punctuation except apostrophes, CJK characters as single words."""
    spaced = re.sub(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])", r" \1 ", text.upper().replace("\u2019", "'"))
    return re.findall(r"[\w']+", spaced)


def edit_distance(reference: Sequence[object], hypothesis: Sequence[object]) -> int:
    """The minimum number of substitutions, deletions and insertions between the two sequences."""
    row = list(range(len(hypothesis) + 1))
    for number, expected in enumerate(reference, 1):
        diagonal, row[0] = row[0], number
        for column, found in enumerate(hypothesis, 1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (expected != found)),
            )
    return row[-1]


def matches(reference: Sequence[object], hypothesis: Sequence[object]) -> list[tuple[int, int]]:
    """Index pairs of equal items in an alignment with the minimum number of edits, in order."""
    rows = [list(range(len(hypothesis) + 1))]
    for number, expected in enumerate(reference, 1):
        above, row = rows[-1], [number]
        for column, found in enumerate(hypothesis, 1):
            row.append(min(above[column] + 1, row[-1] + 1, above[column - 1] + (expected != found)))
        rows.append(row)
    pairs = []
    place, column = len(reference), len(hypothesis)
    while place and column:
        is_equal = reference[place - 1] == hypothesis[column - 1]
        if rows[place][column] == rows[place - 1][column - 1] + (not is_equal):
            place, column = place - 1, column - 1
            if is_equal:
                pairs.append((place, column))
        elif rows[place][column] == rows[place - 1][column] + 1:
            place -= 1
        else:
            column -= 1
    return pairs[::-1]


@dataclass(kw_only=True)
class WordErrors:
    """Word errors, accumulated over texts."""

    num_errors: int = 0
    num_words: int = 0

    def add(self, transcript: str, text: str) -> None:
        """Count the errors of one text against its transcript."""
        reference = words(transcript)
        self.num_errors += edit_distance(reference, words(text))
        self.num_words += len(reference)

    @property
    def rate(self) -> float:
        """Errors per word of the transcripts; 0 without words."""
        return self.num_errors / self.num_words if self.num_words else 0.0
