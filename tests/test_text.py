import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime.errors import BundleError
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary, is_syllabic, join_texts, parse_tokens, stands_alone
from u2moe.runtime.text.word_errors import WordErrors, alignment, edit_distance


def spell(symbols, tokenizer="bpe"):
    vocabulary = Vocabulary(symbols, TextConfig(tokenizer=tokenizer))
    tokens = range(len(symbols))
    words = vocabulary.words(tokens)
    # Words cover their tokens in order, and together make the text.
    assert all(a.end <= b.begin for a, b in itertools.pairwise(words))
    assert "".join(word.text for word in words) == vocabulary.text(tokens).replace(" ", "")
    return vocabulary.text(tokens), [(word.text, word.begin, word.end) for word in words]


@pytest.mark.parametrize(("symbols", "text", "words"), [
    ([], "", []),
    (["▁HE", "LLO", "▁WORLD"], "HELLO WORLD", [("HELLO", 0, 2), ("WORLD", 2, 3)]),
    (["▁", "A", "B", "▁", "▁C"], "AB C", [("AB", 1, 3), ("C", 4, 5)]),
    (["LLO", "▁"], "LLO", [("LLO", 0, 1)]),
    (["h", "i", "▁", "y", "o"], "hi yo", [("hi", 0, 2), ("yo", 3, 5)]),
    (["h", " ", "y"], "h y", [("h", 0, 1), ("y", 2, 3)]),
    (["你", "好"], "你好", [("你", 0, 1), ("好", 1, 2)]),
    (["你", "▁OK", "AY", "好", "b"], "你 OKAY好b", [("你", 0, 1), ("OKAY", 1, 3), ("好", 3, 4), ("b", 4, 5)]),
    (["▁서", "울에", "▁", "가", "자"], "서울에 가자", [("서울에", 0, 2), ("가자", 3, 5)]),
    (["'", "S", "▁<unk>"], "'S <unk>", [("'S", 0, 2), ("<unk>", 2, 3)]),
])  # fmt: skip
def test_text_and_words(symbols, text, words):
    assert (spell(symbols), spell(symbols, "char")) == ((text, words), (text, words))


@given(st.lists(st.sampled_from(["▁", "▁a", "b", "c▁", " ", "你", "▁你", "가", "d e", "カ", "!", "▁▁x"]), max_size=12))
def test_words_always_make_the_text(symbols):
    spell([symbol for symbol in symbols if symbol != "d e"])


@pytest.mark.parametrize(("texts", "joined"), [
    ([], ""), (["GOOD", "DAY"], "GOOD DAY"), (["你好", "再见"], "你好再见"), (["你好", "OK", "はい"], "你好OKはい"),
    (["서울에", "가자"], "서울에 가자"),
])  # fmt: skip
def test_texts_of_segments_are_joined_as_their_script_is_written(texts, joined):
    assert join_texts(texts) == joined


def test_scripts_without_spaces_and_hangul_have_these_limits():
    limits = {code for code in range(1, 1 << 18) if stands_alone(chr(code)) != stands_alone(chr(code - 1))}
    assert limits == {0x2E80, 0x3130, 0x3190, 0xA000, 0xF900, 0xFB00, 0xFF66, 0xFFA0, 0x1B000, 0x1B300, 0x20000}
    hangul = {code for code in range(1, 0xD801) if is_syllabic(chr(code)) != is_syllabic(chr(code - 1))}
    assert hangul - limits == {0x1100, 0x1200, 0xA960, 0xA980, 0xAC00, 0xD800}


def test_tokens_file():
    assert parse_tokens("b 1\na 0\r\n\n▁ 2\n") == ["a", "b", "▁"]
    assert parse_tokens("\ufeffa 0\n  1\n\u3000 2\nx y 3\n\t\t4\n") == ["a", " ", "\u3000", "x y", "\t"]
    assert parse_tokens("") == []


@pytest.mark.parametrize(("content", "message"), [
    ("a\n", "line 1 must be 'symbol id', got 'a'"),
    ("a 0\nb x\n", "line 2 must be 'symbol id', got 'b x'"),
    ("a -1\n", "must be 'symbol id'"),
    ("a ٣\n", "must be 'symbol id'"),
    (" 0\n", "must be 'symbol id'"),
    ("a 0\nb 0\n", "id 0 already belongs to 'a'"),
    ("a 0\nb 2\n", "no symbol has id 1"),
    ("a 99999999999999999999\n", "must be 'symbol id'"),
])  # fmt: skip
def test_tokens_files_that_are_refused(content, message):
    with pytest.raises(BundleError, match=message):
        parse_tokens(content)


TEXTS = st.lists(st.sampled_from(["A", "B", "C", "IT'S", "D"]), max_size=8).map(" ".join)


@given(st.lists(st.tuples(TEXTS.filter(bool), TEXTS), min_size=1, max_size=5))
def test_numbers_of_word_errors_are_those_of_jiwer(pairs):
    jiwer, errors = pytest.importorskip("jiwer"), WordErrors()
    for transcript, text in pairs:
        errors.add(transcript, text)
    expected = jiwer.process_words(*map(list, zip(*pairs, strict=True)))
    assert errors.rate == pytest.approx(expected.wer)
    # If several alignments have the fewest errors, kinds may differ, but not insertions minus deletions.
    assert errors.num_errors == expected.insertions + expected.deletions + expected.substitutions
    assert errors.num_insertions - errors.num_deletions == expected.insertions - expected.deletions


@given(TEXTS.map(str.split), TEXTS.map(str.split))
def test_an_alignment_has_every_word_once_and_the_fewest_edits(reference, hypothesis):
    pairs = alignment(reference, hypothesis)
    assert [place for place, _ in pairs if place is not None] == list(range(len(reference)))
    assert [place for _, place in pairs if place is not None] == list(range(len(hypothesis)))
    edits = [None in pair or reference[pair[0]] != hypothesis[pair[1]] for pair in pairs]
    assert sum(edits) == edit_distance(reference, hypothesis)


@pytest.mark.parametrize(("transcript", "text", "num_errors", "num_words"), [
    ("\u0926\u093f\u0928", "\u0926\u0940\u0928", 1, 1),  # Hindi: two words that differ in a vowel sign
    ("caf\u00e9 noir", "cafe\u0301 noir", 0, 2),  # one character or two
    ("\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0646\u0645\u06cc", 1, 1),  # Persian, with a joiner
    ("na\u0308ive, it's \u201cso\u201d", "n\u00e4ive it\u2019s so", 0, 3),
])  # fmt: skip
def test_marks_belong_to_their_letters(transcript, text, num_errors, num_words):
    errors = WordErrors()
    errors.add(transcript, text)
    assert (errors.num_errors, errors.num_words) == (num_errors, num_words)


def test_what_was_confused():
    report = WordErrors()
    report.add("the cat sat on the mat", "The bat sat on mat.")
    report.add("a cat", "please a bat")
    report.add("good", "good")
    assert report.data(2) == {
        "texts": 3, "wrong_texts": 2, "words": 9, "errors": 4, "rate": 0.444444, "insertions": 1, "deletions": 1,
        "substitutions": 2, "confusions": [
            {"expected": "CAT", "found": "BAT", "count": 2}, {"expected": "", "found": "PLEASE", "count": 1}],
    }  # fmt: skip
