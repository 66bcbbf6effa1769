import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from searches import random_log_probs

from u2moe.runtime.decoding.context import DEFAULT_WEIGHT, ContextGraph, parse_hotwords
from u2moe.runtime.decoding.ctc import PrefixBeamSearch, ctc_prefix_beam_search
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

PIECES = "<blank> <unk> \u2581 \u2581C \u2581CAT AT A T S C \u2581A B \u2581B <s>"
BPE = Vocabulary(PIECES.split(), TextConfig(tokenizer="bpe"))
CHAR = Vocabulary(["<blank>", "<unk>", "\u2581", "A", "B", "C", "\u4e00", "\u4e01", "\u4e02", "<s>"], TextConfig())


def ids(vocabulary, *symbols):
    return [vocabulary.symbols.index(symbol) for symbol in symbols]


def growing_score(graph, tokens):
    """Return the ranking score of a search: earned bonus and open share, after each token."""
    state, earned, scores = graph.start, 0.0, []
    for token in tokens:
        state, bonus = graph.advance(state, token)
        earned += bonus
        scores.append(earned + graph.partial(state))
    return scores


@pytest.mark.parametrize(("vocabulary", "hotwords", "spelling", "score"), [
    *((BPE, [("cat", 2.0)], spelling, 2.0) for spelling in (  # one token in its shortest spelling
        "\u2581CAT", "\u2581C AT", "\u2581C A T", "\u2581 C AT", "\u2581 \u2581CAT", "C A T")),
    *((BPE, [("CAT", 3.0)], spelling, 3.0 * count) for spelling, count in (
        ("\u2581CAT S", 0), ("\u2581B C AT", 0), ("\u2581C A", 0), ("\u2581CAT \u2581A", 1), ("\u2581CAT \u2581CAT", 2),
        ("\u2581CAT S \u2581C AT", 1), ("\u2581CAT <unk>", 0), ("<unk> C AT", 0), ("<unk> \u2581CAT", 1), ("", 0))),
    *((CHAR, [("\u4e00\u4e01", 1.0)], spelling, score) for spelling, score in (
        ("\u4e02 \u4e00 \u4e01 \u4e02", 2.0), ("\u4e00 \u2581 \u4e01", 2.0), ("A \u4e00 \u4e01 B", 2.0),
        ("\u4e00 A \u4e01", 0.0))),
    (CHAR, [("\u4e00 ab", 1.0)], "\u4e00 A B", 3.0),
    (BPE, ["CAB"], "\u2581C A B", 3 * DEFAULT_WEIGHT),
    (BPE, [("cat", 1.0), ("CAT", 4.0), ("Cat", 2.0)], "\u2581CAT", 4.0),
    *((BPE, {"cat": 4.0, "cab": np.float32(0.5)}, spelling, score) for spelling, score in (
        ("\u2581CAT", 4.0), ("\u2581C A B", 3 * 0.5))),
])  # fmt: skip
def test_a_hotword_earns_its_weight_per_token_in_any_spelling(vocabulary, hotwords, spelling, score):
    assert ContextGraph(hotwords, vocabulary).score(ids(vocabulary, *spelling.split())) == score


@pytest.mark.parametrize(("vocabulary", "hotwords", "spelling", "scores"), [
    *((BPE, [("CAB", 2.0)], spelling, scores) for spelling, scores in (
        ("\u2581C A B \u2581A \u2581C \u2581", [2, 4, 6, 6, 8, 6]),
        ("\u2581C A B S", [2, 4, 6, 0]))),
    # the suffix of a broken match goes on
    (CHAR, [("A B A C", 1.0), ("B A A", 1.0)], "A \u2581 B \u2581 A \u2581 A", [1, 1, 2, 2, 3, 3, 3]),
    # a phrase that begins another leaves it open
    *((CHAR, [("A B", 1.0), ("A B C", 1.0)][::order], "A \u2581 B \u2581 C \u2581", [1, 1, 2, 4, 5, 5])
      for order in (1, -1)),
])  # fmt: skip
def test_a_match_earns_shares_and_pays_them_back_if_it_breaks(vocabulary, hotwords, spelling, scores):
    graph = ContextGraph(hotwords, vocabulary)
    assert growing_score(graph, ids(vocabulary, *spelling.split())) == pytest.approx(scores)


