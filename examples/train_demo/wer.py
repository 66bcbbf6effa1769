"""Word error rate by edit distance."""

from dataclasses import dataclass


def edit_distance(reference: list[str], hypothesis: list[str]) -> int:
    """Fewest substitutions, deletions and insertions of words."""
    row = list(range(len(hypothesis) + 1))
    for number, word in enumerate(reference, start=1):
        diagonal, row[0] = row[0], number
        for column, heard in enumerate(hypothesis, start=1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (word != heard))
    return row[-1]


@dataclass
class Score:
    """Errors and words of a test set, and utterances that are exactly right."""

    errors: int = 0
    num_words: int = 0
    num_exact: int = 0
    num_utterances: int = 0

    def add(self, reference: str, hypothesis: str) -> None:
        """Counts one utterance; both texts in normalized form."""
        errors = edit_distance(reference.split(), hypothesis.split())
        self.errors += errors
        self.num_words += len(reference.split())
        self.num_exact += errors == 0
        self.num_utterances += 1

    @property
    def rate(self) -> float:
        """Errors per word."""
        return self.errors / max(self.num_words, 1)
