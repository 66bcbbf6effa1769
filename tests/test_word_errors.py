"""Word errors by kind, and the most confused words, compared with jiwer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime.text.word_errors import WordErrors, alignment, edit_distance

TEXTS = st.lists(st.sampled_from(["A", "B", "C", "IT'S", "D"]), max_size=8).map(" ".join)


@given(st.lists(st.tuples(TEXTS.filter(bool), TEXTS), min_size=1, max_size=5))
def test_numbers_are_those_of_jiwer(pairs):
    jiwer = pytest.importorskip("jiwer")
    report, errors = WordErrors(), WordErrors()
    for transcript, text in pairs:
        report.add(transcript, text)
        errors.add(transcript, text)
    expected = jiwer.process_words(*map(list, zip(*pairs, strict=True)))
    assert report.rate == errors.rate == pytest.approx(expected.wer)
    # If several alignments have the fewest errors, kinds may differ, but not insertions minus deletions.
    assert report.num_errors == expected.insertions + expected.deletions + expected.substitutions
    assert report.num_insertions - report.num_deletions == expected.insertions - expected.deletions


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
    (
        "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0646\u0645\u06cc",
        1,
        1,
    ),  # Persian, with a joiner
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
    found = report.data(2)
    assert found["confusions"] == [
        {"expected": "CAT", "found": "BAT", "count": 2},
        {"expected": "", "found": "PLEASE", "count": 1},
    ]
    del found["confusions"]
    assert found == {
        "texts": 3, "wrong_texts": 2, "words": 9, "errors": 4, "rate": 0.444444, "insertions": 1, "deletions": 1,
        "substitutions": 2,
    }  # fmt: skip
