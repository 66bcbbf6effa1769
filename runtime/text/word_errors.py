"""Word errors of recognised text."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from u2moe.runtime.text.vocabulary import combining_marks

_DIAGONAL, _DELETION, _INSERTION = range(3)


def words(text: str) -> list[str]:
    """Split a text into upper-case words for comparison, without punctuation except apostrophes.

    Each CJK character is a word. Accented letters are equal whether written as one character or as two (Unicode's
    normal form C).
    """
    plain = unicodedata.normalize("NFC", text.upper()).replace("\u2019", "'")
    spaced = re.sub(r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])", r" \1 ", plain)
    return re.findall(rf"[\w'{combining_marks()}]+", spaced)


def edit_distance(reference: Sequence[object], hypothesis: Sequence[object]) -> int:
    """Return the minimum number of substitutions, deletions and insertions between two sequences."""
    return _distances(reference, hypothesis)[-1]


def num_revised(words: Sequence[object], revised: Sequence[object]) -> int:
    """Return the minimum number of words to change, add or remove so that `words` becomes a prefix of `revised`."""
    return 0 if words == revised[: len(words)] else min(_distances(words, revised))


def _distances(
    reference: Sequence[object], hypothesis: Sequence[object], steps: list[bytearray] | None = None
) -> list[int]:
    """Return the edit distances of a sequence to each prefix of another. `steps` receives how pairs are reached."""
    row = list(range(len(hypothesis) + 1))
    for number, expected in enumerate(reference, 1):
        diagonal, row[0] = row[0], number
        step = bytearray(len(hypothesis))  # bytes, since an hour of speech has 10,000 words
        for column, found in enumerate(hypothesis):
            same, deletion, insertion = diagonal + (expected != found), row[column + 1] + 1, row[column] + 1
            best = min(same, deletion, insertion)
            step[column] = _DIAGONAL if best == same else _DELETION if best == deletion else _INSERTION
            diagonal, row[column + 1] = row[column + 1], best
        if steps is not None:
            steps.append(step)
    return row


def alignment(reference: Sequence[object], hypothesis: Sequence[object]) -> list[tuple[int | None, int | None]]:
    """Return the index pairs of an alignment with the fewest edits, in order; None: a deletion or an insertion."""
    steps: list[bytearray] = []
    _distances(reference, hypothesis, steps)
    pairs: list[tuple[int | None, int | None]] = []
    place, column = len(reference), len(hypothesis)
    while place and column:
        step = steps[place - 1][column - 1]
        place -= step != _INSERTION
        column -= step != _DELETION
        pairs.append((None if step == _INSERTION else place, None if step == _DELETION else column))
    pairs += [(index, None) for index in reversed(range(place))] + [(None, index) for index in reversed(range(column))]
    return pairs[::-1]


def matches(reference: Sequence[object], hypothesis: Sequence[object]) -> list[tuple[int, int]]:
    """Align two sequences with the fewest edits. Return the index pairs of equal items, in order."""
    pairs = alignment(reference, hypothesis)
    return [(i, j) for i, j in pairs if i is not None and j is not None and reference[i] == hypothesis[j]]


@dataclass(kw_only=True)
class WordErrors:
    """Word errors, accumulated over texts. `num_words` counts the words of the transcripts.

    `confusions` tells how often a word of a transcript (empty for an insertion) was recognised as another (empty for a
    deletion).
    """

    num_errors: int = 0
    num_words: int = 0
    num_texts: int = 0
    num_wrong_texts: int = 0
    confusions: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, transcript: str, text: str) -> None:
        """Compare a recognised text with its transcript, and add the errors to the counts."""
        reference, hypothesis = words(transcript), words(text)
        pairs = alignment(reference, hypothesis)
        found = [("" if i is None else reference[i], "" if j is None else hypothesis[j]) for i, j in pairs]
        errors = [pair for pair in found if pair[0] != pair[1]]
        self.confusions.update(errors)
        self.num_texts += 1
        self.num_wrong_texts += bool(errors)
        self.num_errors += len(errors)
        self.num_words += len(reference)

    @property
    def rate(self) -> float:
        """Errors per word of the transcripts; 0 if they contain no words."""
        return self.num_errors / self.num_words if self.num_words else 0.0

    @property
    def num_insertions(self) -> int:
        """Number of recognised words that were not spoken."""
        return sum(count for (expected, _), count in self.confusions.items() if not expected)

    @property
    def num_deletions(self) -> int:
        """Number of spoken words that were not recognised."""
        return sum(count for (_, found), count in self.confusions.items() if not found)

    @property
    def num_substitutions(self) -> int:
        """Number of words that were recognised as other words."""
        return self.num_errors - self.num_insertions - self.num_deletions

    def data(self, num_confusions: int = 20) -> dict[str, Any]:
        """Return all numbers, and the most frequent confusions, as JSON."""
        most = sorted(self.confusions.items(), key=lambda item: (-item[1], item[0]))[:num_confusions]
        return {
            "texts": self.num_texts, "wrong_texts": self.num_wrong_texts, "words": self.num_words,
            "errors": self.num_errors, "rate": round(self.rate, 6), "insertions": self.num_insertions,
            "deletions": self.num_deletions, "substitutions": self.num_substitutions,
            "confusions": [{"expected": pair[0], "found": pair[1], "count": count} for pair, count in most],
        }  # fmt: skip
