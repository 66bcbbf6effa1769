"""Counts n-grams, and estimates models by interpolated modified Kneser-Ney smoothing (Chen and Goodman 1998).

The results equal those of KenLM's lmplz.

Lower orders use continuation counts: for each n-gram, the number of distinct words that precede it. N-grams that
begin with <s> keep their counts. D(c) is the discount for a count c, and b(h) is the probability mass freed by the
discounts. The probability of a word w after a history h is computed from the counts c of n-grams::

    p(w | h) = (c(h w) - D(c(h w))) / c(h) + b(h) p(w | h without its first word)

Unigrams are interpolated with the uniform distribution, from which <unk> gets its probability.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.language.ngrams import BEGIN, END, UNKNOWN, Ngrams, find_nodes
from u2moe.runtime.validation import checked_integer

MARKERS = (UNKNOWN[0], BEGIN, END)
"""Special words, with ids 0, 1 and 2."""
_BEGIN, _END = 1, 2
_BLOCK = 1 << 20  # number of words that are counted at a time
MOST_ORDER = 5
_FALLBACK = (0.0, 0.5, 1.0, 1.5)
_NEVER = -99.0

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class NgramCounts:
    """The counts of the n-grams of one order.

    `words` are listed by id, `MARKERS` first. `rows` are distinct n-grams as word ids [n, order], and `counts` [n] how
    often they occur. Each sentence begins with <s>, repeated `order` - 1 times, and ends with one </s>.
    """

    words: tuple[str, ...]
    rows: Rows
    counts: Counts
    num_sentences: int


def count_ngrams(sentences: Iterable[Sequence[str]], order: int, *, min_word_count: int = 1) -> NgramCounts:
    """Count n-grams of `order` words in sentences, without <s> and </s>; words below `min_word_count` become <unk>."""
    ids = {word: number for number, word in enumerate(MARKERS)}
    block, num_sentences = array("I"), 0
    parts: list[tuple[Rows, Counts]] = []
    for sentence in sentences:
        if spoken := [ids.setdefault(word, len(ids)) for word in sentence if word not in MARKERS[1:]]:
            block.extend([*[_BEGIN] * (order - 1), *spoken, _END])
            num_sentences += 1
        if len(block) >= _BLOCK:
            parts.append(_counted(block, order))
            block = array("I")
            # Parts are merged only with parts of similar size, so each n-gram is sorted O(log n) times.
            while len(parts) > 1 and len(parts[-2][0]) < 2 * len(parts[-1][0]):
                parts.append(_merged(parts.pop(), parts.pop()))
    rows, counts = reduce(_merged, reversed([*parts, _counted(block, order)]))
    words = tuple(ids)
    if min_word_count > 1:
        keep = np.bincount(rows[:, -1], weights=counts, minlength=len(words)) >= min_word_count
        keep[: len(MARKERS)] = True
        new_ids = np.where(keep, np.cumsum(keep) - 1, 0).astype(np.uint32)
        rows, counts = merge_equal(new_ids[rows], counts)
        words = tuple(word for word, is_kept in zip(words, keep.tolist(), strict=True) if is_kept)
    return NgramCounts(words=words, rows=rows, counts=counts, num_sentences=num_sentences)


def _counted(block: array[int], order: int) -> tuple[Rows, Counts]:
    """Count the n-grams in a block of sentences, except those that end in <s>, because they span two sentences."""
    tokens = np.array(block, np.uint32)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, order) if len(tokens) else tokens.reshape(0, order)
    rows = windows[windows[:, -1] != _BEGIN]
    return merge_equal(rows, np.ones(len(rows), np.int64))


def _merged(one: tuple[Rows, Counts], other: tuple[Rows, Counts]) -> tuple[Rows, Counts]:
    return merge_equal(np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]))


def merge_equal(rows: Rows, counts: Counts) -> tuple[Rows, Counts]:
    """Return the distinct rows, sorted, with the sums of their counts."""
    if not len(rows):
        return rows, counts
    order = np.lexsort(rows.T[::-1])
    rows, counts = rows[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], (rows[1:] != rows[:-1]).any(axis=1)]))
    return rows[starts], np.add.reduceat(counts, starts)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Checked):
    """Options for estimating a language model.

    Attributes:
        order: length of the longest n-grams.
        prune: a threshold for each order, from unigrams on. N-grams whose count is at most the threshold are removed.
            The first threshold must be 0, and thresholds must not decrease. Orders without one use the last threshold.
        min_word_count: words that occur less often become <unk>.
    """

    order: int = option("integer", 3, least=1, most=MOST_ORDER, flag="--order")
    prune: tuple[int, ...] = (0,)
    min_word_count: int = option("integer", 1, least=1, flag="--min-word-count")

    def __post_init__(self) -> None:
        super().__post_init__()
        for threshold in self.prune:
            checked_integer("prune", threshold, least=0)
        if not self.prune or self.prune[0] != 0 or list(self.prune) != sorted(self.prune):
            raise ValueError(f"prune must begin with 0 and not decrease, got {' '.join(map(str, self.prune))}")
        if len(self.prune) > self.order:
            raise ValueError(f"prune must have at most {self.order} numbers, one per order, got {len(self.prune)}")


@dataclass(frozen=True, eq=False)
class _Level:
    """The n-grams of one order, sorted by history and word.

    `occurrences` are raw counts. `counts` are raw counts in the highest order and for n-grams that begin with <s>, and
    otherwise continuation counts. `parents` and `suffixes` are the indices of each n-gram without its last or its first
    word in the level one order below. `keys` are sorted, for look-up by parent and word.
    """

    rows: Rows
    counts: Counts
    occurrences: Counts
    parents: Counts
    suffixes: Counts
    keys: npt.NDArray[np.uint64]


def train(counts: NgramCounts, options: TrainingOptions, warn: Callable[[str], object] = lambda _: None) -> Ngrams:
    """Estimate a language model from the counts of the n-grams of the highest order.

    If the text is too small or too regular to estimate discounts, those of lmplz's `--discount_fallback` are used, and
    `warn` is called with a message. Raises ValueError if the text contains no words.
    """
    if not len(counts.rows):
        raise ValueError("the text has no words")
    levels = _levels(counts)
    probabilities, backoffs, kept = list[Floats](), list[Floats](), list[npt.NDArray[np.bool_]]()
    for number, level in enumerate(levels):
        discounts = _discounts(level.counts[level.counts > 0], number + 1, warn)
        keep = (level.occurrences > options.prune[min(number, len(options.prune) - 1)]) | (number == 0)
        classes = np.minimum(level.counts, 3)
        discounted = level.counts - discounts[classes]
        freed = np.where(keep, discounts[classes], level.counts)
        histories = len(levels[number - 1].rows) if number else 1
        totals = np.bincount(level.parents, weights=level.counts, minlength=histories)
        shares = np.bincount(level.parents, weights=freed, minlength=histories) / np.maximum(totals, 1)
        if number:
            lower = probabilities[-1][level.suffixes]
            backoffs.append(np.where(totals > 0, shares, 1.0))
        else:
            lower = np.full(len(counts.words), 1 / (len(counts.words) - 1))  # all words but <s>
        probabilities.append(discounted / totals[level.parents] + shares[level.parents] * lower)
        if not number:
            probabilities[0][_BEGIN] = 1.0
        kept.append(keep)
    backoffs.append(np.ones(len(levels[-1].rows)))
    orders = [
        (level.rows[keep], _log10(probability[keep]), _log10(backoff[keep]))
        for level, keep, probability, backoff in zip(levels, kept, probabilities, backoffs, strict=True)
    ]
    return Ngrams.of(counts.words, orders)


def _levels(counts: NgramCounts) -> list[_Level]:
    """Derive the n-grams of all orders from those of the highest order."""
    num_words, order = len(counts.words), counts.rows.shape[1]
    by_ending = np.lexsort(counts.rows.T)
    rows, occurrences = counts.rows[by_ending], counts.counts[by_ending]
    differs = np.ones((len(rows), order), bool)
    differs[1:] = np.logical_or.accumulate((rows[1:] != rows[:-1])[:, ::-1], axis=1)
    levels: list[_Level] = []
    for length in range(1, order + 1):
        starts = np.flatnonzero(differs[:, length - 1])
        endings = rows[starts, order - length :]
        adjusted = seen = np.add.reduceat(occurrences, starts)
        if length < order:
            before = np.add.reduceat(differs[:, length].astype(np.int64), starts)
            adjusted = np.where(endings[:, 0] == _BEGIN, seen, before)
        if length == 1:  # also <s>, <unk> and words that do not occur
            of_word, occurring = np.zeros((2, num_words), np.int64)
            of_word[endings[:, 0]], occurring[endings[:, 0]] = adjusted, seen
            ids, none = np.arange(num_words, dtype=np.uint32), np.zeros(num_words, np.int64)
            levels.append(_Level(ids[:, np.newaxis], of_word, occurring, none, none, ids.astype(np.uint64)))
            continue
        is_real = endings[:, 1] != _BEGIN
        endings, adjusted, seen = endings[is_real], adjusted[is_real], seen[is_real]
        parents = _places(levels, endings[:, :-1], num_words)
        keys = parents.astype(np.uint64) * np.uint64(num_words) + endings[:, -1]
        sorting = np.argsort(keys)
        endings = endings[sorting]
        suffixes = _places(levels, endings[:, 1:], num_words)
        levels.append(_Level(endings, adjusted[sorting], seen[sorting], parents[sorting], suffixes, keys[sorting]))
    return levels


def _places(levels: Sequence[_Level], rows: Rows, num_words: int) -> Counts:
    """Return the index of each n-gram in the level of its order."""
    places = rows[:, 0].astype(np.int64)
    for column in range(1, rows.shape[1]):
        places = find_nodes(levels[column].keys, places, rows[:, column], num_words) - 1
    return places


def _discounts(counts: Counts, length: int, warn: Callable[[str], object]) -> Floats:
    """Estimate the discounts for counts of 0, 1, 2, and at least 3 (equation 26 of Chen and Goodman)."""
    number = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if number[1:4].all():
        y = number[1] / (number[1] + 2 * number[2])
        found = [0.0, *(j - (j + 1) * y * number[j + 1] / number[j] for j in (1, 2, 3))]
        if all(0 <= discount <= j for j, discount in enumerate(found)):
            return np.array(found)
    warn(f"{length}-grams are too few or too regular to estimate discounts: using {_FALLBACK[1:]}")
    return np.array(_FALLBACK)


def _log10(values: Floats) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = np.log10(np.maximum(values, 10.0**_NEVER)).astype(np.float32)
    return found
