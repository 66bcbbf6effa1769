"""Does confidence mean something? Of the words that are said to be right with 70 %, about 70 % should be.

    python -m u2moe.benchmarks.calibration BUNDLE TEST.tsv ... --output calibration.json
    python -m u2moe.benchmarks.calibration BUNDLE DEV.tsv ... --fit      # the two numbers for the bundle's manifest

Every recording of the manifests is recognised; a word is right when it stands at its place in the transcript.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime import DecodingOptions, Recognizer
from u2moe.runtime.accuracy import Recording, matches, read_manifest, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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


def fit(found: Words, num_steps: int = 50) -> tuple[float, float]:
    """Scale and bias of the log-odds that make the confidence most likely (Platt), by Newton's method."""
    confidences, right = found
    clipped = confidences.clip(_SMALLEST, 1 - _SMALLEST)
    odds = np.stack([np.log(clipped / (1 - clipped)), np.ones(len(right))])
    weights = np.array([1.0, 0.0])
    for _ in range(num_steps):
        guess = 1 / (1 + np.exp(-weights @ odds))
        curvature = (odds * guess * (1 - guess)) @ odds.T + 1e-6 * np.eye(2)
        weights -= np.linalg.solve(curvature, odds @ (guess - right))
    return round(float(weights[0]), 3), round(float(weights[1]), 3)


def table(report: dict[str, dict[str, Any]]) -> str:
    """The report as Markdown: a row for each set, and the bins of all together."""
    lines = ["| set | words | right | mean confidence | expected error | area | information |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for name, found in report.items():
        share, confidence = found["right"] or 0.0, found["confidence"] or 0.0
        lines.append(
            f"| {name} | {found['num_words']} | {share:.1%} | {confidence:.1%} | {found['expected_error']:.1%} "
            f"| {found['area']} | {found['information']} |"
        )
    lines += ["", "| confidence | words | mean confidence | right |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {item['from']:.0%} to {item['to']:.0%} | {item['num_words']} | {item['confidence']:.1%} "
        f"| {item['right']:.1%} |"
        for item in report["all"]["bins"]
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="python -m u2moe.benchmarks.calibration", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("manifests", type=Path, nargs="+", help="lists of recordings: path<TAB>transcript")
    parser.add_argument("--chunk-size", type=int, help="encoder frames per chunk (default: full context)")
    parser.add_argument("--fit", action="store_true", help="print scale and bias that calibrate the bundle")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    recognizer = Recognizer.from_pretrained(args.bundle, options=DecodingOptions(chunk_size=args.chunk_size))
    sets = {manifest.stem: hear(recognizer, read_manifest(manifest)) for manifest in args.manifests}
    sets["all"] = (
        np.concatenate([confidences for confidences, _ in sets.values()]),
        np.concatenate([right for _, right in sets.values()]),
    )
    if args.fit:
        scale, bias = fit(sets["all"])
        print(json.dumps({"confidence_scale": scale, "confidence_bias": bias}))
        return 0
    report = {name: reliability(found) for name, found in sets.items()}
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
