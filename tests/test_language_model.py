"""Language models in the search, compared with brute force over all token sequences and alignments."""

import gzip
import itertools
import math
import re
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from language_models import Definition, random_arpa
from searches import random_log_probs

from u2moe.runtime import LanguageModel, LanguageModelError, LanguageModelOptions
from u2moe.runtime.decoding.ctc import PrefixBeamSearch, ctc_prefix_beam_search
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.language.files import _quantize, read_arpa, write_arpa, write_compact
from u2moe.runtime.language.ngrams import LN10
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

B = "\u2581"
BPE = Vocabulary(["<blank>", B + "A", B + "B", "A", "B", B], TextConfig(tokenizer="bpe"))
CHINESE = Vocabulary(["<blank>", "\u4e00", "\u4e01", "A", B], TextConfig())
WORDS = ("a", "ab", "b", "aab", "ba")
LONG = Vocabulary(["<blank>", "<unk>", B + "A", B + "B", "A", "B", B], TextConfig(tokenizer="bpe"))
SCORES = {"weight": 0.7, "word_bonus": 0.4, "unknown_score": -3.0}


def opened(tmp_path, arpa, name="toy.arpa"):
    path = tmp_path / name
    path.write_text(arpa, encoding="utf-8")
    return LanguageModel.open(path)


