"""A binary format for n-gram models that takes a few bytes per n-gram: ARPA content with quantized numbers.

Layout: magic bytes, SHA-256 of the rest, length of the header, header in JSON (words and sizes), then arrays of
little-endian integers: numbers of children, words, probabilities and backoffs. Probabilities and backoffs are indices
into tables of at most 256 or 65536 values, one table per order.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import LanguageModelError
from u2moe.runtime.language.ngrams import Ngrams
from u2moe.runtime.whole_file import replacing

MAGIC = b"u2moe-lm\x01"
BITS = (8, 16)
"""Allowed sizes of the index of a probability or backoff."""
DIGEST_SIZE = 32
_LENGTH_SIZE = 4
_NUM_STEPS = 20


def write_compact(ngrams: Ngrams, path: Path, *, bits: int = 16) -> None:
    """Write a model with `bits` per probability and per backoff.

    Raises:
        ValueError: `bits` is neither 8 nor 16.
        OSError: it cannot be written.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be 8 or 16, got {bits!r}")
    children = ngrams.num_children()
    tables, codes = [], []
    begin = 1
    for number, count in enumerate(ngrams.num_ngrams):
        rows = slice(begin, begin + count)
        is_highest = number + 1 == ngrams.order
        for values in (ngrams.log_prob[rows], *([] if is_highest else [ngrams.backoff[rows]])):
            table, code = _quantize(values, bits)
            tables.append(table)
            codes.append(code)
        begin += count
    num_parents = 1 + sum(ngrams.num_ngrams[:-1])
    words = ngrams.word[1 + len(ngrams.words) :]
    counts = children[:num_parents]
    blocks = [_smallest(counts), _smallest(words), *tables, *codes]
    header = {
        "words": list(ngrams.words),
        "num_ngrams": ngrams.num_ngrams,
        "blocks": [[block.dtype.str, len(block)] for block in blocks],
    }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content = b"".join([len(encoded).to_bytes(_LENGTH_SIZE, "little"), encoded, *(block.tobytes() for block in blocks)])
    with replacing(path) as part:
        part.write_bytes(MAGIC + hashlib.sha256(content).digest() + content)


def parse_compact(content: bytes, source: str) -> Ngrams:
    """The model in the content of a compact file; `source` names it in errors.

    Raises:
        LanguageModelError: it is of another version, or damaged.
    """
    start = len(MAGIC) + DIGEST_SIZE
    if not content.startswith(MAGIC):
        raise LanguageModelError(f"{source}: is not a compact language model of this version")
    if hashlib.sha256(memoryview(content)[start:]).digest() != content[len(MAGIC) : start]:
        raise LanguageModelError(f"{source}: is damaged: its content differs from its digest")
    try:
        return _parse(content, start, source)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise LanguageModelError(f"{source}: is damaged: {error}") from error


def is_compact(content: bytes) -> bool:
    """Whether the content of a file starts with the magic bytes of the format, in any version."""
    return content.startswith(MAGIC[:-1])


def _parse(content: bytes, start: int, source: str) -> Ngrams:
    place = start + _LENGTH_SIZE + int.from_bytes(content[start : start + _LENGTH_SIZE], "little")
    header = json.loads(content[start + _LENGTH_SIZE : place])
    words, num_ngrams = header["words"], header["num_ngrams"]
    if not (isinstance(words, list) and all(isinstance(word, str) and word.split() == [word] for word in words)):
        raise ValueError("its words are no list of words")
    blocks: list[npt.NDArray[Any]] = []
    for dtype, length in header["blocks"]:
        if dtype not in ("|u1", "<u2", "<u4", "<f4"):
            raise ValueError(f"it has a block of type {dtype!r}")
        blocks.append(np.frombuffer(content, dtype, length, place))
        place += blocks[-1].nbytes
    if place != len(content) or len(blocks) != 2 + 2 * (2 * len(num_ngrams) - 1):
        raise ValueError("its blocks do not fill it")
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
        raise ValueError("the numbers of n-grams do not add up")
    return Ngrams(words, children, word, log_prob, backoff, source=source)


def _quantize(values: npt.NDArray[np.float32], bits: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """A table of distinct values, and the index of each value in it; lossless if the distinct values fit.

    Otherwise values are clustered. 0 (no backoff, or probability 1), the smallest and the largest value stay exact, and
    no other value becomes 0.
    """
    table, codes = np.unique(values, return_inverse=True)
    if len(table) > 1 << bits:
        centres = _centres(values[values != 0], (1 << bits) - 1)
        nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)]
        table, codes = np.unique(np.where(values == 0, np.float32(0), nearest), return_inverse=True)
    return table.astype("<f4"), codes.astype("|u1" if len(table) <= 256 else "<u2")


def _centres(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """Sorted cluster centres by one-dimensional k-means, including the smallest and the largest value."""
    distinct, weights = np.unique(values.astype(np.float64), return_counts=True)
    if len(distinct) <= count:
        return distinct.astype(np.float32)
    sums = np.concatenate([[0.0], np.cumsum(distinct * weights)])
    sizes = np.concatenate([[0], np.cumsum(weights)])
    # Initial density of centres: the cube root of the density of values, which is optimal for many centres.
    steps = np.cumsum(np.cbrt(weights[1:] * np.diff(distinct) ** 2))
    centres = np.interp(np.linspace(0, steps[-1], count), np.concatenate([[0.0], steps]), distinct)
    for _ in range(_NUM_STEPS):
        edges = np.searchsorted(distinct, (centres[1:] + centres[:-1]) / 2)
        bounds = np.concatenate([[0], edges, [len(distinct)]])
        members = np.diff(sizes[bounds])
        centres = np.where(members > 0, np.diff(sums[bounds]) / np.maximum(members, 1), centres)
        centres[[0, -1]] = distinct[[0, -1]]
    return np.unique(centres.astype(np.float32))


def _smallest(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Cast to the smallest unsigned type that holds all values."""
    most = int(values.max(initial=0))
    return values.astype("|u1" if most < 1 << 8 else "<u2" if most < 1 << 16 else "<u4")
