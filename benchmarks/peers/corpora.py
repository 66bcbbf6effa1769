"""A corpus by `u2moe corpus`, by a loop, on Ray and by other recognisers: hours of audio for each hour of a core.

    python -m u2moe.benchmarks.peers.corpora WORK [--output FILE]     about five minutes; Ray if it is installed

All get the same files, short parts of the bundled clips, and write what they recognise. Processes of one core are
pinned to one; cases take turns in rounds. Other recognisers get as many of the files as fit into their time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.instruments.statistics import Spread
from u2moe.benchmarks.peers.process import PeerError, PeerProcess, write_wav
from u2moe.benchmarks.peers.systems import PEERS, environments, single_core
from u2moe.benchmarks.results.files import read_json, repository, results_file
from u2moe.benchmarks.results.markdown import quartiles, short, table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.manifests import read_utterances
from u2moe.runtime.corpus.model_choice import ModelChoice
from u2moe.runtime.corpus.runner import CorpusOptions, RunProgress, run_corpus
from u2moe.runtime.corpus.sources import Sources
from u2moe.runtime.recognizer import DEMO_FOLDER

RATE = 16_000
BLOCK_SIZE = 50
"""Small, so that two workers end together in a corpus of a thousand files."""
CASES = {"loop": 1, "one": 1, "two": 2, "ray-one": 1, "ray-two": 2}
"""Cases of ours, with the number of cores."""
OTHERS = {
    "whisper-tiny": ("faster-whisper-batched", "Whisper tiny.en int8, faster-whisper's batched pipeline"),
    "moonshine": ("moonshine", "Moonshine tiny-en, a plain loop"),
}
"""Peers of `systems` with the engine to use for a corpus."""
_QUIET = 0.2
"""Cores that may be busy with the system's own work."""
_AUDIO_RATE_MB = 16_000 * 2 * 3600 / 1e6
"""Megabytes of an hour of 16 kHz audio, not compressed."""


def make_corpus(folder: Path, num_files: int) -> Path:
    """Parts of the bundled clips, one to four seconds long where these are, and a list of them."""
    rng = np.random.default_rng(0)
    clips = [read_audio(clip, RATE) for clip in sorted((DEMO_FOLDER / "clips").glob("*.flac"))]
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "list"
    lines = []
    for number in range(num_files):
        clip = np.concatenate([clips[index] for index in rng.permutation(len(clips))])
        length = int(rng.uniform(1, 4) * RATE)
        start = int(rng.integers(len(clip) - length))
        file = folder / f"{number:05}.wav"
        lines.append(f"{file.name}\n")
        write_wav(file, clip[start : start + length] * np.float32(rng.uniform(0.3, 1)), RATE)
    manifest.write_text("".join(lines), encoding="utf-8")
    return manifest


