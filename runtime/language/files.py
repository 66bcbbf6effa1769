"""Reads and writes n-gram models as ARPA text (plain or gzip), or in a compact binary format.

Layout of the binary format: magic bytes, SHA-256 of the rest, length of the header, JSON header (words and sizes), and
little-endian arrays. The first array contains the number of children of each n-gram below the highest order. The second
contains the word of each n-gram except unigrams. Then come each order's tables of probabilities and backoffs, with at
most 256 or 65536 values per table. The last arrays contain the indices of each n-gram's values in these tables.
"""

import gzip
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import LanguageModelError
from u2moe.runtime.language.ngrams import MOST_LOG, MOST_ORDER, MOST_WORDS, Ngrams, Order
from u2moe.runtime.text.lines import read_lines
from u2moe.runtime.whole_file import replacing

MAGIC = b"u2moe-lm\x01"
BITS = (8, 16)
"""Allowed numbers of bits per table index of a probability or backoff."""
DIGEST_SIZE = 32
_LENGTH_SIZE = 4
_ZERO = -99.0  # the logarithm of 0 in ARPA files


def read_arpa(path: Path) -> Ngrams:
    """Read an ARPA file. Raises LanguageModelError with file and line if it cannot be read or is malformed."""
    return _Reader(path).model()


def write_arpa(ngrams: Ngrams, path: Path) -> None:
    """Write an ARPA file, compressed if its name ends in .gz. Raises OSError if it cannot be written."""
    create: Callable[..., IO[str]] = gzip.open if path.suffix.lower() == ".gz" else open
    with replacing(path) as part, create(part, "wt", encoding="utf-8") as file:
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
        """Yield lines that are not empty, without surrounding white space."""
        for number, line in read_lines(self._path, "an ARPA file", LanguageModelError):
            self._number = number
            if stripped := line.strip(" \t\r"):
                yield stripped

    def _counts(self, lines: Iterator[str]) -> list[int]:
        """Read the number of n-grams of each order from the header."""
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
                raise self._wrong(line, f"'ngram {len(counts) + 1}=' and a count, or '\\1-grams:'")
            counts.append(int(found[2]))
        if not counts or not 0 < counts[0] <= MOST_WORDS:
            raise self._error("the number of unigrams in the header is 0 or too large")
        return counts

    def _order(self, lines: Iterator[str], length: int, count: int, highest: int) -> Order:
        """Read the n-grams of one order. The line that begins the unigrams was already read with the header."""
        if length > 1:
            self._expect(next(lines, ""), f"\\{length}-grams:")
        ids, log_probs, backoffs = array("I"), array("f"), array("f")
        for _ in range(count):
            fields = next(lines, "").split()
            if len(fields) not in (length + 1, length + 2):
                raise self._wrong(" ".join(fields), f"a {length}-gram (the header announces {count} of them)")
            try:
                log_prob = float(fields[0])
                if not log_prob <= MOST_LOG:
                    raise self._error(f"found {fields[0]}, expected the logarithm of a probability")
                log_probs.append(max(log_prob, _ZERO))  # some tools write -inf
                backoffs.append(float(fields[-1]) if len(fields) == length + 2 and length < highest else 0.0)
                if length == 1:
                    ids.append(self._ids.setdefault(fields[1], len(self._ids)))
                else:
                    ids.extend([self._ids[word] for word in fields[1 : length + 1]])
            except (ValueError, OverflowError):
                raise self._wrong(" ".join(fields), "a log probability, words and optionally a backoff") from None
            except KeyError as error:
                raise self._error(f"{error.args[0]!r} is not among the unigrams") from None
        rows = np.array(ids, np.uint32).reshape(count, length)
        return rows, np.array(log_probs, np.float32), np.array(backoffs, np.float32)

    def _expect(self, found: str, expected: str) -> None:
        if found != expected:
            raise self._wrong(found, repr(expected))

    def _wrong(self, found: str, expected: str) -> LanguageModelError:
        return self._error(f"found {found[:60]!r}, expected {expected}")

    def _error(self, message: str) -> LanguageModelError:
        return LanguageModelError(f"{self._path}: line {self._number}: {message}")


def write_compact(ngrams: Ngrams, path: Path, *, bits: int = 16) -> None:
    """Write a compact file, with `bits` (8 or 16, else ValueError) per probability and backoff. Raises OSError."""
    if bits not in BITS:
        raise ValueError(f"bits must be 8 or 16, got {bits!r}")
    columns = [
        _quantize(column[begin:end], bits)
        for begin, end in pairwise(accumulate(ngrams.num_ngrams, initial=1))
        for column in ((ngrams.log_prob, ngrams.backoff) if end < len(ngrams.word) else (ngrams.log_prob,))
    ]
    tables, codes = zip(*columns, strict=True)
    counts = ngrams.num_children()[: -ngrams.num_ngrams[-1]]
    blocks = [_smallest(counts), _smallest(ngrams.word[1 + len(ngrams.words) :]), *tables, *codes]
    listed = [[block.dtype.str, len(block)] for block in blocks]
    header = {"words": list(ngrams.words), "num_ngrams": ngrams.num_ngrams, "blocks": listed}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content = b"".join([len(encoded).to_bytes(_LENGTH_SIZE, "little"), encoded, *(block.tobytes() for block in blocks)])
    with replacing(path) as part:
        part.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)