@pytest.mark.parametrize(("hotwords", "message"), [
    (["CAT", "CA\u00c9"], "hotword 'CA\u00c9': the vocabulary has no '\u00c9'"),
    (["  "], "hotword '  ' is empty"),
    (["<unk>"], "the vocabulary has no"),
    ([("CAT", 0)], "hotword 'CAT': weight must be a number above 0 and at most 100, got 0"),
    ([("CAT", math.nan)], "weight must be a number above 0 and at most 100, got nan"),
    ([3], "a hotword must be a phrase, or a phrase and its weight, got 3"),
    ([("CAT", 1.0, 2.0)], "a hotword must be a phrase, or a phrase and its weight"),
    (7, "hotwords must be a list of phrases, or a mapping from phrases to weights, got 7"),
    (b"CAT", "hotwords must be a list of phrases, or a mapping from phrases to weights, got b'CAT'"),
    ([], "hotwords are empty"),
    ("CAT", "must be a list of phrases"),
    (["BAB"], "hotword 'BAB': the vocabulary cannot spell 'BAB'"),
])  # fmt: skip
def test_hotwords_that_cannot_be(hotwords, message):
    pieces = Vocabulary(["<blank>", "\u2581AB", "BA"], TextConfig(tokenizer="bpe"))
    with pytest.raises(ValueError, match=message):
        ContextGraph(hotwords, pieces if hotwords == ["BAB"] else BPE)


def words_of(vocabulary, tokens):
    text = "".join("\0" if vocabulary.symbols[token].startswith("<") else vocabulary.symbols[token] for token in tokens)
    return words_of_text(text.replace("\u2581", " "))


def words_of_text(text):
    for character in "\u4e00\u4e01\u4e02":
        text = text.replace(character, f" {character} ")
    return text.split()


def occurrences(words, phrase):
    return sum(words[i : i + len(phrase)] == phrase for i in range(len(words) - len(phrase) + 1))


@pytest.mark.parametrize("vocabulary", [BPE, CHAR])
@given(data=st.data())
def test_the_bonus_is_the_sum_over_all_occurrences(vocabulary, data):
    letters = "ABC" if vocabulary is BPE else "AB\u4e00\u4e01"
    words = st.lists(st.text(letters, min_size=1, max_size=3), min_size=1, max_size=3)
    phrases = data.draw(st.lists(words, min_size=1, max_size=5))
    tokens = data.draw(st.lists(st.integers(1, len(vocabulary) - 1), max_size=30))
    weighted = {tuple(words_of_text(" ".join(phrase))): 1.0 + i for i, phrase in enumerate(phrases)}
    graph = ContextGraph([(" ".join(words), weight) for words, weight in weighted.items()], vocabulary)
    said, expected = words_of(vocabulary, tokens), 0.0
    for phrase, weight in weighted.items():
        letters = [token for word in phrase for token in ids(vocabulary, "\u2581", *word)]
        bonus = ContextGraph([(" ".join(phrase), weight)], vocabulary).score(letters)
        expected += bonus / occurrences(list(phrase), list(phrase)) * occurrences(said, list(phrase))
    assert graph.score(tokens) == pytest.approx(expected)
    assert all(score >= 0 for score in growing_score(graph, tokens))


