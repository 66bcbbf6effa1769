"""Results of a run: read them in order, merge them into one file, and score them."""

import bisect
import contextlib
import csv
import heapq
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from u2moe.runtime.corpus.rows import Outcome, Row, outcome_of
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.text.word_errors import WordErrors
from u2moe.runtime.whole_file import replacing

_LENGTHS_S = (2, 5, 10, 20, 30)  # boundaries in seconds of the groups, if entries are grouped by length
_NUM_SAMPLES = 1000
_CONFIDENCE = 0.95


def rows_by_block(folder: OutputFolder) -> Iterator[list[Row]]:
    """Yield the rows of each block, in order. Raise CorpusError if the folder has no run, or a file is damaged."""
    folder.description()
    for _, file, content in folder.contents():
        try:
            rows = [json.loads(line) for line in content.splitlines()]
            for row in rows:
                outcome_of(row)
        except (ValueError, TypeError, KeyError) as error:
            remedy = "use --retry-failed to recognise its utterances again"
            raise CorpusError(f"{file}: is damaged: {error}; {remedy}") from error
        yield rows


def read_outcomes(folder: OutputFolder) -> Iterator[Outcome]:
    """Yield the rows of a run, in the order of the list. For errors, see `rows_by_block`."""
    for rows in rows_by_block(folder):
        yield from map(outcome_of, rows)


