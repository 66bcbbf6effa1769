"""Do all runtimes recognise the same? Compared on recordings, for several bundles.

    python -m u2moe.benchmarks.studies.runtimes --bundle float32=FP32 --bundle int8=INT8 [--list TEST.tsv ...]
        [--first N] --cpp build/cpp/u2moe_transcribe [--cpp-aarch64 "qemu-aarch64 -L ROOT PROGRAM"] [--output FILE]

Needs `npm ci --ignore-scripts` in examples/browser, and Chromium. Without lists, the clips of the demo model are used;
with lists, the clips and the first N recordings of each. An emulated program gets the clips only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import of_bundle, publish
from u2moe.benchmarks.studies.shared import programs
from u2moe.benchmarks.studies.shared.programs import Found
from u2moe.benchmarks.studies.shared.python_program import Samples
from u2moe.benchmarks.studies.shared.script import named, report, run_script, script_parser
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.places import DEMO_FOLDER

CLIPS = DEMO_FOLDER / "clips" / "transcripts.txt"
ASPECTS = ("text", "tokens", "times", "words", "nbest")


def recordings_of(manifests: Sequence[Path], first: int | None, rate: int) -> list[Samples]:
    """The clips and the first recordings of each list, in 16 bits, as every runtime can read them."""
    items = read_recordings(CLIPS) + [item for manifest in manifests for item in read_recordings(manifest)[:first]]
    samples = (read_audio(item.path, rate) for item in items)
    return [np.clip(np.round(each * 32768), -32768, 32767).astype(np.int16) for each in samples]


def compared(expected: Found, found: Found) -> dict[str, Any]:
    """Differences of the segments of all recordings.

    Returns:
        `num_recordings`; by aspect, the number of recordings that differ in it; `score`: the largest difference between
        scores of the best hypothesis, where its tokens are equal.
    """
    counts = dict.fromkeys(ASPECTS, 0)
    score = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        for aspect in ASPECTS:
            counts[aspect] += [item[aspect] for item in ours] != [item[aspect] for item in theirs]
        for one, other in zip(ours, theirs, strict=False):
            if one["tokens"] == other["tokens"]:
                score = max(score, abs(one["score"] - other["score"]))
    return {"num_recordings": len(expected), **counts, "score": round(score, 6)}


def measure(
    bundles: Mapping[str, Path],
    recordings: Sequence[Samples],
    cpp: Mapping[str, str],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Compare the runtimes with Python.

    Args:
        bundles: folders by name.
        recordings: samples; the clips come first.
        cpp: commands of the C++ program by name; one that begins with "qemu" gets the clips only.
        progress: called with a line for each runtime.

    Returns:
        `bundles`: digests; `browser`: version; `found`: by bundle and runtime, see `compared`, with `clips`, the texts
        of the clips.
    """
    num_clips = len(read_recordings(CLIPS))
    found: dict[str, dict[str, Any]] = {}
    version = ""
    for name, bundle in bundles.items():
        with tempfile.TemporaryDirectory() as folder:
            files = programs.write_wav(Path(folder), recordings, 16_000)
            expected = programs.in_python(bundle, recordings)
            own = found.setdefault(name, {})

            def add(runtime: str, theirs: Found, own: dict[str, Any] = own, expected: Found = expected) -> None:
                item = compared(expected[: len(theirs)], theirs)
                own[runtime] = {**item, "clips": [_text(segments) for segments in theirs[:num_clips]]}

            progress(f"{name}, Python")
            add("Python", expected)
            for runtime, label in (("node", "Node, onnxruntime-node"), ("web", "Node, WebAssembly")):
                progress(f"{name}, {label}")
                add(label, programs.in_node(bundle, files, runtime))
            progress(f"{name}, Chromium")
            theirs, version = programs.in_chromium(bundle, recordings, Path(folder))
            add("Chromium, WebAssembly", theirs)
            for label, command in cpp.items():
                progress(f"{name}, {label}")
                some = files[:num_clips] if command.startswith("qemu") else files
                add(label, programs.in_cpp(command, bundle, some))
    digests = {name: of_bundle(path)["bundle"] for name, path in bundles.items()}
    return {"bundles": digests, "browser": version, "found": found}


def _text(segments: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(segment["text"] for segment in segments)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each bundle and runtime, the clips, and whether they are the same everywhere."""
    header = ("bundle", "runtime", "recordings", "other text", "tokens", "times", "words", "n-best", "score")
    rows = [
        (bundle, runtime, item["num_recordings"], *(item[aspect] for aspect in ASPECTS), f"{item['score']:.4f}")
        for bundle, runtimes in results["found"].items()
        for runtime, item in runtimes.items()
    ]
    first = next(iter(results["found"].values()))
    names = list(next(iter(results["found"].values()))["Python"]["clips"])
    same = all(
        item["clips"] == runtimes["Python"]["clips"]
        for runtimes in results["found"].values()
        for item in runtimes.values()
    )
    reference = next(iter(results["found"]))
    return {
        "table": table(header, rows, left=2),
        "clips": table(("clip", "text"), enumerate(names, start=1), left=2),
        "same": "the same words" if same else "not all the same words",
        "browser": results["browser"],
        "reference": reference,
        "num_recordings": str(first["Python"]["num_recordings"]),
        "other_texts": str(sum(item["text"] for item in results["found"][reference].values())),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("studies.runtimes", __doc__)
    parser.add_argument("--bundle", type=named, action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--list", type=Path, action="append", default=[], help="list of recordings: path<TAB>text")
    parser.add_argument("--first", type=int, help="use only the first N recordings of each list (default: all)")
    parser.add_argument("--cpp", metavar="COMMAND", help="the program of examples/cpp")
    parser.add_argument("--cpp-aarch64", metavar="COMMAND", help="the same for aarch64, in qemu-aarch64")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    cpp = {"C++": args.cpp, "C++, aarch64 in qemu": args.cpp_aarch64}
    recordings = recordings_of(args.list, args.first, 16_000)
    bundles = {name: Path(folder) for name, folder in args.bundle}
    found = measure(bundles, recordings, {name: cmd for name, cmd in cpp.items() if cmd}, report)
    publish(None, found, values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
