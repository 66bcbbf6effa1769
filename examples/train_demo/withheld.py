"""Keeps the sentences of the test sets out of training. As a script, it writes the remaining overlap."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from corpus import MELS, Pack

TESTS = ("queen-test", "asterisk-words", "asterisk-sentences", "saytime", "pocketsphinx")
VALIDATION = ("queen-dev", "heldout")
SHORTEST = 4
"""Minimum words of a withheld sentence. Shorter ones, such as numbers and days, every recogniser must learn."""


def read_sentences(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the normalized sentences of the test sets that `testsets.py` wrote."""
    lines = [line for name in names for line in (folder / f"{name}.tsv").read_text(encoding="utf-8").splitlines()]
    return [line.partition("\t")[2] for line in lines]


LENGTHS = range(1, 6)
"""Lengths of the n-grams that are counted, in words."""


class Withheld:
    """Sentences of at least `SHORTEST` words that no training text may contain."""

    def __init__(self, sentences: Iterable[str]) -> None:
        self.sentences = {words for words in (tuple(text.split()) for text in sentences) if len(words) >= SHORTEST}
        self.lengths = sorted({len(words) for words in self.sentences})

    def allows(self, text: str) -> bool:
        """Return whether the text contains none of the sentences."""
        words = tuple(text.split())
        return not any(
            words[start : start + length] in self.sentences
            for length in self.lengths
            for start in range(len(words) - length + 1)
        )


def overlap(tests: Iterable[str], training: Iterable[str], length: int) -> float:
    """Return the share of the test sentences' n-grams of one length that occur in the training texts."""

    def grams(texts: Iterable[str]) -> set[tuple[str, ...]]:
        rows = (text.split() for text in texts)
        return {tuple(row[start : start + length]) for row in rows for start in range(len(row) - length + 1)}

    wanted = grams(tests)
    return len(wanted & grams(training)) / max(len(wanted), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "overlap.json")
    args = parser.parse_args()
    withheld = Withheld(read_sentences(args.work_dir / "test", TESTS))
    paths = [
        path for path in sorted((args.work_dir / "features").glob("*.tsv")) if path.stem not in {*VALIDATION, "noise"}
    ]
    spoken = {entry.text for path in paths for entry in Pack(path, MELS).utterances}
    training = {text for text in spoken if withheld.allows(text)}
    sets = {}
    for name in TESTS:
        sentences = read_sentences(args.work_dir / "test", [name])
        sets[name] = {str(length): overlap(sentences, training, length) for length in LENGTHS}
    report = {
        "num_training_texts": len(training),
        "num_training_words": len({word for text in training for word in text.split()}),
        "num_withheld_texts": len(spoken) - len(training),
        "overlap": sets,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
