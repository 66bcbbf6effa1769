"""Writes a bundle's language model of words as a search graph for sherpa-onnx's `--ctc-graph`.

    pip install kaldifst
    python language_graph.py BUNDLE GRAPH.fst

Paths of the graph spell the words of the model with the bundle's tokens, and cost what u2moe's search adds for these
words. Unlike in u2moe, unknown words are impossible, and each word has one spelling. The least cost of all
completions is paid as soon as a token is read, so that the search can prune. Labels are token ids plus 1. Each token
has a state for its repetitions and, inside words, one for the blanks behind it.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import kaldifst

from u2moe.runtime import Bundle
from u2moe.runtime.language.ngrams import LN10, Ngrams
from u2moe.runtime.text.vocabulary import Spelling, is_special

BLANK = 1


@dataclass
class Node:
    """A prefix of words: their least cost, the words that end here (cost, next history), and its states."""

    least: float = math.inf
    ends: list[tuple[float, int]] = field(default_factory=list)
    repeated: int = -1
    blank: int = -1


class Writer:
    """Builds the graph of one model: a tree of words for each history."""

    def __init__(self, ngrams: Ngrams, spelling: Spelling, weight: float, word_bonus: float) -> None:
        self.fst = kaldifst.StdVectorFst()
        self._ngrams, self._scale, self._bonus = ngrams, weight * LN10, word_bonus
        self._tokens = [None if is_special(word) else _spelled(spelling, word) for word in ngrams.words]
        self._states: dict[int, int] = {}
        self._todo: list[int] = []
        self.fst.start = self._state(ngrams.begin)
        while self._todo:
            self._add_history(self._todo.pop())

    def _state(self, history: int) -> int:
        """Return the state between words after a history."""
        if history not in self._states:
            self._states[history] = self._new(BLANK)
            self._todo.append(history)
        return self._states[history]

    def _new(self, label: int) -> int:
        """Add a state that reads any number of a label."""
        state: int = self.fst.add_state()
        self._arc(state, state, label, 0.0)
        return state

    def _arc(self, begin: int, end: int, label: int, cost: float) -> None:
        self.fst.add_arc(begin, kaldifst.StdArc(label, label, cost, end))

    def _words(self, history: int) -> Iterator[int]:
        """Yield the words that have an n-gram with this history, or all words without a history."""
        first = self._ngrams.first_child
        yield from (int(word) for word in self._ngrams.word[int(first[history]) : int(first[history + 1])])

    def _add_history(self, history: int) -> None:
        start, ngrams = self._state(history), self._ngrams
        if ngrams.end is not None:
            self.fst.set_final(start, -self._scale * ngrams.step(history, ngrams.end)[0])
        if history:
            shorter = int(ngrams.shorter[history])
            self._arc(start, self._state(shorter), 0, -self._scale * float(ngrams.backoff[history]))
        tree: dict[tuple[int, ...], Node] = {}
        for word in self._words(history):
            tokens = self._tokens[word]
            if tokens is None:
                continue
            log_prob, following = ngrams.step(history, word)
            cost = -self._scale * log_prob - self._bonus
            for length in range(1, len(tokens) + 1):
                node = tree.setdefault(tokens[:length], Node())
                node.least = min(node.least, cost)
            tree[tokens].ends.append((cost, following))
        for tokens, node in tree.items():  # prefixes come first
            parent = tree.get(tokens[:-1])
            if parent and parent.blank < 0:
                parent.blank = self._new(BLANK)
                self._arc(parent.repeated, parent.blank, 0, 0.0)
            node.repeated = self._new(tokens[-1] + 1)
            begin, paid = (parent.blank, parent.least) if parent else (start, 0.0)
            self._arc(begin, node.repeated, tokens[-1] + 1, node.least - paid)
            for cost, following in node.ends:
                self._arc(node.repeated, self._state(following), 0, cost - node.least)


def _spelled(spelling: Spelling, word: str) -> tuple[int, ...] | None:
    try:
        return tuple(spelling.tokens(word, "", word))
    except ValueError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("graph", type=Path)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    options = bundle.language_model()
    if options is None:
        parser.error(f"{args.bundle} has no language model")
    writer = Writer(options.model.ngrams, Spelling(bundle.vocabulary), options.weight, options.word_bonus)
    kaldifst.StdConstFst(writer.fst).write(str(args.graph))
    print(f"wrote {args.graph}")


if __name__ == "__main__":
    main()
