"""Processor time of the first pass with and without a language model, in turns.

    python -m u2moe.benchmarks.studies.language_model_cost BUNDLE LIST.tsv --model FILE ...

The recordings are encoded once. "cold" is the first time that a recogniser meets a recording with this model; "warm" is
a later time, when its scores are still in its memory.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.runtime import Bundle, Fusion, LanguageModel, LanguageModelOptions, PrefixBeamSearch
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.model.features import fbank
from u2moe.runtime.text.word_errors import read_manifest

LIMIT = 1.5
MILLION = 1_000_000
_CHUNK = 16
_BEAM_SIZE = 10


def search(log_probs: Sequence[npt.NDArray[np.float32]], blank: int, fusion: Fusion | None) -> float:
    """Processor seconds of the searches of all recordings, chunk by chunk."""
    start = time.thread_time()
    for rows in log_probs:
        found = PrefixBeamSearch(_BEAM_SIZE, blank, None, fusion)
        for begin in range(0, len(rows), _CHUNK):
            found.advance(rows[begin : begin + _CHUNK])
        found.finish()
        found.hypotheses()
    return time.thread_time() - start


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each model, and the medians of its times of the search without one."""
    rows = [
        (
            name, f"{sum(found['num_ngrams']):,}", f"{found['num_bytes'] / 1e6:.1f} MB", f"{found['load_s']:.1f} s",
            quartiles(Spread.of(found["cold"])), quartiles(Spread.of(found["warm"])),
        )
        for name, found in results["models"].items()
    ]  # fmt: skip
    header = ("model", "n-grams", "file", "time to load", "search time, cold, times without", "warm, times without")
    share = np.median(results["seconds"]) / results["audio_s"]
    medians = {
        f"{state}.{name}": f"{np.median(found[state]):.1f}"
        for name, found in results["models"].items()
        for state in ("cold", "warm")
    }
    return {"table": table(header, rows), "share": f"{share:.3%}", "beam_size": str(_BEAM_SIZE), **medians}


def targets(results: Mapping[str, Any]) -> list[Target]:
    """The limit on the time of the search with a million n-grams, cold and warm."""
    large = {name: found for name, found in results["models"].items() if sum(found["num_ngrams"]) >= MILLION}
    return [
        Target(
            name=f"search with a language model, {state}, {name} ({sum(found['num_ngrams']) / MILLION:.1f} M n-grams)",
            found=Spread.of(found[state]), limit=LIMIT, at_most=True, unit=" times the search without",
        )
        for name, found in large.items()
        for state in ("cold", "warm")
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("studies.language_model_cost", __doc__)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("manifest", type=Path, help="list of recordings: path<TAB>transcript")
    parser.add_argument("--model", type=Path, action="append", required=True, metavar="FILE", help="a language model")
    parser.add_argument("--weight", type=float, default=0.3, help="default: 0.3")
    parser.add_argument("--word-bonus", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    bundle = Bundle.open(args.bundle)
    model, features = bundle.load(), bundle.manifest.features
    log_probs, audio_s = [], 0.0
    for recording in read_manifest(args.manifest):
        samples = read_audio(recording.path, features.sample_rate)
        log_probs.append(model.ctc(model.encode(fbank(samples, features))))
        audio_s += len(samples) / features.sample_rate
    report(f"{len(log_probs)} recordings, {audio_s:.0f} s")
    blank = model.config.blank
    found: dict[str, Any] = {"audio_s": audio_s, "seconds": [], "models": {}, "weight": args.weight}
    for path in args.model:
        start = time.thread_time()
        options = LanguageModelOptions(model=LanguageModel.open(path), weight=args.weight, word_bonus=args.word_bonus)
        Fusion(options, bundle.vocabulary)
        load_s = time.thread_time() - start
        cold, warm = [], []
        search(log_probs, blank, None)
        for _ in range(args.rounds):
            without = search(log_probs, blank, None)
            fusion = Fusion(options, bundle.vocabulary)
            cold.append(search(log_probs, blank, fusion) / without)
            warm.append(search(log_probs, blank, fusion) / without)
            found["seconds"].append(without)
        ngrams = options.model.ngrams
        found["models"][path.stem] = {
            "num_ngrams": ngrams.num_ngrams, "num_bytes": path.stat().st_size, "load_s": load_s, "cold": cold,
            "warm": warm,
        }  # fmt: skip
        report(f"{path.stem}: cold {np.median(cold):.2f}, warm {np.median(warm):.2f}")
    publish(args.bundle, found, values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
