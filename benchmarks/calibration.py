"""Does confidence mean something? Of the words that are said to be right with 70 %, about 70 % should be.

    python -m u2moe.benchmarks.calibration BUNDLE TEST.tsv ... --output calibration.json

Every recording of the manifests is recognised; a word is right when it stands at its place in the transcript.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.json_file import write_json
from u2moe.benchmarks.provenance import measured_here, of_bundle, sentence
from u2moe.runtime import DecodingOptions, Recognizer
from u2moe.runtime.accuracy import Recording, matches, read_manifest, words

ALL = "all"
NUM_BINS = 10
_SMALLEST = 1e-4

Words = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]
"""Of recognised words: confidence [n], and whether they are right [n]."""


def hear(recognizer: Recognizer, recordings: Iterable[Recording]) -> Words:
    """Confidence of each word that is recognised, and whether it is right."""
    confidences: list[float] = []
    right: list[bool] = []
    for recording in recordings:
        found = [word for segment in recognizer.transcribe(recording.path).segments for word in segment.words]
        pairs = matches([[word] for word in words(recording.transcript)], [words(word.word) for word in found])
        places = {place for _, place in pairs}
        sure = [(place in places, word.confidence) for place, word in enumerate(found)]
        right += [is_right for is_right, confidence in sure if confidence is not None]
        confidences += [confidence for _, confidence in sure if confidence is not None]
    return np.array(confidences, np.float64), np.array(right, bool)


def reliability(found: Words) -> dict[str, Any]:
    """How far confidence is to be believed.

    Returns:
        `bins`: for each tenth of the confidence the number of words, their mean confidence and the share that is right;
        `expected_error`: mean difference of the two, by number of words (ECE); `area`: how often a right word is surer
        than a wrong one (area under the ROC curve, 0.5: by chance); `information`: share of the uncertainty about what
        is right that the confidence removes (normalised cross entropy of NIST; below 0: worse than knowing nothing).
    """
    confidences, right = found
    places = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = []
    for place in range(NUM_BINS):
        inside = places == place
        if inside.any():
            bins.append(
                {
                    "from": place / NUM_BINS, "to": (place + 1) / NUM_BINS, "num_words": int(inside.sum()),
                    "confidence": round(float(confidences[inside].mean()), 4),
                    "right": round(float(right[inside].mean()), 4),
                }
            )  # fmt: skip
    error = sum(item["num_words"] * abs(item["confidence"] - item["right"]) for item in bins) / max(len(right), 1)
    return {
        "num_words": len(right),
        "right": round(float(right.mean()), 4) if len(right) else None,
        "confidence": round(float(confidences.mean()), 4) if len(right) else None,
        "expected_error": round(error, 4),
        "area": area_under_roc(found),
        "information": information(found),
        "bins": bins,
    }


def area_under_roc(found: Words) -> float | None:
    """How often a right word is surer than a wrong one; a tie counts half. None without one of either."""
    confidences, right = found
    if right.all() or not right.any():
        return None
    sure, unsure = np.sort(confidences[right]), confidences[~right]
    below = np.searchsorted(sure, unsure, "right") + np.searchsorted(sure, unsure, "left")
    return round(1 - float(below.mean()) / (2 * len(sure)), 4)


def information(found: Words) -> float | None:
    """Normalised cross entropy; None where all or none is right."""
    confidences, right = found
    if right.all() or not right.any():
        return None
    share = right.mean()
    before = -(share * np.log(share) + (1 - share) * np.log(1 - share))
    clipped = confidences.clip(_SMALLEST, 1 - _SMALLEST)
    after = -np.where(right, np.log(clipped), np.log(1 - clipped)).mean()
    return round(float((before - after) / before), 4)


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: a row for each set, and the bins of all together."""
    lines = [
        "Demo model, full context: confidence of words, and whether they are right. " + sentence(results),
        "",
        "| set | words heard | right | mean confidence | expected error | area | information |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in results["sets"].items():
        share, confidence = found["right"] or 0.0, found["confidence"] or 0.0
        lines.append(
            f"| {name} | {found['num_words']} | {share:.1%} | {confidence:.1%} | {found['expected_error']:.1%} "
            f"| {found['area']} | {found['information']} |"
        )
    lines += ["", "| confidence | words | mean confidence | right |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {item['from']:.0%} to {item['to']:.0%} | {item['num_words']} | {item['confidence']:.1%} "
        f"| {item['right']:.1%} |"
        for item in results["sets"][ALL]["bins"]
    ]
    legend = (
        "Expected error: mean difference of confidence and share that is right, over the bins (ECE). Area: how often a "
        "right word is surer than a wrong one (under the ROC curve). Information: share of the uncertainty about what "
        "is right that the confidence removes (normalised cross entropy)."
    )
    return "\n".join([*lines, "", legend])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="python -m u2moe.benchmarks.calibration", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("manifests", type=Path, nargs="+", help="lists of recordings: path<TAB>transcript")
    parser.add_argument("--chunk-size", type=int, help="encoder frames per chunk (default: full context)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    recognizer = Recognizer.from_pretrained(args.bundle, options=DecodingOptions(chunk_size=args.chunk_size))
    sets = {manifest.stem: hear(recognizer, read_manifest(manifest)) for manifest in args.manifests}
    sets[ALL] = (
        np.concatenate([confidences for confidences, _ in sets.values()]),
        np.concatenate([right for _, right in sets.values()]),
    )
    found = {name: reliability(words_of_set) for name, words_of_set in sets.items()}
    results = {**measured_here(), **of_bundle(args.bundle), "chunk_size": args.chunk_size, "sets": found}
    if args.output:
        write_json(args.output, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
