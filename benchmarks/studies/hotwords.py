"""Do hotwords find names that would be missed, without affecting the rest? Measured on recordings with transcripts.

    python -m u2moe.benchmarks.studies.hotwords BUNDLE TEST.tsv ...

Rare words of the transcripts (long, and in few recordings) stand for names. Each recording is recognised three times:
without hotwords; with its own rare words in a list filled up with words from other recordings; and with a list of words
from other recordings only, none of which is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import recognition_parser, run_script
from u2moe.runtime import Recognizer
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.decoding.context import DEFAULT_WEIGHT
from u2moe.runtime.text.word_errors import edit_distance, matches, words

SHORTEST = 5
"""Minimum letters of a rare word."""
MOST_RECORDINGS = 3
"""Maximum number of recordings of a set that contain a rare word."""
LIST_LENS = (10, 100)
"""Words in a list: the names in a meeting, and those in a company."""


def counted(transcript: str, text: str, rare: set[str], hotwords: Sequence[str]) -> dict[str, int]:
    """Counts of one recording; `num_false`: words of the list that were recognised but not said."""
    said, recognised = words(transcript), words(text)
    false = Counter(word for word in recognised if word in hotwords) - Counter(said)
    return {
        "num_words": len(said),
        "num_errors": edit_distance(said, recognised),
        "num_rare": sum(word in rare for word in said),
        "num_rare_found": sum(said[position] in rare for position, _ in matches(said, recognised)),
        "num_false": false.total(),
    }


def rare_words(recordings: Sequence[Recording]) -> list[set[str]]:
    """The rare words of each recording."""
    said = [set(words(recording.transcript)) for recording in recordings]
    counts = Counter(word for one in said for word in one)
    return [{word for word in one if len(word) >= SHORTEST and counts[word] <= MOST_RECORDINGS} for one in said]


def others(everywhere: Sequence[str], said: set[str], num: int, random: np.random.Generator) -> list[str]:
    """`num` rare words of other recordings."""
    drawn = [everywhere[position] for position in random.permutation(len(everywhere))[: num + len(said)].tolist()]
    return [word for word in drawn if word not in said][:num]


def measure(recognizer: Recognizer, recordings: Sequence[Recording], weight: float, list_len: int) -> dict[str, Any]:
    """Recognise every recording under the three conditions."""
    random = np.random.default_rng(0)
    rare = rare_words(recordings)
    everywhere = sorted(set().union(*rare))
    counts = {name: Counter[str]() for name in ("without", "with", "unrelated")}
    num_changed = 0
    for recording, own in zip(recordings, rare, strict=True):
        said = set(words(recording.transcript))
        unrelated = others(everywhere, said, list_len, random)
        named = [*sorted(own), *unrelated[: max(list_len - len(own), 0)]]
        texts = {"without": recognizer.transcribe(recording.path).text}
        for name, hotwords in (("with", named), ("unrelated", unrelated)):
            weighted = [(word, weight) for word in hotwords]
            texts[name] = recognizer.transcribe(recording.path, hotwords=weighted or None).text
        for name, text in texts.items():
            counts[name].update(counted(recording.transcript, text, own, named if name == "with" else unrelated))
        num_changed += texts["unrelated"] != texts["without"]
    return {
        "num_recordings": len(recordings),
        "num_listed": min(list_len, len(everywhere)),
        "num_changed_by_unrelated": num_changed,
        **{
            name: {**own, "wer": round(own["num_errors"] / max(own["num_words"], 1), 4)} for name, own in counts.items()
        },
    }


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Values for the pages: a row for each set and length of the list, and those of all sets with the longest list."""
    rows = []
    for name, list_len, found in ((name, *item) for name, lists in results["sets"].items() for item in lists.items()):
        without, named, unrelated = found["without"], found["with"], found["unrelated"]
        rows.append(
            (
                name, list_len, f"{without['num_rare_found']}, {named['num_rare_found']} of {named['num_rare']}",
                f"{without['wer']:.1%}, {named['wer']:.1%}",
                f"{found['num_changed_by_unrelated']} of {found['num_recordings']}", f"{unrelated['wer']:.1%}",
                f"{unrelated['num_false']} in {unrelated['num_words']} words",
            )
        )  # fmt: skip
    header = (
        "set", "list", "rare words found without, with", "word errors without, with", "texts changed by others",
        "word errors then", "others recognised",
    )  # fmt: skip
    longest = [list(lists.values())[-1] for lists in results["sets"].values()]

    def share(condition: str, key: str, of: str) -> float:
        above, below = (sum(int(found[condition][name]) for found in longest) for name in (key, of))
        return above / max(below, 1)

    return {
        "table": table(header, rows),
        "weight": f"{results['weight']:g}",
        "found_without": f"{share('without', 'num_rare_found', 'num_rare'):.0%}",
        "found_with": f"{share('with', 'num_rare_found', 'num_rare'):.0%}",
        "errors_without": f"{share('without', 'num_errors', 'num_words'):.1%}",
        "errors_unrelated": f"{share('unrelated', 'num_errors', 'num_words'):.1%}",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = recognition_parser("hotwords", __doc__)
    parser.add_argument("--weight", type=float, default=DEFAULT_WEIGHT, help=f"default: {DEFAULT_WEIGHT}")
    args = parser.parse_args(argv)
    recognizer = Recognizer.from_pretrained(args.bundle)
    sets = {
        path.stem: {str(num): measure(recognizer, read_recordings(path), args.weight, num) for num in LIST_LENS}
        for path in args.lists
    }
    publish(args.results, {"weight": args.weight, "sets": sets}, values, bundle=args.bundle)


if __name__ == "__main__":
    run_script(main)
