"""Counts n-grams in text, in memory proportional to the number of distinct n-grams."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from u2moe.runtime.language.ngrams import BEGIN, END, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MARKERS = (UNKNOWN[0], BEGIN, END)
"""Special words, with ids 0, 1 and 2."""
_BEGIN, _END = 1, 2
_BLOCK = 1 << 20
"""Words per block: blocks are counted one at a time."""

Rows = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class NgramCounts:
    """Counts of the n-grams of one order.

    Attributes:
        words: words by id, `MARKERS` first.
        rows: distinct n-grams as word ids [n, order]. Each sentence is padded with `order` - 1 times <s> and one </s>.
        counts: number of occurrences of each [n].
        num_sentences: number of sentences.
    """

    words: tuple[str, ...]
    rows: Rows
    counts: Counts
    num_sentences: int


def count_ngrams(sentences: Iterable[Sequence[str]], order: int, *, min_word_count: int = 1) -> NgramCounts:
    """Count n-grams.

    Args:
        sentences: words of each sentence; <s> and </s> among them are ignored.
        order: length of the n-grams.
        min_word_count: words that are rarer become <unk>.
    """
    counter = _Counter(order)
    for sentence in sentences:
        counter.add(sentence)
    return counter.result(min_word_count)


def merge_equal(rows: Rows, counts: Counts) -> tuple[Rows, Counts]:
    """Sorted distinct rows, with the sums of their counts."""
    if not len(rows):
        return rows, counts
    order = np.lexsort(rows.T[::-1])
    rows, counts = rows[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)]))
    return rows[starts], np.add.reduceat(counts, starts)


class _Counter:
    def __init__(self, order: int) -> None:
        self._order = order
        self._ids = {word: number for number, word in enumerate(MARKERS)}
        self._block = array("I")
        self._parts: list[tuple[Rows, Counts]] = []
        self._num_sentences = 0

    def add(self, sentence: Sequence[str]) -> None:
        ids = self._ids
        spoken = [ids.setdefault(word, len(ids)) for word in sentence if word not in MARKERS[1:]]
        if not spoken:
            return
        self._block.extend([_BEGIN] * (self._order - 1))
        self._block.extend(spoken)
        self._block.append(_END)
        self._num_sentences += 1
        if len(self._block) >= _BLOCK:
            self._count_block()

    def result(self, min_word_count: int) -> NgramCounts:
        self._count_block()
        while len(self._parts) > 1:
            self._merge_last()
        rows, counts = self._parts[0] if self._parts else (np.zeros((0, self._order), np.uint32), np.zeros(0, np.int64))
        words = tuple(self._ids)
        if min_word_count > 1:
            of_word = np.bincount(rows[:, -1], weights=counts, minlength=len(words))
            keep = of_word >= min_word_count
            keep[: len(MARKERS)] = True
            new_ids = np.where(keep, np.cumsum(keep) - 1, 0).astype(np.uint32)
            rows, counts = merge_equal(new_ids[rows], counts)
            words = tuple(word for word, is_kept in zip(words, keep.tolist(), strict=True) if is_kept)
        return NgramCounts(words=words, rows=rows, counts=counts, num_sentences=self._num_sentences)

    def _count_block(self) -> None:
        """Count the block. N-grams that end in <s> would span two sentences, and are skipped."""
        tokens = np.array(self._block, np.uint32)
        self._block = array("I")
        if len(tokens) < self._order:
            return
        windows = np.lib.stride_tricks.sliding_window_view(tokens, self._order)
        rows = windows[windows[:, -1] != _BEGIN]
        self._parts.append(merge_equal(rows, np.ones(len(rows), np.int64)))
        # Merging only parts of similar size bounds how often an n-gram is sorted by a logarithm.
        while len(self._parts) > 1 and len(self._parts[-2][0]) < 2 * len(self._parts[-1][0]):
            self._merge_last()

    def _merge_last(self) -> None:
        (rows, counts), (others, more) = self._parts.pop(), self._parts.pop()
        self._parts.append(merge_equal(np.concatenate([rows, others]), np.concatenate([counts, more])))