def is_faultless(content: bytes) -> bool:
    """Return whether the file of a block is undamaged and its rows have no errors."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return all(json.loads(line)["error"] is None for line in content.splitlines())
    return False


def merge(folder: OutputFolder, target: str | os.PathLike[str]) -> int:
    """Write all rows to one file, in the order of the list. Return the number of rows.

    Args:
        folder: the folder of a run.
        target: the file. It appears only when it is complete. Its suffix selects the format: .jsonl (a JSON object per
            row), .csv (only fields with a single value) or .parquet (needs pyarrow).

    Raises:
        CorpusError: the folder contains no run, entries are missing, or a file of results is damaged.
        OSError: the file cannot be written.
    """
    num_missing = folder.num_missing()
    folder.description()
    if num_missing != 0:
        missing = "the list was not read completely" if num_missing is None else f"{num_missing} utterances are missing"
        raise CorpusError(f"{folder.path}: {missing}: complete the run first")
    target = Path(target)
    if target.suffix not in (".jsonl", ".csv", ".parquet"):
        raise ValueError(f"{target}: the name must end in .jsonl, .csv or .parquet")
    with replacing(target) as part:
        if target.suffix == ".csv":
            return _write_csv(folder, part)
        if target.suffix == ".parquet":
            from u2moe.runtime.corpus import parquet  # noqa: PLC0415 - an extra

            return parquet.write(rows_by_block(folder), part)
        num_rows = 0
        with part.open("wb") as stream:
            for _, _, content in folder.contents():
                stream.write(content)
                num_rows += content.count(b"\n")
    return num_rows


def _write_csv(folder: OutputFolder, file: Path) -> int:
    """Write all columns except segments, options, fields, warnings and model as CSV. Return the number of rows."""

    def rows() -> Iterator[Row]:
        return itertools.chain.from_iterable(rows_by_block(folder))

    left_out, num_rows = ("segments", "options", "fields", "warnings", "model"), 0
    columns = dict.fromkeys(name for row in rows() for name in row if name not in left_out)  # rows omit unknown fields
    with file.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows():
            writer.writerow(row)
            num_rows += 1
    return num_rows


@dataclass(frozen=True, kw_only=True)
class ScoredEntry:
    """The word errors of an entry."""

    key: str
    num_errors: int
    num_words: int
    reference: str
    text: str


@dataclass(kw_only=True)
class GroupScore:
    """The word errors of a group of entries.

    Attributes:
        num_utterances: number of entries with a transcript.
        num_errors: number of substitutions, deletions and insertions.
        num_words: number of words in the transcripts.
    """

    num_utterances: int = 0
    num_errors: int = 0
    num_words: int = 0
    _pairs: Counter[tuple[int, int]] = field(default_factory=Counter)
    """For the bootstrap: number of entries for each pair (number of errors, number of words)."""

    def add(self, num_errors: int, num_words: int) -> None:
        """Add an entry to the group, given its numbers of errors and words."""
        self.num_utterances += 1
        self.num_errors += num_errors
        self.num_words += num_words
        self._pairs[num_errors, num_words] += 1

    @property
    def rate(self) -> float:
        """Errors divided by words; 0 if there are no words."""
        return self.num_errors / self.num_words if self.num_words else 0.0

    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of the rate, from a bootstrap over entries."""
        if not self.num_words:
            return 0.0, 0.0
        pairs = np.array(list(self._pairs), np.float64)
        counts = np.array(list(self._pairs.values()))
        drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=_NUM_SAMPLES)
        errors, num_words = (drawn @ pairs).T
        rates = errors[num_words > 0] / num_words[num_words > 0]
        low, high = np.quantile(rates, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
        return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The word errors of a corpus.

    Attributes:
        total: errors of all entries.
        groups: errors of each group, sorted by name.
        worst: entries with the most errors, in descending order.
        num_without_transcript: number of entries without a transcript. They are not scored.
        num_failed: number of scored entries whose recognition failed or ended early. Missing words count as deletions.
        report: word errors by kind, and words that are confused with each other.
    """

    total: GroupScore
    groups: Mapping[str, GroupScore]
    worst: list[ScoredEntry]
    num_without_transcript: int
    num_failed: int
    report: WordErrors


def score(outcomes: Iterable[Outcome], *, by: str | None = None, num_worst: int = 0) -> Score:
    """Score recognised texts against their transcripts. Both are split into words by `word_errors.words`.

    Args:
        outcomes: rows of results. Only counts and the worst entries stay in memory.
        by: how to group entries: "speaker", "length", or a field of the list, such as "set". None: no groups.
        num_worst: number of worst entries to return.

    Raises:
        CorpusError: no entry has a transcript.
    """
    total, report = GroupScore(), WordErrors()
    groups: dict[str, GroupScore] = {}
    worst: list[tuple[int, float, int, ScoredEntry]] = []
    num_without = num_failed = 0
    for number, outcome in enumerate(outcomes):
        if outcome.reference is None:
            num_without += 1
            continue
        before = (report.num_errors, report.num_words)
        report.add(outcome.reference, outcome.text)
        errors, num_words = report.num_errors - before[0], report.num_words - before[1]
        num_failed += outcome.error is not None
        total.add(errors, num_words)
        if by is not None:
            groups.setdefault(_group_of(outcome, by), GroupScore()).add(errors, num_words)
        if num_worst and errors:
            scored = ScoredEntry(
                key=outcome.key, num_errors=errors, num_words=num_words, reference=outcome.reference, text=outcome.text
            )
            item = (errors, errors / max(num_words, 1), -number, scored)
            (heapq.heappush if len(worst) < num_worst else heapq.heappushpop)(worst, item)
    if not total.num_utterances:
        raise CorpusError("no utterance has a transcript: the list must contain transcripts (see docs/corpora.md)")
    return Score(
        total=total,
        groups={name: groups[name] for name in sorted(groups, key=_natural)},
        worst=[item[-1] for item in sorted(worst, reverse=True)],
        num_without_transcript=num_without,
        num_failed=num_failed,
        report=report,
    )


def _group_of(outcome: Outcome, by: str) -> str:
    if by == "speaker":
        return outcome.speaker or "unknown"
    if by != "length":
        return str(outcome.fields.get(by, "unknown"))
    place = bisect.bisect_right(_LENGTHS_S, outcome.duration)
    if place == len(_LENGTHS_S):
        return f"{_LENGTHS_S[-1]} s and more"
    return f"{(0, *_LENGTHS_S)[place]} to {_LENGTHS_S[place]} s"


def _natural(name: str) -> tuple[float, str]:
    """Return a sort key. Names that begin with a number are sorted by this number."""
    digits = name.split(" ", 1)[0]
    return (float(digits), name) if digits.isdigit() else (float("inf"), name)