def parse_compact(content: bytes, source: str) -> Ngrams:
    """Parse a compact file. Raises LanguageModelError, which names `source`, if it is another file or damaged."""
    start = len(MAGIC) + DIGEST_SIZE
    if not content.startswith(MAGIC):
        raise LanguageModelError(f"{source}: is not a compact language model that this version can read")
    if hashlib.sha256(memoryview(content)[start:]).digest() != content[len(MAGIC) : start]:
        raise LanguageModelError(f"{source}: is damaged: its content does not match its digest")
    try:
        return _parse(content, start, source)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise LanguageModelError(f"{source}: is damaged: {error}") from error


def _parse(content: bytes, start: int, source: str) -> Ngrams:
    place = start + _LENGTH_SIZE + int.from_bytes(content[start : start + _LENGTH_SIZE], "little")
    header = json.loads(content[start + _LENGTH_SIZE : place])
    words, num_ngrams = header["words"], header["num_ngrams"]
    if not (isinstance(words, list) and all(isinstance(word, str) and word.split() == [word] for word in words)):
        raise ValueError("its vocabulary is not a list of words")
    blocks: list[npt.NDArray[Any]] = []
    for dtype, length in header["blocks"]:
        if dtype not in ("|u1", "<u2", "<u4", "<f4"):
            raise ValueError(f"it has a block of type {dtype!r}")
        blocks.append(np.frombuffer(content, dtype, length, place))
        place += blocks[-1].nbytes
    if place != len(content) or len(blocks) != 2 + 2 * (2 * len(num_ngrams) - 1):
        raise ValueError("its header does not match its blocks")
    counts, later = blocks[:2]
    tables, codes = blocks[2 : 1 + len(blocks) // 2], blocks[1 + len(blocks) // 2 :]
    columns = [table[code] for table, code in zip(tables, codes, strict=True)]
    zero = np.zeros(1, np.float32)
    log_prob = np.concatenate([zero, *columns[::2]])
    backoff = np.concatenate([zero, *columns[1::2], np.zeros(len(columns[-1]), np.float32)])
    word = np.concatenate([[0], np.arange(len(words)), later]).astype(np.uint32)
    children = np.zeros(len(word), np.int64)
    children[: len(counts)] = counts
    if not len(word) == len(log_prob) == len(backoff):
        raise ValueError("the numbers of n-grams are inconsistent")
    return Ngrams(words, children, word, log_prob, backoff, source=source)


def _quantize(values: npt.NDArray[np.float32], bits: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Return a table of values, and for each of `values` its index in the table.

    This is lossless for at most 2 ** bits distinct values. Otherwise, values are clustered. Zero (no backoff, or
    probability 1), the smallest and the largest value stay exact, and no other value becomes 0.
    """
    table, codes = np.unique(values, return_inverse=True)
    if len(table) > 1 << bits:
        centres = _centres(values[values != 0], (1 << bits) - 1)
        nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)]
        table, codes = np.unique(np.where(values == 0, np.float32(0), nearest), return_inverse=True)
    return table.astype("<f4"), codes.astype("|u1" if len(table) <= 256 else "<u2")


def _centres(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """Return sorted cluster centres from one-dimensional k-means, including the smallest and the largest value."""
    distinct, weights = np.unique(values.astype(np.float64), return_counts=True)
    if len(distinct) <= count:
        return distinct.astype(np.float32)
    sums = np.concatenate([[0.0], np.cumsum(distinct * weights)])
    sizes = np.concatenate([[0], np.cumsum(weights)])
    # Initial density of centres: cube root of the density of values, which is optimal for many centres.
    steps = np.cumsum(np.cbrt(weights[1:] * np.diff(distinct) ** 2))
    centres = np.interp(np.linspace(0, steps[-1], count), np.concatenate([[0.0], steps]), distinct)
    for _ in range(20):
        bounds = np.concatenate([[0], np.searchsorted(distinct, (centres[1:] + centres[:-1]) / 2), [len(distinct)]])
        members = np.diff(sizes[bounds])
        centres = np.where(members > 0, np.diff(sums[bounds]) / np.maximum(members, 1), centres)
        centres[[0, -1]] = distinct[[0, -1]]
    return np.unique(centres.astype(np.float32))


def _smallest(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Cast to the smallest unsigned type that fits all values."""
    most = int(values.max(initial=0))
    return values.astype("|u1" if most < 1 << 8 else "<u2" if most < 1 << 16 else "<u4")
