"""Reads and writes ARPA files, the text format of n-gram models, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import re
from array import array
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from u2moe.runtime.errors import LanguageModelError
from u2moe.runtime.language.ngrams import MOST_LOG, MOST_ORDER, MOST_WORDS, Ngrams
from u2moe.runtime.text.lines import read_lines
from u2moe.runtime.whole_file import replacing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from u2moe.runtime.language.ngrams import Order

_ZERO = -99.0
"""Stands for the logarithm of 0 in ARPA files."""


def read_arpa(path: Path) -> Ngrams:
    """Read a model from an ARPA file.

    Raises:
        LanguageModelError: the file cannot be read or is malformed; names file and line.
    """
    return _Reader(path).model()


def write_arpa(ngrams: Ngrams, path: Path) -> None:
    """Write a model as an ARPA file, compressed if its name ends in .gz.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as part, _create(part, is_compressed=path.suffix.lower() == ".gz") as file:
        file.write("\\data\\\n")
        for length, count in enumerate(ngrams.num_ngrams, start=1):
            file.write(f"ngram {length}={count}\n")
        for length in range(1, ngrams.order + 1):
            file.write(f"\n\\{length}-grams:\n")
            rows, log_probs, backoffs = ngrams.rows(length)
            for row, log_prob, backoff in zip(rows.tolist(), log_probs, backoffs, strict=True):
                text = " ".join(ngrams.words[number] for number in row)
                end = f"\t{backoff!s}" if length < ngrams.order else ""
                file.write(f"{log_prob!s}\t{text}{end}\n")
        file.write("\n\\end\\\n")


def _create(path: Path, *, is_compressed: bool) -> IO[str]:
    return gzip.open(path, "wt", encoding="utf-8") if is_compressed else path.open("w", encoding="utf-8")


class _Reader:
    """Reads one file, and counts lines for error messages."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = 0
        self._ids: dict[str, int] = {}

    def model(self) -> Ngrams:
        lines = self._lines()
        counts = self._counts(lines)
        highest = max(length for length, count in enumerate(counts, start=1) if count)
        orders = [self._order(lines, length, count, highest) for length, count in enumerate(counts[:highest], start=1)]
        end = next(lines, "")
        for length in range(highest + 1, len(counts) + 1):  # orders without n-grams may have a title
            end = next(lines, "") if end == f"\\{length}-grams:" else end
        self._expect(end, "\\end\\")
        return Ngrams.of(list(self._ids), orders, source=str(self._path))

    def _lines(self) -> Iterator[str]:
        """Lines without surrounding blanks, except empty ones."""
        for number, line in read_lines(self._path, "an ARPA file", LanguageModelError):
            self._number = number
            if stripped := line.strip(" \t\r"):
                yield stripped

    def _counts(self, lines: Iterator[str]) -> list[int]:
        """The numbers of n-grams of each order, from the header."""
        for line in lines:  # comments may come first
            if line == "\\data\\":
                break
        else:
            raise self._error("there is no \\data\\: not an ARPA file")
        counts: list[int] = []
        for line in lines:
            if line == "\\1-grams:":
                break
            found = re.fullmatch(r"ngram\s+(\d{1,2})\s*=\s*(\d{1,10})", line)
            if found and int(found[1]) == MOST_ORDER + 1 == len(counts) + 1:
                raise self._error(f"found n-grams of {found[1]} words, expected at most {MOST_ORDER}")
            if not found or int(found[1]) != len(counts) + 1:
                raise self._error(
                    f"found {line[:60]!r}, expected 'ngram {len(counts) + 1}=' and a count, or '\\1-grams:'"
                )
            counts.append(int(found[2]))
        if not counts or not 0 < counts[0] <= MOST_WORDS:
            raise self._error("the header counts no unigrams, or too many")
        return counts

    def _order(self, lines: Iterator[str], length: int, count: int, highest: int) -> Order:
        """The n-grams of one order. The title of the unigrams has been read with the header."""
        if length > 1:
            self._expect(next(lines, ""), f"\\{length}-grams:")
        ids, log_probs, backoffs = array("I"), array("f"), array("f")
        for _ in range(count):
            fields = next(lines, "").split()
            if len(fields) not in (length + 1, length + 2):
                raise self._error(f"found {' '.join(fields)[:60]!r}, expected a {length}-gram of {count}")
            try:
                log_probs.append(self._log_prob(fields[0]))
                backoffs.append(float(fields[-1]) if len(fields) == length + 2 and length < highest else 0.0)
                if length == 1:
                    ids.append(self._ids.setdefault(fields[1], len(self._ids)))
                else:
                    ids.extend([self._ids[word] for word in fields[1 : length + 1]])
            except (ValueError, OverflowError):
                raise self._error(f"found {' '.join(fields)[:60]!r}, expected numbers around words") from None
            except KeyError as error:
                raise self._error(f"{error.args[0]!r} is not among the unigrams") from None
        rows = np.array(ids, np.uint32).reshape(count, length)
        return rows, np.array(log_probs, np.float32), np.array(backoffs, np.float32)

    def _log_prob(self, field: str) -> float:
        log_prob = float(field)
        if not log_prob <= MOST_LOG:
            raise self._error(f"found {field}, expected the logarithm of a probability")
        return max(log_prob, _ZERO)  # some tools write -inf

    def _expect(self, found: str, expected: str) -> None:
        if found != expected:
            raise self._error(f"found {found[:60]!r}, expected {expected!r}")

    def _error(self, message: str) -> LanguageModelError:
        return LanguageModelError(f"{self._path}: line {self._number}: {message}")