def run_case(name: str, manifest: Path, output: Path) -> dict[str, Any]:
    """Run a case of ours in this process; the time is that of recognition, without loading."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, usable(CASES[name]))
    begin = time.perf_counter()
    if name == "loop":
        found = _loop(manifest, output)
    else:
        memory: list[float] = []
        options = CorpusOptions(block_size=BLOCK_SIZE, num_workers=CASES[name])
        progress = _runner(name)(manifest, output, ModelChoice(), options, on_progress=partial(_look, memory))
        found = {"seconds": progress.elapsed_s, "audio_s": progress.seconds, "failed": progress.num_failed}
        if memory:
            found["private_mb"] = max(memory)
    return {**found, "whole_s": time.perf_counter() - begin}


def usable(count: int) -> list[int]:
    """The last cores that may be used."""
    return sorted(os.sched_getaffinity(0))[-count:]


def _loop(manifest: Path, output: Path) -> dict[str, Any]:
    recognizer = ModelChoice().load()
    begin, audio_s = time.perf_counter(), 0.0
    output.mkdir(parents=True)
    with (output / "texts.jsonl").open("w", encoding="utf-8") as lines:
        for utterance in read_utterances(manifest):
            transcript = recognizer.transcribe(str(utterance.source))
            audio_s += transcript.duration
            lines.write(json.dumps({"key": utterance.key, "text": transcript.text}) + "\n")
    return {"seconds": time.perf_counter() - begin, "audio_s": audio_s, "failed": 0}


def _runner(name: str) -> Callable[..., RunProgress]:
    if not name.startswith("ray"):
        return run_corpus
    from u2moe.runtime.corpus.ray import run_on_ray  # noqa: PLC0415 - an extra

    return partial(run_on_ray, address="local")


def _look(memory: list[float], progress: RunProgress) -> None:
    """Note the memory that the workers share with no other process, once they have worked for a while."""
    if progress.num_recognized and not memory:
        this = os.getpid()
        children = Path(f"/proc/{this}/task/{this}/children")
        if children.exists():
            memory += [_private_mb(int(child)) for child in children.read_text(encoding="ascii").split()]


def _private_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


def measure_ours(work: Path, manifest: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The cases in turns, each in a process of its own; Ray's once."""
    cases = [name for name in CASES if not name.startswith("ray")] * rounds
    if find_spec("ray"):
        cases += ["ray-one", "ray-two"]
    found: dict[str, list[dict[str, Any]]] = {}
    for number, name in enumerate(cases):
        output = work / f"out-{number}"
        shutil.rmtree(output, ignore_errors=True)
        command = [*(sys.executable, "-m", "u2moe.benchmarks.peers.corpora"), str(work), "--case", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(  # noqa: S603 - what is run is ours
            [*command, "--manifest", str(manifest), "--out", str(output)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
        report(f"{name}: {found[name][-1]['seconds']:.1f} s")
    return found


def measure_others(work: Path, manifest: Path, budget_s: float) -> dict[str, dict[str, Any]]:
    """Other recognisers on one core, each for as long as `budget_s`; what cannot be had is named with the reason."""
    found: dict[str, dict[str, Any]] = {}
    for name, (engine, title) in OTHERS.items():
        try:
            python = environments([name], work, repository(), report)[name].python
            with single_core(), PeerProcess(engine, dict(PEERS[name].options), python=python) as process:
                found[name] = _recognise(process, manifest, budget_s)
                found[name]["versions"] = process.started["versions"]
        except (PeerError, RuntimeError) as error:
            found[name] = {"error": str(error)[:300]}
        report(f"{title}: {found[name]}")
    return found


def _recognise(process: PeerProcess, manifest: Path, budget_s: float) -> dict[str, Any]:
    files = [Path(str(utterance.source)) for utterance in read_utterances(manifest)]
    process.recognise(files[0], portion_s=1e6)  # warms up
    num_files, audio_s, seconds = 0, 0.0, 0.0
    for file in files:
        reply = process.recognise(file, portion_s=1e6)
        num_files, audio_s, seconds = num_files + 1, audio_s + reply["audio_s"], seconds + reply["compute_s"]
        if seconds > budget_s:
            break
    return {"num_files": num_files, "audio_s": audio_s, "seconds": seconds}


def line_s() -> float:
    """Core-seconds that a line of a manifest takes, from what `endurance.long_manifest` measured."""
    found = read_json(results_file("long_manifest"))
    return float(found["hash_and_count_s"] + found["read_s"]) / float(found["num_lines"])


def moe_1b() -> dict[str, float]:
    """Core-seconds for each second of audio of MoE-1B, int8, both passes, from the measurements at full size."""
    cells = read_json(results_file("full_size"))["cells"]
    encoder, second = (
        Spread.of(cells[f"int8/1/{mode}"]["moe-1b"]["seconds"]).median for mode in ("full", "second-pass")
    )
    return {"encoder": encoder / 10, "second_pass": second / 10}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: speeds, ratios, and what a million hours take."""
    ours, others = results["ours"], results["others"]
    audio_s = ours["one"][0]["audio_s"]
    spreads = {name: Spread.of([item["seconds"] for item in items]) for name, items in ours.items()}
    paired = list(zip(ours["loop"], ours["one"], ours["two"], strict=True))
    scaling = Spread.of([one["seconds"] / two["seconds"] for _, one, two in paired])
    ratio = Spread.of([one["seconds"] / loop["seconds"] for loop, one, _ in paired])
    rates = {"demo": spreads["one"].median / audio_s, "moe-1b": sum(results["moe_1b"].values())}
    return {
        "table": _table(ours, others, spreads),
        "size": f"{results['num_files']} files, {audio_s / 60:.0f} minutes of audio",
        "scaling": quartiles(scaling),
        "ratio": quartiles(ratio),
        "private_mb": f"{max(item.get('private_mb', 0) for item in ours['two']):.0f}",
        "busy": _busy(results["others_cores"]),
        "million": _million(rates, results["line_s"]),
        "hours_per_core_hour": f"{1 / rates['demo']:.0f}",
    }


def others_cores(seconds: float = 3.0) -> float:
    """Cores that other programs keep busy while this one sleeps; 0 except on Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    ticks = []
    for pause in (seconds, 0.0):
        words = [int(word) for word in stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        ticks.append(sum(words) - words[3] - words[4])  # without idle and waiting for disks
        time.sleep(pause)
    return (ticks[1] - ticks[0]) / os.sysconf("SC_CLK_TCK") / seconds


def _busy(cores: float) -> str:
    """What the page says of other programs."""
    if cores < _QUIET:
        return "Nothing else used the machine."
    return f"**Other programs kept {cores:.1f} cores busy: these times and ratios are not to be relied on.**"


def _table(
    ours: Mapping[str, Sequence[Mapping[str, Any]]], others: Mapping[str, Any], spreads: Mapping[str, Spread]
) -> str:
    titles = {
        "loop": "u2moe, `transcribe` in a loop",
        "one": "`u2moe corpus`, 1 worker",
        "two": "`u2moe corpus`, 2 workers",
        "ray-one": "`u2moe corpus --ray`, 1 actor",
        "ray-two": "`u2moe corpus --ray`, 2 actors",
    }
    rows: list[tuple[str, ...]] = []
    for name, items in ours.items():
        audio_s, cores = items[0]["audio_s"], CASES[name]
        seconds, whole = spreads[name], Spread.of([item["whole_s"] for item in items]).median
        rate = short(audio_s / seconds.median / cores)
        rows.append((titles[name], "all", quartiles(seconds, 1), f"{whole:.1f}", rate))
    for name, item in others.items():
        title = OTHERS[name][1]
        if "error" in item:
            rows.append((f"{title}: could not be had ({item['error'][:80]})", "", "", "", ""))
            continue
        rate = short(item["audio_s"] / item["seconds"])
        rows.append((title, f"first {item['num_files']}", f"{item['seconds']:.1f}", "", rate))
    return table(("", "files", "seconds", "with loading", "hours of audio per core-hour"), rows)


def _million(rates: Mapping[str, float], line_s: float) -> str:
    """What a million hours in utterances of five seconds take."""
    hours, utterance_s, block = 1e6, 5.0, 256
    num = hours * 3600 / utterance_s
    costs: dict[str, Callable[[float], float]] = {
        "core-hours for 1000 hours of audio": lambda rate: 1000 * rate,
        "core-years for a million hours": lambda rate: hours * rate / 8766,
        "days on 1000 cores": lambda rate: hours * rate / 1000 / 24,
        "uncompressed audio read by 1000 cores, MB/s": lambda rate: 1000 / rate * _AUDIO_RATE_MB / 3600,
        "files opened each second by 1000 cores": lambda rate: 1000 / rate / utterance_s,
        f"a block of {block} takes, s": lambda rate: block * utterance_s * rate,
        "blocks written each second by 1000 cores": lambda rate: 1000 / rate / utterance_s / block,
        f"a machine reads {num / 1e6:.0f} million lines in, hours": lambda _: num * line_s / 3600,
    }
    rows = [(name, *(short(cost(rate)) for rate in rates.values())) for name, cost in costs.items()]
    return table(("", "demo model, int8", "MoE-1B, int8"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print."""
    parser = script_parser("peers.corpora", __doc__)
    parser.add_argument("work", type=Path, help="folder for environments, corpus and results")
    parser.add_argument("--files", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--budget", type=float, default=45, metavar="S", help="seconds for each other recogniser (45)")
    parser.add_argument("--make", action="store_true", help="create corpus and environments, and measure nothing")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--case", choices=CASES, help="run this case alone")
    parser.add_argument("--manifest", type=Path, help="of the case")
    parser.add_argument("--out", type=Path, help="folder for the results of the case")
    args = parser.parse_args(argv)
    if args.case:
        print(json.dumps(run_case(args.case, args.manifest, args.out)))
        return 0
    manifest = args.work / "corpus" / "list"
    if not manifest.exists() or len(manifest.read_text(encoding="utf-8").splitlines()) != args.files:
        make_corpus(manifest.parent, args.files)
    if args.make:
        environments(list(OTHERS), args.work, repository(), report)
        return 0
    with Sources() as sources:  # the files are in the page cache for all
        for utterance in read_utterances(manifest):
            for _ in sources.read_blocks(utterance, RATE):
                pass
    found = {
        "others_cores": others_cores(),
        "num_files": args.files,
        "ours": measure_ours(args.work, manifest, args.rounds),
        "others": measure_others(args.work, manifest, args.budget),
        "line_s": line_s(),
        "moe_1b": moe_1b(),
    }
    publish(DEMO_FOLDER, found, values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
