"""Are confidences calibrated? About 70 % of the words with confidence 0.7 should be correct.

    python -m u2moe.benchmarks.studies.calibration BUNDLE DEV.tsv ... --fit    # writes into the bundle
    python -m u2moe.benchmarks.studies.calibration BUNDLE TEST.tsv ...

Recordings are recognised with full context. A word is correct if the alignment pairs it with the same word of the
transcript.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.stats import mannwhitneyu

from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.studies.shared.script import recognition_parser, script
from u2moe.runtime import Bundle, Recognizer
from u2moe.runtime.bundle.manifest import MANIFEST_FILE, Calibration
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.text.word_errors import matches, words
from u2moe.runtime.whole_file import write_text

ALL = "all"
NUM_BINS = 10
_SMALLEST = 1e-4

Words = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]  # confidence of each word [n], whether it is correct [n]


def recognise(recognizer: Recognizer, recordings: Iterable[Recording]) -> Words:
    """Return, for each recognised word with a confidence, the confidence and whether the word is correct."""
    confidences, right = list[float](), list[bool]()
    for recording in recordings:
        found = [word for segment in recognizer.transcribe(recording.path).segments for word in segment.words]
        pairs = matches([[word] for word in words(recording.transcript)], [words(word.word) for word in found])
        positions = {position for _, position in pairs}
        for position, word in enumerate(found):
            if word.confidence is not None:
                confidences.append(word.confidence)
                right.append(position in positions)
    return np.array(confidences, np.float64), np.array(right, bool)


def reliability(found: Words) -> dict[str, Any]:
    """Return statistics of how well confidences predict correct words; docs/results/accuracy.md explains them."""
    confidences, right = found
    positions = np.minimum((confidences * NUM_BINS).astype(int), NUM_BINS - 1)

    def means(inside: npt.NDArray[np.bool_]) -> dict[str, Any]:
        parts = {"right": right[inside], "confidence": confidences[inside]}
        shares = {name: round(float(part.mean()), 4) if inside.any() else None for name, part in parts.items()}
        return {"num_words": int(inside.sum()), **shares}

    numbers = np.unique(positions).tolist()
    bins = [{"from": n / NUM_BINS, "to": (n + 1) / NUM_BINS, **means(positions == n)} for n in numbers]
    error = sum(item["num_words"] * abs(item["confidence"] - item["right"]) for item in bins) / max(len(right), 1)
    every = means(np.ones(len(right), bool))
    return {**every, "expected_error": round(error, 4), "area": area_under_roc(found), "bins": bins}


def area_under_roc(found: Words) -> float | None:
    """Return the chance that a right word has more confidence than a wrong one; ties count half. None without both."""
    confidences, right = found
    if right.all() or not right.any():
        return None
    sure, unsure = confidences[right], confidences[~right]
    return round(float(mannwhitneyu(sure, unsure).statistic) / (len(sure) * len(unsure)), 4)


def fit(found: Words) -> tuple[float, float]:
    """Return the maximum-likelihood scale and bias of the log-odds (Platt scaling).

    As in Platt's method, targets are slightly below 1 for correct words and slightly above 0 for wrong ones. An optimum
    therefore exists even if a threshold separates correct from wrong words perfectly.
    """
    confidences, right = found
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    aims = np.where(right, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))
    clipped = confidences.clip(_SMALLEST, 1 - _SMALLEST)
    odds = np.stack([np.log(clipped / (1 - clipped)), np.ones(len(right))])

    def loss(weights: npt.NDArray[np.float64]) -> float:
        guess = weights @ odds
        return float((np.logaddexp(0, guess) - aims * guess).mean())

    scale, bias = minimize(loss, (1.0, 0.0)).x
    return float(scale), float(bias)


def write_calibration(bundle: Path, scale: float, bias: float) -> Calibration:
    """Apply a further scale (above 0) and bias after a bundle's calibration. Write and return both as one."""
    before = Bundle.open(bundle, verify=False).manifest.calibration or Calibration()
    found = Calibration(scale=round(scale * before.scale, 3), bias=round(bias + scale * before.bias, 3))
    file = bundle / MANIFEST_FILE
    content = {**json.loads(file.read_text(encoding="utf-8")), "calibration": dataclasses.asdict(found)}
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return found


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a row for each set, and the bins and statistics of all sets together."""
    sets, bins, every = [], [], results["sets"][ALL]
    for name, found in results["sets"].items():
        shares = [f"{found[key] or 0:.1%}" for key in ("right", "confidence", "expected_error")]
        sets.append((name, found["num_words"], *shares, "" if found["area"] is None else f"{found['area']:.2f}"))
    for item in every["bins"]:
        shares = [f"{item[key]:.1%}" for key in ("confidence", "right")]
        bins.append((f"{item['from']:.0%} to {item['to']:.0%}", item["num_words"], *shares))
    return {
        "table": table(("set", "words", "right", "mean confidence", "expected error", "area"), sets),
        "bins": table(("confidence", "words", "mean confidence", "right"), bins),
        "error": f"{every['expected_error']:.1%}", "area": f"{every['area'] or 0:.2f}",
        "words": str(every["num_words"]), "right": f"{every['right'] or 0:.0%}",
    }  # fmt: skip


@script
def main(argv: Sequence[str] | None = None) -> None:
    parser = recognition_parser("calibration", __doc__)
    about = "fit a calibration to these recordings, and write it into the bundle"
    parser.add_argument("--fit", action="store_true", help=about)
    args = parser.parse_args(argv)
    recognizer = Recognizer.from_pretrained(args.bundle)
    sets = {file.stem: recognise(recognizer, read_recordings(file)) for file in args.lists}
    confidences, right = zip(*sets.values(), strict=True)
    sets[ALL] = np.concatenate(confidences), np.concatenate(right)
    if args.fit:
        written = write_calibration(args.bundle, *fit(sets[ALL]))
        print(f"{args.bundle}: calibration written: scale {written.scale}, bias {written.bias}")
    else:
        found = {name: reliability(own) for name, own in sets.items()}
        publish(args.results, {"sets": found}, values, bundle=args.bundle)
