"""What does a corpus cost? `u2moe corpus` with one worker and two beside `transcribe` in a loop, and on Ray.

    python -m u2moe.benchmarks.studies.corpora WORK [--output FILE]

All get the same files, short parts of the bundled clips, and write what they recognise. Processes of one core are
pinned to one; cases take turns in rounds, each in a process of its own. Ray takes part if it is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.instruments.statistics import Spread, ratios
from u2moe.benchmarks.results.markdown import quartiles, short, table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.studies.shared.process import write_wav
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.runtime.audio.folders import find_audio
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_utterances
from u2moe.runtime.corpus.model_choice import ModelChoice
from u2moe.runtime.corpus.runner import CorpusOptions, run_corpus
from u2moe.runtime.places import DEMO_FOLDER

RATE = 16_000
BLOCK_SIZE = 50
"""Small, so that two workers end together in a corpus of a thousand files."""
CASES = {
    "loop": ("u2moe, `transcribe` in a loop", 1),
    "one": ("`u2moe corpus`, 1 worker", 1),
    "two": ("`u2moe corpus`, 2 workers", 2),
    "ray-one": ("`u2moe corpus --ray`, 1 actor", 1),
    "ray-two": ("`u2moe corpus --ray`, 2 actors", 2),
}
"""Title and number of cores of each case."""


def make_corpus(folder: Path, num_files: int) -> Path:
    """Parts of the bundled clips, one to four seconds long, and a list of them."""
    rng = np.random.default_rng(0)
    clips = [read_audio(clip, RATE) for clip in find_audio([DEMO_FOLDER / "clips"])]
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:05}.wav" for number in range(num_files)]
    for name in names:
        clip = np.concatenate([clips[index] for index in rng.permutation(len(clips))])
        length = int(rng.uniform(1, 4) * RATE)
        start = int(rng.integers(len(clip) - length))
        write_wav(folder / name, clip[start : start + length] * np.float32(rng.uniform(0.3, 1)), RATE)
    (folder / "list").write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder / "list"


def run_case(name: str, list_path: Path, output: Path) -> dict[str, Any]:
    """Run a case in this process; `seconds` are those of recognition, `whole_s` those with loading."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-CASES[name][1] :])
    begin = time.perf_counter()
    if name == "loop":
        found = _loop(list_path, output)
    else:
        options = CorpusOptions(block_size=BLOCK_SIZE, num_workers=CASES[name][1])
        run = run_corpus
        if name.startswith("ray"):
            from u2moe.runtime.corpus.ray import run_on_ray  # noqa: PLC0415 - an extra

            run = partial(run_on_ray, address="local")
        progress = run(list_path, output, ModelChoice(), options)
        found = {"seconds": progress.elapsed_s, "audio_s": progress.seconds, "failed": progress.num_failed}
    return {**found, "whole_s": time.perf_counter() - begin}


def _loop(list_path: Path, output: Path) -> dict[str, Any]:
    recognizer = ModelChoice().load()
    begin, audio_s = time.perf_counter(), 0.0
    output.mkdir(parents=True)
    with (output / "texts.jsonl").open("w", encoding="utf-8") as lines:
        for utterance in read_utterances(list_path):
            transcript = recognizer.transcribe(str(utterance.source))
            audio_s += transcript.duration
            lines.write(json.dumps({"key": utterance.key, "text": transcript.text}) + "\n")
    return {"seconds": time.perf_counter() - begin, "audio_s": audio_s, "failed": 0}


def measure(work: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The cases in turns; Ray's once."""
    cases = [name for name in CASES if not name.startswith("ray")] * rounds
    if find_spec("ray"):
        cases += ["ray-one", "ray-two"]
    found: dict[str, list[dict[str, Any]]] = {}
    for number, name in enumerate(cases):
        output = work / f"out-{number}"
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "u2moe.benchmarks.studies.corpora", str(work), "--case", name, str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603
        found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
        report(f"{name}: {found[name][-1]['seconds']:.1f} s")
    return found


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each case, and ratios of rounds."""
    cases, rows = results["cases"], []
    seconds = {name: [item["seconds"] for item in items] for name, items in cases.items()}
    for name, items in cases.items():
        title, cores = CASES[name]
        whole = Spread.of([item["whole_s"] for item in items]).median
        rate = short(items[0]["audio_s"] / Spread.of(seconds[name]).median / cores)
        rows.append((title, quartiles(Spread.of(seconds[name]), 1), f"{whole:.1f}", rate))
    return {
        "table": table(("", "seconds", "with loading", "hours of audio per core-hour"), rows),
        "size": f"{results['num_files']} files, {cases['one'][0]['audio_s'] / 60:.0f} minutes of audio",
        "scaling": quartiles(ratios(seconds["one"], seconds["two"])),
        "ratio": quartiles(ratios(seconds["one"], seconds["loop"])),
        "hours_per_core_hour": rows[1][-1],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = script_parser("studies.corpora", __doc__)
    parser.add_argument("work", type=Path, help="folder for corpus and results")
    parser.add_argument("--files", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--case", nargs=2, metavar=("NAME", "FOLDER"), help="run a single case, with results in FOLDER")
    args = parser.parse_args(argv)
    list_path = args.work / "corpus" / "list"
    if args.case:
        print(json.dumps(run_case(args.case[0], list_path, Path(args.case[1]))))
        return 0
    make_corpus(list_path.parent, args.files)
    found = {"num_files": args.files, "cases": measure(args.work, args.rounds)}
    publish(DEMO_FOLDER, found, values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
