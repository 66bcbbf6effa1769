"""Do Python, Node, WebAssembly and C++ give the same results? How fast are they, and how much memory do they use?

    python -m u2moe.benchmarks.studies.runtimes --bundle float32=FP32 --bundle int8=INT8 [--list TEST.tsv ...]
        [--first N] [--cpp build/cpp/u2moe_transcribe]
    python -m u2moe.benchmarks.studies.runtimes --speed [--cpp ...] [--sherpa ENV/bin/sherpa-onnx]

docs/results/runtimes.md explains the method. Run `npm ci --ignore-scripts` in examples/browser first. For --sherpa,
install sherpa-onnx-bin from PyPI in the environment ENV. Recordings are the clips of the demo model and, except with
--speed, the first N of each list.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.statistics import interleaved, show_progress
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS
from u2moe.benchmarks.results.files import measured, of_bundle, publish, repository
from u2moe.benchmarks.results.markdown import Target, table
from u2moe.benchmarks.studies.shared.programs import Line, Program, engine, sherpa_graphs, sherpa_lines, write_wav
from u2moe.benchmarks.studies.shared.script import named, script, study_parser
from u2moe.export.profiles.conversion import convert_bundle
from u2moe.export.sherpa import ONLINE
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.corpus.lists import read_recordings

RATE = 16_000
CLIPS = DEMO_FOLDER / "clips" / "transcripts.txt"
PYTHON, NODE, WEB, CPP = "Python", "Node, onnxruntime-node", "Node, WebAssembly", "C++"
GREEDY, SHERPA = "C++, greedy", "sherpa-onnx's program, greedy"
ASPECTS = ("text", "tokens", "times", "words", "nbest")
REPETITIONS = 5
Found = list[list[Line]]  # segments of each recording, as in the programs' output


def programs(bundle: Path, cpp: str | None = None) -> dict[str, Program]:
    """Return the programs to run with a bundle, by name. `cpp` is the path of the C++ program; None: leave it out."""
    browser = repository() / "examples" / "browser"
    options = json.dumps({"chunkSize": CHUNK_SIZE, "numLeftChunks": NUM_LEFT_CHUNKS})
    node = ["node", "transcribe.mjs", "--json", "--options", options, "--runtime"]
    python = {"model": str(bundle), "chunk_size": CHUNK_SIZE, "num_left_chunks": NUM_LEFT_CHUNKS}
    more = ["--json", "--timing", "--left-chunks", str(NUM_LEFT_CHUNKS), str(bundle)]
    return {
        PYTHON: engine("u2moe", python, buffer_s=1.0),
        NODE: Program(command=[*node, "node", str(bundle.resolve())], folder=browser),
        WEB: Program(command=[*node, "web", str(bundle.resolve())], folder=browser),
        **({CPP: Program(command=[cpp, *more])} if cpp else {}),
    }


def segments_of(lines: Sequence[Line], files: Sequence[Path]) -> Found:
    """Return the segments of each file. Several of `lines` may belong to one file."""
    found: dict[str, list[Line]] = {str(file): [] for file in files}
    for line in lines:
        found[line["file"]] += line.get("segments", [line] if "tokens" in line else [])
    return list(found.values())


def compared(expected: Found, found: Found) -> dict[str, Any]:
    """Count recordings whose segments differ, by aspect. `score`: largest difference of scores of equal tokens."""
    counts, score = dict.fromkeys(ASPECTS, 0), 0.0
    for ours, theirs in zip(expected, found, strict=True):
        for aspect in ASPECTS:
            counts[aspect] += [_aspect(item, aspect) for item in ours] != [_aspect(item, aspect) for item in theirs]
        for one, other in zip(ours, theirs, strict=False):
            if one["tokens"] == other["tokens"]:
                score = max(score, abs(one["nbest"][0]["score"] - other["nbest"][0]["score"]))
    return {"num_recordings": len(expected), **counts, "score": round(score, 6)}


def _aspect(segment: Line, aspect: str) -> Any:
    keys = {"nbest": ["tokens"], "words": ["word", "start", "end"]}.get(aspect)
    return [[item[key] for key in keys] for item in segment[aspect]] if keys else segment[aspect]


def summary(rounds: Sequence[tuple[Sequence[Line], float]], num_files: int, seconds: float) -> dict[str, float]:
    """Return the medians `load` (seconds) and `rtf`, and the peak memory `mb`. A round runs all files twice."""
    timed = [[line for line in lines if "ms" in line] for lines, _ in rounds]
    for own in timed:
        if not own or len(own) != 2 * num_files:
            raise ValueError(f"a round needs {2 * num_files} lines with times, two per file, got {len(own)}")
    load_ms = statistics.median(own[0]["loadMs" if "loadMs" in own[0] else "load_ms"] for own in timed)
    factor = statistics.median(sum(line["ms"] for line in own[num_files:]) for own in timed) / 1000 / seconds
    return {"load": round(load_ms / 1000, 3), "rtf": round(factor, 5), "mb": round(max(mb for _, mb in rounds))}


def measure_same(
    bundles: Mapping[str, Path], lists: Sequence[Path], first: int | None, cpp: str | None
) -> dict[str, Any]:
    """Return how each runtime's results differ from Python's, by bundle; see `compared`."""
    recordings = read_recordings(CLIPS) + [item for path in lists for item in read_recordings(path)[:first]]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        audio = (read_audio(item.path, RATE) for item in recordings)
        files = [write_wav(Path(folder) / f"{number}.wav", samples, RATE) for number, samples in enumerate(audio)]
        for bundle, path in bundles.items():
            expected: Found = []
            for name, program in programs(path, cpp).items():
                show_progress(f"{bundle}, {name}")
                theirs = segments_of(program.run(files)[0], files)
                expected = expected or theirs
                found.setdefault(bundle, {})[name] = compared(expected, theirs)
    return {"bundles": {name: of_bundle(path)["bundle"] for name, path in bundles.items()}, "found": found}


def measure_speed(cpp: str | None, sherpa: str | None) -> dict[str, Any]:
    """Measure load time, real-time factor and peak memory of each runtime. `cpp` and `sherpa` are paths of programs."""
    clips = [read_audio(item.path, RATE) for item in read_recordings(CLIPS)]
    with tempfile.TemporaryDirectory() as folder:
        files = [write_wav(Path(folder) / f"{number}.wav", clip, RATE) for number, clip in enumerate(clips)]
        own = programs(DEMO_FOLDER, cpp)
        own[WEB] = programs(convert_bundle(DEMO_FOLDER, Path(folder) / "ort", "ort").path)[WEB]
        if sherpa:
            graphs = sherpa_graphs(DEMO_FOLDER, Path(folder) / "sherpa")
            files_of_it = f"--tokens={graphs}/tokens.txt", f"--wenet-ctc-model={graphs / ONLINE.file}"
            own[SHERPA] = Program(command=[sherpa, *files_of_it, "--num-threads=1"], read=sherpa_lines)
            if CPP in own:
                own[GREEDY] = Program(command=[*own[CPP].command, "--search", "ctc_greedy"])
        cases = {name: partial(program.run, [*files, *files]) for name, program in own.items()}
        runs = interleaved(cases, REPETITIONS, warm_up=0, title="runtimes")
    seconds = sum(map(len, clips)) / RATE
    return {"runtimes": {name: summary(rounds, len(clips), seconds) for name, rounds in runs.items()}}


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Yield the limits on the real-time factors of C++ and WebAssembly, and on the load time of C++."""
    speed = results["speed"]["runtimes"] if "speed" in results else {}
    if CPP in speed:
        ratio = speed[CPP]["rtf"] / speed[PYTHON]["rtf"]
        yield Target(name="demo model: real-time factor of C++ / Python", found=ratio, limit=0.8, at_most=True)
        yield Target(name="demo model in C++: load time", found=speed[CPP]["load"], limit=0.15, at_most=True, unit=" s")
    if WEB in speed:
        factor = speed[WEB]["rtf"]
        yield Target(name="demo model in WebAssembly: real-time factor", found=factor, limit=0.04, at_most=True)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages, such as a table of differences between runtimes, and one of times and memory."""
    shown: dict[str, str] = {}
    if same := results.get("same"):
        header, rows = ("bundle", "runtime", "recordings", "other text", *ASPECTS[1:-1], "n-best", "score"), []
        for bundle, runtimes in same["found"].items():
            shown[f"{bundle}.num_recordings"] = str(runtimes[PYTHON]["num_recordings"])
            shown[f"{bundle}.other_texts"] = str(max(item["text"] for item in runtimes.values()))
            for runtime, item in runtimes.items():
                counts = [item[aspect] for aspect in ("num_recordings", *ASPECTS)]
                rows.append((bundle, runtime, *counts, f"{item['score']:.4f}"))
        shown |= {"same.table": table(header, rows, left=2), "same.measured": measured(same)}
    if speed := results.get("speed"):
        columns, items = ("runtime", "load, s", "real-time factor", "peak memory, MB"), speed["runtimes"].items()
        times = [(name, f"{item['load']:.2f}", f"{item['rtf']:.4f}", f"{item['mb']:.0f}") for name, item in items]
        shown |= {"speed.table": table(columns, times), "speed.measured": measured(speed)}
        native = speed["machine"]["kernels"].startswith("u2moe-kernels")
        shown["speed.kernels"] = "native kernels" if native else "onnxruntime alone"
    return shown


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("runtimes", __doc__)
    parser.add_argument("--bundle", type=named, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--list", type=Path, action="append", default=[], help="list of recordings: path<TAB>text")
    parser.add_argument("--first", type=int, help="use only the first N recordings of each list (default: all)")
    parser.add_argument("--speed", action="store_true", help="measure times and memory")
    parser.add_argument("--cpp", metavar="PROGRAM", help="path of u2moe_transcribe from examples/cpp")
    parser.add_argument("--sherpa", metavar="PROGRAM", help="path of sherpa-onnx's streaming program")
    args = parser.parse_args(arguments)
    if args.bundle:
        bundles = {name: Path(folder) for name, folder in args.bundle}
        publish(args.results, measure_same(bundles, args.list, args.first, args.cpp), values, part="same")
    if args.speed:
        publish(args.results, measure_speed(args.cpp, args.sherpa), values, bundle=DEMO_FOLDER, part="speed")
