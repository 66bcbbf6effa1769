"""Training, compared with results of lmplz, and the properties of models of any text."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime.language.files import read_arpa
from u2moe.runtime.language.kneser_ney import TrainingOptions, count_ngrams, train
from u2moe.runtime.language.ngrams import LN10


def probability(ngrams, word, history):
    ids = {text: number for number, text in enumerate(ngrams.words)}
    state = ngrams.begin if history[:1] == ("<s>",) else 0
    for text in history[history[:1] == ("<s>",) :]:
        _, state = ngrams.step(state, ids[text])
    return math.exp(LN10 * ngrams.step(state, ids[word])[0])


sentences = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), min_size=1, max_size=30)


@given(sentences, st.integers(1, 4), st.sampled_from([(0,), (0, 1), (0, 0, 1), (0, 1, 2)]))
def test_probabilities_sum_to_one_and_what_is_rare_is_pruned(text, order, prune):
    prune = prune[:order]
    ngrams = train(count_ngrams(text, order), TrainingOptions(order=order, prune=prune))
    occurrences = Counter()
    for words in (("<s>", *sentence, "</s>") for sentence in text):
        for end in range(2, len(words) + 1):
            occurrences.update(words[begin:end] for begin in range(max(end - order, 0), end))
    kept = Counter(len(n) for n, count in occurrences.items() if count > prune[min(len(n), len(prune)) - 1])
    assert list(ngrams.num_ngrams[1:]) == [kept[length] for length in range(2, order + 1) if kept[length]]
    histories = {(), ("<s>",)} | {n for n in occurrences if len(n) < order and n[-1] != "</s>"}
    for history in itertools.islice(sorted(histories), 12):
        total = sum(probability(ngrams, word, history) for word in ngrams.words if word != "<s>")
        assert total == pytest.approx(1, abs=1e-4)


def test_discounts_of_small_texts_are_those_of_lmplz():
    """They are estimated if something occurs once, twice and three times. Otherwise, they are 0.5, 1 and 1.5."""
    for text, order, expected in (
        (["a"], 2, {("a", ()): 5 / 12, ("a", ("<s>",)): 17 / 24, ("</s>", ("a",)): 17 / 24, ("a", ("a",)): 5 / 24}),
        (["b"] * 2, 1, {("b", ()): 1 / 4 + 1 / 2 / 3}),
        (["c"] * 3, 1, {("c", ()): 1.5 / 6 + 1 / 2 / 3}),
        (["abbccc"], 1, {("a", ()): 0.5 / 7 + 0.9 / 7, ("b", ()): 1.5 / 7 + 0.9 / 7, ("c", ()): 0.9 / 7}),
    ):
        ngrams = train(count_ngrams(text, order), TrainingOptions(order=order))
        assert [probability(ngrams, *case) for case in expected] == pytest.approx(list(expected.values()), rel=1e-4)


def random_text(seed, num_sentences=400):
    """Return a text with frequent word pairs, large enough to estimate discounts."""
    random = np.random.default_rng(seed)
    words = np.array([f"w{number}" for number in range(2000)])
    lengths = random.integers(1, 12, num_sentences)
    return [words[np.minimum(random.zipf(1.4, length), 2000) - 1].tolist() for length in lengths]


def test_the_numbers_are_those_of_lmplz_and_rare_words_unknown():
    """`golden/language_model` contains the results of KenLM's lmplz for this text, with and without pruning."""
    text = random_text(3, 300)
    for name, options in {"all": TrainingOptions(order=3), "pruned": TrainingOptions(order=4, prune=(0, 0, 1))}.items():
        expected = read_arpa(Path(__file__).parent / f"golden/language_model/{name}.arpa.gz")
        found = train(count_ngrams(text, options.order), options)
        assert found.words == expected.words
        assert (found.word == expected.word).all()
        assert (found.first_child == expected.first_child).all()
        assert np.abs(found.log_prob - expected.log_prob).max() < 1e-5
        assert np.abs(found.backoff - expected.backoff).max() < 1e-5
    counts = count_ngrams([["a", "b", "a"], ["c", "a", "b"]], 2, min_word_count=2)
    assert counts.words == ("<unk>", "<s>", "</s>", "a", "b")
    found = {tuple(counts.words[i] for i in row): n for row, n in zip(counts.rows, counts.counts, strict=True)}
    assert found[("<s>", "<unk>")] == found[("<unk>", "a")] == 1
    assert found[("a", "b")] == 2
    assert count_ngrams([["<s>", "a", "</s>"], [], ["<s>"]], 2).rows.tolist() == [[1, 3], [3, 2]]
    assert train(count_ngrams(random_text(2, 20), 3), TrainingOptions(order=3, prune=(0, 10**6))).order == 1


def test_blocks_do_not_matter_and_options_are_checked(monkeypatch):
    for prune in ((1,), (0, 2, 1), (), (0,) * 4):
        with pytest.raises(ValueError):
            TrainingOptions(prune=prune)
    with pytest.raises(ValueError, match="no words"):
        train(count_ngrams([], 3), TrainingOptions())
    text = random_text(1, 200)
    expected = count_ngrams(text, 3)
    monkeypatch.setattr("u2moe.runtime.language.kneser_ney._BLOCK", 50)
    counts = count_ngrams(text, 3)
    assert (counts.rows == expected.rows).all()
    assert (counts.counts == expected.counts).all()
    assert counts.num_sentences == 200
