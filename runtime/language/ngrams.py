"""A backoff n-gram model as a trie in arrays.

It returns probabilities of words, and upper bounds on those of all words with a common prefix.

Node 0 is the root (empty history). The nodes of each order follow those of the order below, sorted by history and word.
The children of a node are thus consecutive, and a range of words is found by bisection. Ordinary words are sorted by
their upper-case spelling, so words with a common prefix form a range. Special words follow.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import LanguageModelError
from u2moe.runtime.text.vocabulary import is_special

BEGIN, END = "<s>", "</s>"
UNKNOWN = ("<unk>", "<UNK>")
MOST_ORDER = 9
MOST_WORDS = 1 << 24
LN10 = math.log(10)
_MOST_NODES = 1 << 31
MOST_LOG = 1e-4
"""Upper limit of log-probabilities. Values slightly above 0 are rounding errors."""

Order = tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""N-grams of one order: word ids [n, order], log10 probabilities [n], log10 backoffs [n]."""


class Ngrams:
    """An n-gram model. Immutable and thread-safe. A history (state) is the index of a node.

    `words` are listed by id. By node, all [nodes]: `num_children`, `word` (its id; the root's is ignored), `log_prob`
    (log10 of the word's probability given the rest of its n-gram), and `backoff` (log10 of the weight). `first_child`
    is the index of each node's first child [nodes + 1], `shorter` the history that each node backs off to [nodes].
    `order` is the length of the longest n-grams, and `num_ngrams` the number of n-grams of each order. `begin` is the
    history at the beginning of a sentence. `end` and `unknown` are the ids of </s> and <unk>; None: the model lacks it.
    `source` is for errors: raises LanguageModelError if the arrays are not a trie, or if a number is not a
    log-probability.
    """

    def __init__(
        self,
        words: Sequence[str],
        num_children: npt.NDArray[np.integer],
        word: npt.NDArray[np.uint32],
        log_prob: npt.NDArray[np.float32],
        backoff: npt.NDArray[np.float32],
        *,
        source: str = "language model",
    ) -> None:
        self.words = tuple(words)
        num_nodes = len(word)
        self.first_child = np.empty(num_nodes + 1, np.uint32)
        ends = np.cumsum(num_children, dtype=np.uint64)
        if len(num_children) != num_nodes or not num_nodes or ends[-1] + 1 != num_nodes or ends[0] != len(self.words):
            raise LanguageModelError(f"{source}: the numbers of n-grams are inconsistent")
        self.first_child[0] = 1
        self.first_child[1:] = ends + 1
        if (self.first_child[1:-1] <= np.arange(1, num_nodes)).any():
            raise LanguageModelError(f"{source}: an n-gram comes before its prefix")
        self.word, self.log_prob, self.backoff = word, np.minimum(log_prob, 0, dtype=np.float32), backoff
        parent = np.repeat(np.arange(num_nodes, dtype=np.uint32), num_children)
        self._check(parent, log_prob, source)
        self.num_ngrams, begin, end = list[int](), 1, int(self.first_child[1])
        while begin < end:
            self.num_ngrams.append(end - begin)
            begin, end = end, int(self.first_child[end])
        self.order = len(self.num_ngrams)
        if self.order > MOST_ORDER:
            raise LanguageModelError(f"{source}: has n-grams of {self.order} words, expected at most {MOST_ORDER}")
        self.shorter = self._links(parent)
        # Reading single elements is many times faster from memory views than from arrays.
        self._words, self._first, self._shorter = self.word.data, self.first_child.data, self.shorter.data
        self._log_probs, self._backoffs = self.log_prob.data, self.backoff.data
        ids = {text: number for number, text in enumerate(self.words) if is_special(text)}
        self.end = ids.get(END)
        self.unknown = next((ids[text] for text in UNKNOWN if text in ids), None)
        self.begin = self._state(1 + ids[BEGIN]) if BEGIN in ids else 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the memory views."""
        return Ngrams, (self.words, self.num_children(), self.word, self.log_prob, self.backoff)

    @classmethod
    def of(
        cls,
        words: Sequence[str],
        orders: Sequence[Order],
        *,
        source: str = "language model",
        spell: Callable[[str], str] = str.upper,
    ) -> Self:
        """Build a model from unsorted n-grams. Each word needs a unigram. Prefixes of n-grams must be included."""
        order_of = [(is_special(word), spell(word), word) for word in words]
        places = sorted(range(len(words)), key=order_of.__getitem__)
        rank = np.empty(len(words), np.uint32)
        rank[places] = np.arange(len(words), dtype=np.uint32)
        keys, start, children = np.zeros(0, np.uint64), 0, np.zeros(1, np.int64)
        parts = [(np.zeros(1, np.uint32), np.zeros(1, np.float32), np.zeros(1, np.float32))]  # the root
        for length, (rows, log_prob, backoff) in enumerate(orders, start=1):
            ranks = rank[rows].reshape(len(rows), length)
            parent = np.zeros(len(ranks), np.int64)
            for column in range(length - 1):
                parent = find_nodes(keys, parent, ranks[:, column], len(words))
                if (parent < 0).any():
                    found = " ".join(words[number] for number in rows[int(np.argmin(parent))])
                    raise LanguageModelError(f"{source}: the {length}-gram {found!r} has a prefix that is not listed")
            key = parent.astype(np.uint64) * np.uint64(len(words)) + ranks[:, -1]
            order = np.argsort(key, kind="stable")
            key = key[order]
            if (key[1:] == key[:-1]).any():
                found = " ".join(words[number] for number in rows[order[int(np.argmax(key[1:] == key[:-1]))]])
                raise LanguageModelError(f"{source}: the {length}-gram {found!r} appears twice")
            children[start:] += np.bincount(parent - start, minlength=len(children) - start)
            start = len(children)
            children = np.concatenate([children, np.zeros(len(rows), np.int64)])
            parts.append((ranks[order, -1], log_prob[order], backoff[order]))
            keys = np.concatenate([keys, key])
        if len(orders[0][0]) != len(words):
            expected = f"one for each of its {len(words)} words"
            raise LanguageModelError(f"{source}: has {len(orders[0][0])} unigrams, expected {expected}")
        word, log_probs, backoffs = (np.concatenate(column) for column in zip(*parts, strict=True))
        return cls([words[place] for place in places], children, word, log_probs, backoffs, source=source)

    def step(self, history: int, word: int) -> tuple[float, int]:
        """Return the log10 probability of a word given a history, and the next history."""
        penalty, words = 0.0, self._words
        while history:
            end = self._first[history + 1]
            child = bisect_left(words, word, self._first[history], end)
            if child < end and words[child] == word:
                break
            penalty += self._backoffs[history]
            history = self._shorter[history]
        else:
            child = 1 + word
        return min(penalty + self._log_probs[child], 0.0), self._state(child)

    def best(self, history: int, low: int, high: int, alone: float) -> float:
        """Return an upper bound on the log10 probability, given a history, of any word with `low` <= id < `high`.

        `alone` is the largest unigram log10 probability of these words.
        """
        first, words = self._first, self._words
        penalty, best = 0.0, -math.inf
        while history:
            end = first[history + 1]
            begin = bisect_left(words, low, first[history], end)
            if begin < end and words[begin] < high:
                end = bisect_left(words, high, begin, end)
                few = end - begin < 64  # Python is faster than numpy for few words
                most = max(self._log_probs[begin:end]) if few else float(self.log_prob[begin:end].max())
                best = max(best, penalty + most)
            penalty += self._backoffs[history]
            history = self._shorter[history]
        return min(max(best, penalty + alone), 0.0)

    def num_children(self) -> npt.NDArray[np.int64]:
        """Return the number of children of each node [nodes]."""
        first = self.first_child.astype(np.int64)
        return first[1:] - first[:-1]

    def rows(self, length: int) -> Order:
        """Return the n-grams of `length` words, sorted."""
        start = 1 + sum(self.num_ngrams[: length - 1])
        end = start + self.num_ngrams[length - 1]
        parent = np.repeat(np.arange(len(self.word), dtype=np.uint32), self.num_children())
        nodes = np.arange(start, end, dtype=np.uint32)
        ids = np.empty((len(nodes), length), np.uint32)
        for column in range(length - 1, -1, -1):
            ids[:, column] = self.word[nodes]
            nodes = parent[nodes - 1]
        return ids, self.log_prob[start:end], self.backoff[start:end]

    def _state(self, node: int) -> int:
        """Return the shortest equivalent history: a node that has children or backoff, or else its suffix link."""
        is_state = self._first[node] != self._first[node + 1] or self._backoffs[node]
        return node if is_state else int(self._shorter[node])

    def _check(self, parent: npt.NDArray[np.uint32], log_prob: npt.NDArray[np.float32], source: str) -> None:
        if len(self.word) >= _MOST_NODES or not 0 < len(self.words) <= MOST_WORDS:
            numbers = f"the number of words ({len(self.words)}) or n-grams ({len(self.word) - 1})"
            raise LanguageModelError(f"{source}: {numbers} is 0 or too large")
        if (self.word[1 : 1 + len(self.words)] != np.arange(len(self.words))).any():
            raise LanguageModelError(f"{source}: its unigrams do not match its words")
        if self.word[1:].max() >= len(self.words):
            raise LanguageModelError(f"{source}: an n-gram's word is not among the model's {len(self.words)} words")
        if ((parent[1:] == parent[:-1]) & (self.word[2:] <= self.word[1:-1])).any():
            raise LanguageModelError(f"{source}: n-grams are not sorted")
        if not (np.isfinite(log_prob).all() and log_prob.max() <= MOST_LOG):
            raise LanguageModelError(f"{source}: found {log_prob.max():g}, expected the logarithm of a probability")
        if not np.isfinite(self.backoff).all():
            raise LanguageModelError(f"{source}: a backoff is not finite")

    def _links(self, parent: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        """Compute suffix links: each node backs off to its longest proper suffix that is a history."""
        keys = parent.astype(np.uint64) * np.uint64(len(self.words)) + self.word[1:]
        suffix = np.zeros(len(self.word), np.int64)
        state = np.arange(len(self.word), dtype=np.int64)
        is_state = (self.num_children() > 0) | (self.backoff != 0)
        link = np.zeros(len(self.word), np.int64)
        begin = 1
        for number, count in enumerate(self.num_ngrams):
            nodes = np.arange(begin, begin + count)
            if number:
                suffix[nodes] = 1 + self.word[nodes]  # the last word alone, unless a longer suffix exists
                shorter, todo = suffix[parent[nodes - 1]], nodes
                while (is_longer := shorter > 0).any():
                    todo, shorter = todo[is_longer], shorter[is_longer]
                    found = find_nodes(keys, shorter, self.word[todo], len(self.words))
                    suffix[todo[found >= 0]] = found[found >= 0]
                    todo, shorter = todo[found < 0], suffix[shorter[found < 0]]
            link[nodes] = state[suffix[nodes]]
            state[nodes] = np.where(is_state[nodes], nodes, link[nodes])
            begin += count
        return link.astype(np.uint32)


def find_nodes(
    keys: npt.NDArray[np.uint64], parents: npt.NDArray[np.int64], words: npt.NDArray[np.uint32], num_words: int
) -> npt.NDArray[np.int64]:
    """Return the child of each parent for its word, or -1. `keys` are parent * `num_words` + word, ascending."""
    wanted = parents.astype(np.uint64) * np.uint64(num_words) + words
    places = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    return np.where(keys[places] == wanted, places.astype(np.int64) + 1, -1)