def defined(arpa):
    """Return the definition of a model in the vocabulary's letter case."""
    return Definition(arpa.replace("a", "A").replace("b", "B").replace("dAtA", "data"))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Make word models by order, each with its definition."""
    folder = tmp_path_factory.mktemp("toys")
    arpas = {order: random_arpa(order, WORDS, order) for order in (1, 2, 3, 4)}
    return {order: (opened(folder, arpa, f"{order}.arpa"), defined(arpa)) for order, arpa in arpas.items()}


def brute_force(log_probs, vocabulary, definition, scores, level="word"):
    """Score every token sequence: the sum over all alignments, plus the score of its words or tokens."""
    totals = defaultdict(lambda: -math.inf)
    for alignment in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        tokens = tuple(token for token, _ in itertools.groupby(alignment) if token)
        score = math.fsum(float(row[token]) for row, token in zip(log_probs, alignment, strict=True))
        totals[tokens] = np.logaddexp(totals[tokens], score)

    def units(tokens):
        if level == "token":
            return [vocabulary.symbols[token] for token in tokens]
        return [word.text for word in vocabulary.words(tokens)]

    added = {tokens: definition.score(units(tokens), **scores) if tokens else 0 for tokens in totals}
    return {tokens: total + added[tokens] for tokens, total in totals.items()}


@pytest.mark.parametrize(("vocabulary", "words", "order", "changes"), [
    *((BPE, WORDS, order, {}) for order in (1, 2, 3, 4)),
    (BPE, WORDS, 3, {"word_bonus": -0.5}),
    (BPE, WORDS, 2, {"word_bonus": 2.0}),
    (CHINESE, ("\u4e00", "\u4e01", "A"), 3, {"weight": 1.5}),  # characters without spaces are words
    (BPE, BPE.symbols[1:-1], 3, {}),  # a model of tokens
])  # fmt: skip
def test_the_search_equals_brute_force(tmp_path, vocabulary, words, order, changes):
    arpa, scores = random_arpa(order, words, order), SCORES | changes
    model = opened(tmp_path, arpa)
    assert model.level == ("word" if words[0] == words[0].strip(B) else "token")
    log_probs = random_log_probs(order, 4, len(vocabulary), scale=1.0)
    expected = brute_force(log_probs, vocabulary, defined(arpa), scores, model.level)
    fusion = Fusion(LanguageModelOptions(model=model, **scores), vocabulary)
    found = ctc_prefix_beam_search(log_probs, 1000, fusion=fusion)
    assert {tuple(hypothesis.tokens) for hypothesis in found} == set(expected)
    assert [hypothesis.score for hypothesis in found] == pytest.approx(sorted(expected.values(), reverse=True))
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(expected[tuple(hypothesis.tokens)])


class Unpruned(PrefixBeamSearch):
    """A search that tries every extension in every frame."""

    def __init__(self, beam_size, blank, context, fusion):
        fusion.losses = lambda state: (1e9, 1e9, 1e9)
        super().__init__(beam_size, blank, context, fusion)
        for search in self._searches:
            search._most_gain = 1e9


@given(
    seed=st.integers(0, 2**32 - 1), order=st.integers(1, 4), beam_size=st.integers(1, 12), scale=st.floats(0.5, 6),
    blank=st.floats(0, 10), word_bonus=st.floats(-2, 3), cuts=st.lists(st.integers(0, 40), max_size=6),
)  # fmt: skip
def test_no_split_and_no_short_cut_changes_anything(toys, seed, order, beam_size, scale, blank, word_bonus, cuts):
    model, _ = toys[order]
    options = LanguageModelOptions(model=model, weight=0.8, word_bonus=word_bonus)
    log_probs = random_log_probs(seed, 40, len(LONG), scale)
    log_probs[::2, 0] += np.float32(blank)
    whole = Unpruned(beam_size, 0, None, Fusion(options, LONG))
    whole.advance(log_probs)
    search, start = PrefixBeamSearch(beam_size, 0, None, Fusion(options, LONG)), 0
    for end in [*sorted(cuts), 40]:
        search.advance(log_probs[start:end])
        start = end
    assert search.hypotheses() == whole.hypotheses()
    whole.finish()
    search.finish()
    assert search.hypotheses() == whole.hypotheses()


def test_the_words_of_a_class_share_its_probability(tmp_path):
    arpa = random_arpa(7, ("A", "<name>"), 3)
    model = opened(tmp_path, arpa)
    fusion = Fusion(LanguageModelOptions(model=model, classes={"<name>": ["bb", "ba bab"]}, **SCORES), LONG)
    definition = Definition(arpa)

    def tokens(text):
        return [LONG.symbols.index(symbol) for symbol in text.split()]

    expected = definition.score(["A", "<name>", "A"], **SCORES) + 0.7 * math.log(1 / 3)
    for name in (f"{B}B B", f"{B}B A", f"{B}B A B"):
        assert fusion.score(tokens(f"{B}A {name} {B}A")) == pytest.approx(expected)
    expected = definition.score(["A", "X", "A"], **SCORES)
    assert fusion.score(tokens(f"{B}A {B}B {B}A")) == pytest.approx(expected)  # the beginning of a word is not a word
    # Before the word ends, the score is an upper bound.
    state, _ = fusion.advance(fusion.start, tokens(f"{B}B")[0])
    assert state.open >= 0.7 * LN10 * definition.log10(["<s>"], "<name>") + 0.7 * math.log(1 / 3) + 0.4 - 1e-6


def test_models_for_letters_in_either_case_and_both(tmp_path):
    """If several words of the model have the same spelling, the most probable one counts."""
    arpa = "\\data\\\nngram 1=5\n\n\\1-grams:\n-1 the\n-2 The\n-1.5 Ab\n-3 <unk>\n-2 </s>\n\n\\end\\\n"
    model = opened(tmp_path, arpa)
    for text in ("THE", "the"):
        symbols = ["<blank>", B + text, *("AB" if text == "THE" else "ab")]
        vocabulary = Vocabulary(symbols, TextConfig(tokenizer="bpe"))
        fusion = Fusion(LanguageModelOptions(model=model, weight=1, word_bonus=0), vocabulary)
        assert fusion.score([1]) == pytest.approx(-3 * LN10)
        assert fusion.score([1, 2, 3]) < -6 * LN10
    mixed = Vocabulary(["<blank>", B + "The", B + "the", B + "Ab", B + "THE"], TextConfig(tokenizer="bpe"))
    fusion = Fusion(LanguageModelOptions(model=model, weight=1, word_bonus=0, unknown_score=0), mixed)
    assert [fusion.score([token]) / LN10 for token in (1, 2, 3, 4)] == pytest.approx([-4, -3, -3.5, -5])


@pytest.mark.parametrize(("order", "bits"), [(1, 16), (2, 8), (3, 16), (4, 8)])
def test_files_give_the_same_probabilities(tmp_path, order, bits):
    arpa = random_arpa(order, WORDS, order, positive_backoffs=True)
    definition, model = Definition(arpa), opened(tmp_path, arpa)
    assert sum(model.ngrams.num_ngrams) == len(definition.log_probs)
    write_arpa(model.ngrams, tmp_path / "again.arpa.gz")
    write_compact(model.ngrams, tmp_path / "compact.lm", bits=bits)
    assert gzip.decompress((tmp_path / "again.arpa.gz").read_bytes()).startswith(b"\\data\\")
    again, compact = read_arpa(tmp_path / "again.arpa.gz"), LanguageModel.open(tmp_path / "compact.lm").ngrams
    for ngrams in (model.ngrams, again, compact):
        ids = {word: number for number, word in enumerate(ngrams.words)}
        for words in itertools.product((*WORDS, "<unk>"), repeat=3):
            history = ngrams.begin
            for place, word in enumerate((*words, "</s>")):
                log_prob, history = ngrams.step(history, ids[word])
                expected = min(definition.log10(["<s>", *words[:place]], word), 0)
                assert log_prob == pytest.approx(expected, abs=2e-5)  # sums of float32


def test_files_that_lack_or_differ_in_what_does_not_matter(tmp_path):
    """No markers, a pruned lower order, comments before the data, and an empty highest order."""
    arpa = (
        "made by hand\n\\data\\\nngram 1=3\nngram 2=2\nngram 3=1\nngram 4=0\n\n\\1-grams:\n-1\ta\t-0.5\n-2\tb\n"
        "-3\tc\t-0.25\n\n\\2-grams:\n-0.5\ta c\t-0.125\n-0.75\tc a\n\n\\3-grams:\n-0.25 c a b\n\n\\end\\\n"
    )
    ngrams = opened(tmp_path, arpa).ngrams
    a, b, c = range(3)
    _, history = ngrams.step(ngrams.begin, c)
    _, history = ngrams.step(history, a)
    assert ngrams.step(history, b)[0] == pytest.approx(-0.25)  # "c a b", although "a b" is missing
    assert ngrams.step(ngrams.step(history, b)[1], a)[0] == pytest.approx(-1)
    assert ngrams.step(ngrams.step(0, a)[1], b)[0] == pytest.approx(-2.5)
    assert ngrams.end is None
    arpa, zero = (re.sub(r"(?m)^\S+\t<s>", rf"{value}\t<s>", random_arpa(1, WORDS, 2)) for value in (-99, "-inf"))
    plain = opened(tmp_path, arpa).ngrams
    empty = arpa.replace("\n\\1-grams", "ngram 3=0\n\n\\1-grams").replace("\\end\\", "\\3-grams:\n\n\\end\\")
    for text in ("\ufeff" + arpa, zero, empty):
        ngrams = opened(tmp_path, text).ngrams
        assert (ngrams.num_ngrams, ngrams.log_prob) == (plain.num_ngrams, pytest.approx(plain.log_prob))


DAMAGE = {
    "no data": (r"\\data", "data", "not an ARPA file"),
    "no counts": ("ngram 1=", "ngram 7=", "line 2: found"),
    "count too high": ("ngram 2=", "ngram 2=9", "line "),
    "not a number": (r"grams:\n-\S+", "grams:\nx", "expected a log probability"),
    "nan": (r"grams:\n-\S+", "grams:\nnan", "line 6: found nan, expected the logarithm of a probability"),
    "certain": (r"grams:\n-\S+", "grams:\n0.5", "line 6: found 0.5, expected the logarithm of a probability"),
    "too long": (r"ngram 2=.*\n", "".join(f"ngram {n}=1\n" for n in range(2, 11)), "found n-grams of 10 words, expe"),
    "no end": (r"\\end\\", "", r"expected '\\end\\'"),
    "another word": (r"2-grams:\n(\S+)\t\S+ ", r"2-grams:\n\1\tzz ", "'zz' is not among the unigrams"),
}


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_keeps_the_extremes_and_makes_nothing_certain(bits):
    values = -np.random.default_rng(0).exponential(2, 200_000).astype(np.float32)
    values[:3] = 0, -99, -1e-6
    table, codes = _quantize(values, bits)
    rounded = table[codes]
    assert len(table) <= 1 << bits
    assert (rounded[0], rounded[1]) == (0, -99)
    assert (rounded[values < 0] < 0).all()
    assert np.abs(rounded - values).max() < (0.5 if bits == 8 else 0.001)
    assert np.abs(rounded - values)[2:].mean() < (0.02 if bits == 8 else 1e-4)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_says_where(tmp_path, damage):
    before, after, message = DAMAGE[damage]
    arpa = random_arpa(1, WORDS, 2)
    damaged = re.sub(before, after, arpa)
    assert damaged != arpa
    with pytest.raises(LanguageModelError, match=r"damaged\.arpa.*" + re.escape(message)):
        opened(tmp_path, damaged, "damaged.arpa")


def test_what_is_no_model_is_refused_and_odd_ngrams_are_named(toys, tmp_path):
    for lines, message in (
        ("-1 a b\n-1 a b", "'a b' appears twice"),
        ("-1 b a\n-1 b b", "the 3-gram 'a b a' has a prefix that is not listed"),
    ):
        arpa = f"\\data\\\nngram 1=2\nngram 2=2\nngram 3=1\n\n\\1-grams:\n-1 a 0\n-1 b 0\n\n\\2-grams:\n{lines}\n\n"
        arpa += "\\3-grams:\n-1 a b a\n\n\\end\\\n"
        with pytest.raises(LanguageModelError, match=message):
            opened(tmp_path, arpa)
    write_compact(toys[3][0].ngrams, tmp_path / "changed")
    changed = bytearray((tmp_path / "changed").read_bytes())
    changed[len(changed) // 2] ^= 1
    noise = {"empty": b"", "noise": bytes(range(256)), "gz": b"\x1f\x8b\x08", "compact": b"u2moe-lm\x02"}
    for name, content in {**noise, "changed": bytes(changed), "missing": None}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(LanguageModelError, match="not match its digest" if name == "changed" else name):
            LanguageModel.open(tmp_path / name)
    for wrong in (["a"], {"zz": ["x"]}, {"a": "xyz"}, {"a": []}, {"a": [1]}):
        with pytest.raises(ValueError, match="classes"):
            LanguageModelOptions(model=toys[2][0], classes=wrong)
    with pytest.raises(ValueError, match="model must be"):
        LanguageModelOptions(model=5)
