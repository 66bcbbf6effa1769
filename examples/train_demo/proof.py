"""Compares a mixture of experts with its dense twin on every test set: word errors, real-time factors, bytes.

    python proof.py exp/mixture exp/dense

Both are exported, quantized and measured in the same way. Differences have 95 % intervals over utterances (paired
bootstrap). It is an error if the two took different numbers of steps. Real-time factors are processor time on one
thread. Both recognise each recording in turn, and the fastest of several rounds counts.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
from evaluate import Listener, hear_set, scores
from release import PADDING_S

from u2moe.benchmarks.instruments.statistics import interleaved, ratio_of_sums
from u2moe.benchmarks.results.files import measured_here, write_json
from u2moe.runtime import Bundle
from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.text.word_errors import edit_distance, words

HERE = Path(__file__).parent
PRECISIONS = ("float32", "int8")
CONDITIONS = ("full attention_rescoring", "16 attention_rescoring")
NUM_TIMED, NUM_ROUNDS = 20, 3
"""Number of recordings that are timed, and number of rounds of timing."""

Counts = Sequence[tuple[int, int]]
"""Numbers of errors and of words for every utterance."""


def counts(content: dict[str, Any], condition: str) -> Counts:
    """Return the numbers of errors and words for every recording in a result of `evaluate.hear_set`."""
    found = []
    for recording in content["recordings"]:
        reference = words(recording["transcript"])
        text = next(heard["text"] for heard in recording["heard"] if heard["condition"] == condition)
        found.append((edit_distance(reference, words(text)), len(reference)))
    return found


def difference(one: Counts, other: Counts) -> dict[str, Any]:
    """Return the word error rate of `one` minus that of `other` on the same utterances, with its interval."""
    more = [found - reference for (found, _), (reference, _) in zip(one, other, strict=True)]
    rate = ratio_of_sums(more, [length for _, length in one])
    return {"difference": round(rate.median, 6), "interval": [round(rate.low, 6), round(rate.high, 6)]}


def make_bundles(run: Path, work_dir: Path, folder: Path) -> dict[str, Path]:
    """Export and quantize a run's last checkpoint. Return the bundles by precision."""
    wenet = folder / "wenet"

    def call(*arguments: str | Path) -> None:
        subprocess.run([sys.executable, *map(str, arguments)], check=True)

    call(HERE / "wenet.py", "--work-dir", work_dir, "--name", run.name, "--output", wenet)
    call("-m", "u2moe", "export", wenet, folder / "float32", "--padding", str(PADDING_S), "--overwrite")
    call("-m", "u2moe", "quantize", folder / "float32", folder / "int8", "--no-report", "--overwrite")
    return {name: folder / name for name in PRECISIONS}


def real_time_factors(bundles: dict[str, Path], recordings: list[Path]) -> dict[str, dict[str, float]]:
    """Return the real-time factors of each bundle by condition."""
    listeners = {name: Listener(path) for name, path in bundles.items()}
    total = {name: dict.fromkeys(CONDITIONS, 0.0) for name in bundles}
    audio_s = 0.0

    def timed(name: str, samples: Samples) -> dict[str, float]:
        return {heard.condition: heard.cpu_s for heard in listeners[name].hear(samples)}

    for path in recordings:
        samples = read_audio(path, 16000)
        audio_s += len(samples) / 16000
        cases = {name: lambda name=name, samples=samples: timed(name, samples) for name in listeners}
        for name, rounds in interleaved(cases, NUM_ROUNDS).items():
            for condition in CONDITIONS:
                total[name][condition] += min(found[condition] for found in rounds)
    return {name: {key: round(cpu_s / audio_s, 5) for key, cpu_s in own.items()} for name, own in total.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mixture", type=Path, help="folder of the run, below the work directory")
    parser.add_argument("dense", type=Path, help="folder of its twin, beside it")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    args = parser.parse_args()
    runs = {"mixture": args.mixture.resolve(), "dense": args.dense.resolve()}
    work_dir = runs["dense"].parent
    progress = {name: checkpoints.load(checkpoints.all_of(run)[-1])["progress"] for name, run in runs.items()}
    if progress["mixture"]["step"] != progress["dense"]["step"]:
        steps = ", ".join(f"{name} {own['step']}" for name, own in progress.items())
        sys.exit(f"twins must have the same number of steps, got {steps}")
    bundles = {
        f"{name} {precision}": path
        for name, run in runs.items()
        for precision, path in make_bundles(run, work_dir, work_dir / "proof" / name).items()
    }
    results: dict[str, Any] = {
        **measured_here(),
        "step": progress["dense"]["step"],
        "hours": {name: round(own["seconds"] / 3600, 2) for name, own in progress.items()},
        "bytes": {
            name: sum(file.size for file in Bundle.open(path).manifest.files.values()) for name, path in bundles.items()
        },
        "sets": {},
    }
    for manifest in sorted((work_dir / "test").glob("*.tsv")):
        heard = {
            name: hear_set(path, manifest, work_dir / "proof" / f"{manifest.stem}-{name.replace(' ', '-')}.json")
            for name, path in bundles.items()
        }
        own: dict[str, Any] = {name: scores(content) for name, content in heard.items()}
        own["difference"] = {
            precision: {
                condition: difference(*(counts(heard[f"{name} {precision}"], condition) for name in runs))
                for condition in CONDITIONS
            }
            for precision in PRECISIONS
        }
        results["sets"][manifest.stem] = own
        print(manifest.stem, own["difference"], flush=True)
    timed = [recording.path for recording in read_recordings(work_dir / "dev" / "queen-dev.tsv")[:NUM_TIMED]]
    results["rtf"] = real_time_factors(bundles, timed)
    write_json(args.output / "proof.json", results)


if __name__ == "__main__":
    main()