def test_hotwords_are_parsed_and_moves_forgotten_not_hoarded(monkeypatch):
    content = "\ufeff# names\nANNA\n\n  BORIS KARLOFF :3.5\n\u4e00\u4e01 :2\n"
    assert parse_hotwords(content) == ["ANNA", ("BORIS KARLOFF", 3.5), ("\u4e00\u4e01", 2.0)]
    with pytest.raises(ValueError, match="line 2: weight must be a number, got 'x'"):
        parse_hotwords("A\nB :x\n")
    tokens = [*list(range(1, len(BPE))) * 3, *ids(BPE, "\u2581CAT")]
    expected = ContextGraph(["CAT"], BPE).score(tokens)
    monkeypatch.setattr("u2moe.runtime.decoding.context._MAX_MOVES", 3)
    graph = ContextGraph(["CAT"], BPE)
    assert graph.score(tokens) == expected
    assert len(graph._moves) <= 3


def plain_search(log_probs, beam_size, bonus_of):
    """Return prefixes and scores, by the algorithm without shortcuts: tuples ranked by score and bonus."""
    beams = {(): (0.0, -math.inf)}
    for row in log_probs.tolist():
        following = defaultdict(lambda: [-math.inf, -math.inf])
        for token in sorted(range(len(row)), key=lambda i: -row[i])[:beam_size]:
            for prefix, (blank, last) in beams.items():
                if token == 0:
                    following[prefix][0] = np.logaddexp(following[prefix][0], np.logaddexp(blank, last) + row[0])
                    continue
                repeats = bool(prefix) and prefix[-1] == token
                if repeats:
                    following[prefix][1] = np.logaddexp(following[prefix][1], last + row[token])
                grown = following[(*prefix, token)]
                grown[1] = np.logaddexp(grown[1], (blank if repeats else np.logaddexp(blank, last)) + row[token])
        ranked = sorted(following.items(), key=lambda item: -(np.logaddexp(*item[1]) + bonus_of(item[0])))
        beams = dict(ranked[:beam_size])
    return {prefix: np.logaddexp(*scores) for prefix, scores in beams.items()}


def plain_searches(log_probs, beam_size, graph):
    """Return all hypotheses without hotwords, and those with hotwords that contain one: tokens by score."""
    found = plain_search(log_probs, beam_size, lambda prefix: (growing_score(graph, prefix) or [0.0])[-1])
    found = {prefix: score for prefix, score in found.items() if graph.score(prefix)}
    found |= plain_search(log_probs, beam_size, lambda _: 0.0)
    scored = [(score + graph.score(prefix), list(prefix)) for prefix, score in found.items()]
    return sorted(scored, key=lambda item: -item[0])


@pytest.mark.parametrize("often", [[("A", 0.3)], []])  # without, most searches find no hotword
@given(st.integers(0, 10_000), st.integers(0, 20), st.sampled_from([1, 3, 8]), st.sampled_from([0.5, 2.0, 6.0]))
def test_the_search_is_the_plain_one(often, seed, num_frames, beam_size, weight):
    graph = ContextGraph([("CAT", weight), ("B CAB", weight), *often], BPE)
    log_probs = random_log_probs(seed, num_frames, len(BPE))
    found = ctc_prefix_beam_search(log_probs, beam_size, context=graph)
    expected = plain_searches(log_probs, beam_size, graph)
    assert [hypothesis.score for hypothesis in found] == pytest.approx([score for score, _ in expected])
    for hypothesis in found:
        assert (hypothesis.tokens, pytest.approx(hypothesis.score)) in [(t, s) for s, t in expected]
        assert hypothesis.context_score == pytest.approx(graph.score(hypothesis.tokens))


@given(st.integers(0, 10_000), st.integers(1, 40))
def test_portions_do_not_matter(seed, size):
    graph = ContextGraph(["CAT", "B CAB"], BPE)
    log_probs = random_log_probs(seed, 40, len(BPE))
    search = PrefixBeamSearch(5, context=graph)
    for start in range(0, 40, size):
        search.advance(log_probs[start : start + size])
        search.hypotheses()
    search.finish()
    assert search.hypotheses() == ctc_prefix_beam_search(log_probs, 5, context=graph)
