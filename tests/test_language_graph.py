"""The recipe's search graph for sherpa-onnx: its paths cost what u2moe's search adds for the same words."""

import heapq
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from u2moe.runtime import Bundle, Fusion, LanguageModel, LanguageModelOptions
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.language.files import read_arpa
from u2moe.runtime.text.vocabulary import Spelling

RECIPE = Path(__file__).parents[1] / "examples" / "train_demo"
ARPA = r"""\data\
ngram 1=6
ngram 2=4

\1-grams:
-1.0 <s> -0.3
-1.0 </s>
-1.2 now -0.2
-0.9 nowhere -0.1
-1.5 get -0.4
-2.0 naïve

\2-grams:
-0.2 <s> now
-0.3 now get
-0.4 get </s>
-0.5 nowhere get

\end\
"""


class Graph:
    """Stands in for a vector FST of kaldifst, which tests do not install."""

    def __init__(self):
        self.arcs, self.final, self.start = [], {}, -1

    def add_state(self):
        self.arcs.append([])
        return len(self.arcs) - 1

    def add_arc(self, begin, arc):
        self.arcs[begin].append(arc)

    def set_final(self, state, cost):
        self.final[state] = cost

    def cheapest(self, labels):
        """Return the least cost of a path with these labels; infinity: there is none."""
        best, todo = {}, [(0, 0.0, self.start)]
        while todo:
            place, cost, state = heapq.heappop(todo)
            if cost >= best.get((place, state), np.inf):
                continue
            best[place, state] = cost
            for label, _, more, end in self.arcs[state]:
                if label == 0 or (place < len(labels) and labels[place] == label):
                    heapq.heappush(todo, (place + (label != 0), cost + more, end))
        ends = [
            cost + self.final[state]
            for (place, state), cost in best.items()
            if place == len(labels) and state in self.final
        ]
        return min(ends, default=np.inf)


@pytest.fixture
def language_graph(monkeypatch):
    arc = lambda label, output, cost, end: (label, output, cost, end)  # noqa: E731
    monkeypatch.setitem(sys.modules, "kaldifst", types.SimpleNamespace(StdVectorFst=Graph, StdArc=arc))
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module("language_graph")
    del sys.modules["language_graph"]


def test_paths_cost_what_the_search_adds_for_the_words(language_graph, tmp_path):
    (tmp_path / "toy.arpa").write_text(ARPA, encoding="utf-8")
    vocabulary = Bundle.open(DEMO_FOLDER).vocabulary
    options = LanguageModelOptions(model=LanguageModel(read_arpa(tmp_path / "toy.arpa")), weight=0.3, word_bonus=2.0)
    fusion, spelling = Fusion(options, vocabulary), Spelling(vocabulary)
    graph = language_graph.Writer(options.model.ngrams, spelling, 0.3, 2.0).fst
    for text in ("", "now", "now get", "nowhere get", "get now nowhere", "nowhere"):
        tokens = [token for word in text.split() for token in spelling.tokens(word, "", word)]
        expected = -(fusion.score(tokens) if tokens else fusion.finish(fusion.start))
        found = [token + 1 for token in tokens]
        assert graph.cheapest(found) == pytest.approx(expected, abs=1e-5), text
        held = [label for token in found for label in (token, token, 1, 1)]
        assert graph.cheapest([1, *held]) == pytest.approx(expected, abs=1e-5), text
    assert graph.cheapest([token + 1 for token in spelling.tokens("then", "", "then")]) == np.inf
