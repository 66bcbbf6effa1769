"""What number formats cost in words: word errors of several bundles of one model on the same recordings.

    python -m u2moe.benchmarks.studies.formats int8=FOLDER int4=FOLDER ... --list SET.tsv ... [--results FILE]

Manifests are lines of "path TAB transcript". All bundles are compared with the first one. How much of a difference is
chance is told by drawing recordings again and again, the same ones for both (paired bootstrap).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.instruments.statistics import Spread, ratio_of_sums
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import of_bundle, publish
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.native_texts import MODES
from u2moe.benchmarks.studies.shared.script import named, report, run_script, script_parser
from u2moe.runtime import Recognizer
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.text.word_errors import WordErrors

INT8, CALIBRATED = "int8", "int4, calibrated"
LIMIT = 0.5
"""Percent more word errors that experts in int4 may make than those in int8."""

Errors = npt.NDArray[np.int64]


def count(
    folder: Path, sets: Mapping[str, Sequence[Recording]], progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Word errors of a bundle in each recording, by mode and set, and the numbers of words by set.

    Returns:
        bundle: see `of_bundle`; errors: for each mode of `MODES` and each set, of each recording; words: for each set,
        of each recording.
    """
    recognizer = Recognizer.from_pretrained(folder)
    rate = recognizer.bundle.manifest.features.sample_rate
    errors: dict[str, dict[str, list[int]]] = {mode: {name: [] for name in sets} for mode in MODES}
    num_words: dict[str, list[int]] = {name: [] for name in sets}
    for name, recordings in sets.items():
        progress(f"{folder.name}: {name}")
        for recording in recordings:
            samples = read_audio(recording.path, rate)
            for mode, options in MODES.items():
                found = WordErrors()
                found.add(recording.transcript, recognizer.transcribe(samples, options=options).text)
                errors[mode][name].append(found.num_errors)
            num_words[name].append(found.num_words)
    return {**of_bundle(folder), "errors": errors, "words": num_words}


def _all(bundle: Mapping[str, Any], mode: str) -> Errors:
    """Errors of a bundle in all recordings."""
    return np.concatenate([np.array(own, np.int64) for own in bundle["errors"][mode].values()])


def _compared(results: Mapping[str, Any], name: str, mode: str) -> Spread:
    """The errors of a bundle over those of the first one."""
    bundles = results["bundles"]
    return ratio_of_sums(_all(bundles[name], mode), _all(next(iter(bundles.values())), mode))


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """What experts in int4 may cost, if the first bundle is in int8."""
    mode = next(iter(MODES))
    if {INT8, CALIBRATED} <= results["bundles"].keys():
        name = f"more word errors of the demo model with experts in {CALIBRATED}, than in {INT8}, second pass, {mode}"
        found = 100 * (_compared(results, CALIBRATED, mode).median - 1)
        yield Target(name=name, found=found, limit=LIMIT, at_most=True, unit=" %")


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each bundle and mode, and one value for each in full context."""
    bundles = results["bundles"]
    first = next(iter(bundles.values()))
    sets = list(first["words"])
    totals = {name: sum(first["words"][name]) for name in sets}
    rows: list[tuple[object, ...]] = []
    shown: dict[str, str] = {}
    for mode in MODES:
        for name, bundle in bundles.items():
            rates = [f"{sum(bundle['errors'][mode][own]) / totals[own]:.2%}" for own in sets]
            errors = int(_all(bundle, mode).sum())
            cost = ""
            if bundle is not first:
                found = _compared(results, name, mode)
                cost = f"{found.median - 1:+.1%} ({found.low - 1:+.1%} to {found.high - 1:+.1%})"
                shown.setdefault(re.sub(r"\W+", "_", name), cost)
            rows.append((mode, name, *rates, errors, cost))
    header = ("context", "bundle", *(f"{name} ({totals[name]})" for name in sets), "errors", "cost (95 % interval)")
    num_recordings = sum(len(own) for own in first["words"].values())
    counts = {"recordings": str(num_recordings), "words": str(sum(totals.values()))}
    return {"table": table(header, rows, left=2), **counts, **shown}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.formats", __doc__)
    parser.add_argument("bundles", nargs="+", type=named, metavar="NAME=FOLDER", help="the first is the reference")
    parser.add_argument("--list", nargs="+", type=Path, required=True, help="lines of path<TAB>transcript")
    parser.add_argument("--results", type=Path, metavar="JSON", help="file for the results")
    args = parser.parse_args(arguments)
    sets = {manifest.stem: read_recordings(manifest) for manifest in args.list}
    bundles = {name: count(Path(folder), sets, report) for name, folder in args.bundles}
    publish(None, {"bundles": bundles}, values, args.results)


if __name__ == "__main__":
    run_script(main)
