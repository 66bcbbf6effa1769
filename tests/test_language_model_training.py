"""Training, compared with the formulas of modified Kneser-Ney for each n-gram, and with results of lmplz."""

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

FALLBACK = {1: 0.5, 2: 1.0, 3: 1.5}


class ByTheBook:
    """Interpolated modified Kneser-Ney, computed from the definitions."""

    def __init__(self, sentences, order, prune):
        self.order = order
        occurrences = {length: Counter() for length in range(1, order + 1)}
        for sentence in sentences:
            words = ["<s>", *sentence, "</s>"]
            for length in range(1, order + 1):
                for end in range(1, len(words)):
                    if end + 1 >= length:
                        occurrences[length][tuple(words[end + 1 - length : end + 1])] += 1
        self.counts = {}
        for length, ngrams in occurrences.items():
            for ngram, count in ngrams.items():
                before = {other[0] for other in occurrences.get(length + 1, ()) if other[1:] == ngram}
                self.counts[ngram] = count if length == order or ngram[0] == "<s>" else len(before)
        thresholds = [prune[min(length, len(prune)) - 1] for length in range(1, order + 1)]
        self.kept = {n for n in self.counts if len(n) == 1 or occurrences[len(n)][n] > thresholds[len(n) - 1]}
        self.words = {*(word for sentence in sentences for word in sentence), "</s>", "<unk>"}
        self.discounts = {length: self._discounts(length) for length in range(1, order + 1)}

    def _discounts(self, length):
        t = Counter(count for ngram, count in self.counts.items() if len(ngram) == length)
        if not (t[1] and t[2] and t[3]):
            return FALLBACK
        y = t[1] / (t[1] + 2 * t[2])
        discounts = {j: j - (j + 1) * y * t[j + 1] / t[j] for j in (1, 2, 3)}
        return discounts if all(0 <= discounts[j] <= j for j in discounts) else FALLBACK

    def following(self, history):
        return {n: c for n, c in self.counts.items() if n[:-1] == history}

    def discount(self, ngram):
        return self.discounts[len(ngram)][min(self.counts[ngram], 3)]

    def freed(self, history):
        following = self.following(history)
        freed = sum(self.discount(n) if n in self.kept else c for n, c in following.items())
        return freed / sum(following.values()) if following else 1.0

    def probability(self, word, history):
        """Return P(word | history) of the model: its longest n-gram, with the backoffs before it."""
        ngram = (*history, word)
        if ngram in self.kept or not history:
            total = sum(self.following(history).values())
            own = (self.counts[ngram] - self.discount(ngram)) / total if ngram in self.counts else 0.0
            lower = self.probability(word, history[1:]) if history else 1 / len(self.words)
            return own + self.freed(history) * lower
        is_history = history in self.kept or history == ("<s>",)
        return (self.freed(history) if is_history else 1.0) * self.probability(word, history[1:])


def probability(ngrams, word, history):
    ids = {text: number for number, text in enumerate(ngrams.words)}
    state = ngrams.begin if history[:1] == ("<s>",) else 0
    for text in history[history[:1] == ("<s>",) :]:
        _, state = ngrams.step(state, ids[text])
    return math.exp(LN10 * ngrams.step(state, ids[word])[0])


sentences = st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), min_size=1, max_size=30)


@given(sentences, st.integers(1, 4), st.sampled_from([(0,), (0, 1), (0, 0, 1), (0, 1, 2)]))
def test_every_probability_is_that_of_the_book(text, order, prune):
    prune = prune[:order]
    book = ByTheBook(text, order, prune)
    ngrams = train(count_ngrams(text, order), TrainingOptions(order=order, prune=prune))
    histories = {(), ("<s>",)} | {n for n in book.counts if len(n) < order and n[-1] != "</s>"}
    for history in itertools.islice(sorted(histories), 12):
        if len(history) < order:
            for word in book.words:
                expected = book.probability(word, history)
                assert probability(ngrams, word, history) == pytest.approx(expected, rel=1e-4)
            assert sum(probability(ngrams, word, history) for word in book.words) == pytest.approx(1, abs=1e-4)


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
