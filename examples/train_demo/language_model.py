"""Trains the demo's language models on text in Debian packages: a general one in three sizes, and two for domains.

The text contains no sentence of a test set. The table by `evaluate.py` shows the effect of the small one.
"""

import argparse
import html
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from games import table_rows
from spelling import normalize
from texts import grammar_line, prose_sentences, wordnet_definitions, wordnet_phrases
from withheld import TESTS, VALIDATION, Withheld, read_sentences

from u2moe.runtime.language.files import write_compact
from u2moe.runtime.language.kneser_ney import TrainingOptions, count_ngrams, train

SIZES = {
    "small": (TrainingOptions(order=3, prune=(0, 2, 3), min_word_count=5), 8),
    "medium": (TrainingOptions(order=3, prune=(0, 0, 1), min_word_count=2), 8),
    "large": (TrainingOptions(order=4), 16),
    "game": (TrainingOptions(order=3), 8),
    "numbers": (TrainingOptions(order=4), 8),
}
"""Training options and bits per probability of each model. The first three models are general."""
NUM_SPOKEN = 30_000
"""Number of lines drawn from the grammars of numbers, dates, times and commands."""


def articles(folder: Path) -> Iterator[str]:
    """Yield all sentences of web pages and fortune cookies, of any length."""
    for path in sorted(folder.rglob("*.html")):
        text = html.unescape(re.sub(r"<[^>]*>", " ", path.read_text(encoding="utf-8", errors="replace")))
        for paragraph in re.split(r"\n\s*\n", text):
            yield from re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))


def general(debian: Path) -> Iterator[str]:
    """Yield sentences of all packages, with repetitions."""
    share = debian / "usr/share"
    yield from wordnet_phrases(share / "wordnet")
    yield from wordnet_definitions(share / "wordnet")
    yield from prose_sentences(sorted(path for path in (share / "games/fortunes").glob("*") if not path.suffix))
    yield from articles(share / "doc/anarchism")
    yield from prose_sentences([share / "dictd/gcide.dict.dz"])
    yield from spoken()


def spoken() -> Iterator[str]:
    """Yield numbers, dates, times, letters and commands."""
    rng = random.Random(0)
    for _ in range(NUM_SPOKEN):
        yield grammar_line(rng)


def game() -> Iterator[str]:
    """Yield the lines of the characters that the demo model was trained on."""
    for row in table_rows("queen", "train"):
        yield row["text"]


def written(path: Path, sentences: Iterable[str], withheld: Withheld) -> list[list[str]]:
    """Write normalized sentences, except withheld ones, to a file, and return them as words."""
    allowed = [text for text in (normalize(sentence) for sentence in sentences) if text and withheld.allows(text)]
    path.write_text("".join(f"{text.lower()}\n" for text in allowed), encoding="utf-8")
    return [text.lower().split() for text in allowed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("exp"))
    parser.add_argument("--debian", type=Path, required=True, help="folder with the unpacked Debian packages")
    parser.add_argument("--output", type=Path, required=True, help="folder for texts and models")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    withheld = Withheld(
        [
            *read_sentences(args.work_dir / "test", TESTS),
            *(read_sentences(args.work_dir / "test", VALIDATION[1:])),
        ]
    )
    sources = {"general": general(args.debian), "game": game(), "numbers": spoken()}
    texts = {name: written(args.output / f"{name}.txt", text, withheld) for name, text in sources.items()}
    for name, (options, bits) in SIZES.items():
        text = texts[name if name in texts else "general"]
        counts = count_ngrams(text, options.order, min_word_count=options.min_word_count)
        ngrams = train(counts, options, warn=print)
        path = args.output / f"{name}.lm"
        write_compact(ngrams, path, bits=bits)
        print(f"{name}: n-grams {ngrams.num_ngrams}, {path.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
