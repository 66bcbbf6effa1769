"""The search of u2moe-kernels is bit-identical to Python's for each hypothesis."""

import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from language_models import random_arpa
from searches import HOTWORDS, VOCABULARY, random_frames

from u2moe.runtime import Grammar, LanguageModelOptions
from u2moe.runtime.decoding import native_search
from u2moe.runtime.decoding.context import ContextGraph, parse_hotwords
from u2moe.runtime.decoding.ctc import PrefixBeamSearch
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.native_search import NativeSearch, new_search
from u2moe.runtime.decoding.phrases import PhraseGraph

WORDS = ("A", "AB", "CAB", "中", "文中", "É", "CAA")
TOKENS = ("▁A", "A", "B", "▁CA", "中", "文")


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("u2moe_kernels", exc_type=ImportError).library_path()


@pytest.fixture(scope="module")
def fusions(tmp_path_factory):
    """Return the language models of searches by name."""
    folder, found = tmp_path_factory.mktemp("models"), {"": None}
    for name, words, level in (("word", WORDS, None), ("token", TOKENS, "token")):
        file = folder / f"{name}.arpa"
        file.write_text(random_arpa(7, words, 3, positive_backoffs=True), encoding="utf-8")
        options = LanguageModelOptions(model=file, level=level, weight=0.7, word_bonus=0.4, unknown_score=-3)
        found[name] = Fusion(options, VOCABULARY)
    file.write_text(random_arpa(7, WORDS, 3, markers=("<s>", "</s>", "<unk>", "<name>")), encoding="utf-8")
    classes = {"<name>": ["ABBA", "CAB", "CA CAB", "ba"], "AB": ["ABBA", "É", "C"]}
    found["classes"] = Fusion(LanguageModelOptions(model=file, word_bonus=0.4, classes=classes), VOCABULARY)
    return found


GRAMMARS = {
    name: PhraseGraph(Grammar(lines=lines), VOCABULARY)
    for name, lines in {
        "phrases": ("a b", "<x> [cab]", "<x> = (é | ba) d", "中文"),
        "phrases, other words": ("ab (a | b)", "a", "中", "[unk]"),
        "one": ("cab",),
    }.items()
}


def assert_same_commitment(native, python, vocabulary=VOCABULARY):
    if python.hypotheses():
        found = [search.settled(vocabulary.word_starts) for search in (native, python)]
        assert found[0] == found[1]
        for search in (native, python):
            search.commit(found[0][0][:2])
    assert native.best() == python.best()
    assert native.next_peak() == python.next_peak()


@given(
    seed=st.integers(0, 1 << 16), beam_size=st.integers(1, 20), sizes=st.lists(st.integers(0, 9), max_size=6),
    penalty=st.sampled_from((0.0, 1.5)), has_hotwords=st.booleans(),
    model=st.sampled_from(("", "word", "token", "classes", *GRAMMARS)),
)  # fmt: skip
@example(seed=172, beam_size=14, sizes=[3], penalty=1.5, has_hotwords=False, model="phrases")  # equal, not same, states
def test_hypotheses_equal_those_of_python(library, fusions, seed, beam_size, sizes, penalty, has_hotwords, model):
    grammar = GRAMMARS.get(model)
    context = ContextGraph(parse_hotwords(HOTWORDS), VOCABULARY) if has_hotwords and grammar is None else None
    given = (beam_size, 0, context, fusions.get(model))
    chosen = {"grammar": grammar, "blank_penalty": penalty}
    vocabulary = VOCABULARY if grammar is None else grammar.vocabulary
    searches = new_search(library, *given, **chosen), PrefixBeamSearch(*given, **chosen)
    assert isinstance(searches[0], NativeSearch)
    for number, size in enumerate(sizes):
        frames = random_frames(seed + number, size)
        found = [(search.advance(frames), search.hypotheses(), search.hypotheses(1))[1:] for search in searches]
        assert found[0] == found[1]
        assert_same_commitment(*searches, vocabulary)
    for search in searches:
        search.finish()
    assert_same_commitment(*searches, vocabulary)
    assert searches[0].hypotheses() == searches[1].hypotheses()


def test_long_hypotheses_and_older_libraries_that_are_left_to_python(library, fusions, monkeypatch):
    """More numbers than the initial capacity, from rows that are not contiguous."""
    frames = np.asfortranarray(random_frames(3, 400))
    native, python = new_search(library, 20), PrefixBeamSearch(20)
    for search in (native, python):
        search.advance(frames)
    assert native.hypotheses() == python.hypotheses()
    assert len(native.hypotheses()[0].tokens) > 50
    native_search._library.cache_clear()
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace())
    assert isinstance(new_search(library, 3, fusion=fusions["word"]), PrefixBeamSearch)
    native_search._library.cache_clear()


@pytest.mark.parametrize("native", [True, False])
def test_what_cannot_be_searched_is_an_error(library, native):
    search = new_search(library if native else None, 3)
    assert isinstance(search, NativeSearch) is native
    frames = random_frames(0, 4)
    frames[2, 5] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        search.advance(frames)
    with pytest.raises(ValueError, match="must be"):
        search.advance(frames[0])
    with pytest.raises(ValueError, match="beam_size must be at least 1, got 0"):
        new_search(library if native else None, 0)


def test_hotwords_are_freed_with_their_searches_and_messages_reach_python(library):
    context = ContextGraph(["É"], VOCABULARY)
    context.symbols = ("<blank>", "A")
    with pytest.raises(RuntimeError, match="hotword 'É': the vocabulary has no 'É'"):
        new_search(library, 3, 0, context)
    context = ContextGraph(["A"], VOCABULARY)
    search = new_search(library, 3, 0, context)
    handle = weakref.ref(native_search._handles[context])
    del context
    gc.collect()
    assert handle() is None
    search.advance(random_frames(1, 20))  # the search keeps its own copies
    assert search.hypotheses()


def test_other_threads_run_during_a_search(library):
    frames, counted, is_done = np.tile(random_frames(5, 1000), (20, 1)), [], threading.Event()

    def count():
        while not is_done.wait(0.001):
            counted.append(1)

    thread = threading.Thread(target=count)
    thread.start()
    new_search(library, 14).advance(frames)
    num_counted = len(counted)
    is_done.set()
    thread.join()
    assert num_counted > 1
