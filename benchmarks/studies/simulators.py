"""What do compilers for NPUs make of a graph of fixed shape? Words and outputs in their simulators, beside onnxruntime.

    python -m u2moe.benchmarks.studies.simulators FLOAT32 TEST.tsv ... --calibration FILE ... --work-dir WORK
        --python qualcomm=QNN/bin/python --python rockchip=... --python litert=... --python intel=... [--only VARIANT]

Each --python is one of an environment with that toolchain; `examples/npu/` has what runs there. Simulators take seconds
a chunk: WORK keeps what each variant has recognised, so that a run goes on where another ended, and several runs with
--only share the work.
"""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.benchmarks.results.files import of_bundle, publish, repository
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.script import named, recognition_parser, run_script
from u2moe.export import convert_static
from u2moe.export.profiles.calibration import alike
from u2moe.export.profiles.parity import session_of
from u2moe.runtime import Recognizer
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.model.static_encoder import Runner, StaticEncoder
from u2moe.runtime.text.word_errors import edit_distance, words

Inputs = dict[str, npt.NDArray[np.float32]]
PACKAGES = {
    "qualcomm": "onnxruntime-qnn",
    "rockchip": "rknn-toolkit2",
    "litert": "ai-edge-litert",
    "intel": "openvino",
}
"""What computes, by the example that uses it."""
PLAIN, FIXED = "onnxruntime", "fixed positions"
VARIANTS: dict[str, tuple[str, ...]] = {
    PLAIN: (),
    FIXED: (),
    "16 and 8 bits": (),
    "qualcomm float16": ("qualcomm",),
    "qualcomm 16 and 8 bits": ("qualcomm", "qdq"),
    "rockchip float16": ("rockchip", "rk3588"),
    "rockchip int8": ("rockchip", "rk3588", "int8"),
    "litert float32": ("litert",),
    "litert int8": ("litert", "int8"),
    "intel float32": ("intel",),
}
"""The example with its options, if it is not onnxruntime that computes."""
LIMITS = {"qualcomm float16": 1, "qualcomm 16 and 8 bits": 5, "rockchip float16": 1}
"""Of a hundred words, those that may differ from onnxruntime's."""

HEADER = (
    "toolchain",
    "numbers",
    "compiled",
    "on the CPU",
    "cosine, mean (least)",
    "same best tokens",
    "recordings",
    "words unlike onnxruntime's",
    "word errors",
)


class Beside:
    """Runs a simulator, and compares its log-probabilities with those of the float graph on the same inputs."""

    def __init__(self, runner: Runner, folder: Path) -> None:
        self._runner, self._float = runner, session_of(folder / "static.onnx")
        self.alike: list[tuple[float, float]] = []

    def run(self, inputs: Inputs, /) -> Mapping[str, npt.NDArray[Any]]:
        """See `Runner`."""
        found = self._runner.run(inputs)
        self.alike.append(alike(self._float(inputs)["log_probs"], found["log_probs"]))
        return found


class Graph:
    """Runs a graph by onnxruntime, with `fixed` in the place of some inputs."""

    def __init__(self, file: Path, fixed: Mapping[str, npt.NDArray[np.float32]]) -> None:
        self._run, self._fixed = session_of(file), fixed

    def run(self, inputs: Inputs, /) -> Mapping[str, npt.NDArray[Any]]:
        """See `Runner`."""
        return self._run({**inputs, **self._fixed})


def positions(folder: Path) -> Inputs:
    """The encodings of the positions of a chunk that has its left context before it, and begins a stream with that."""
    encoder = Recognizer.load(folder).model.encoder
    assert isinstance(encoder, StaticEncoder)
    left = encoder.form.left_frames(encoder.config, 1)
    tensors = {name: np.asarray(tensor[:, 0]) for name, tensor in encoder.start().tensors.items()}
    feeds = encoder.feeds(np.zeros((encoder.config.window, encoder.config.feature_size)), left, tensors)
    return {rate.positions: feeds[rate.positions] for rate in encoder.form.rates if rate.positions}


def recognise(name: str, folder: Path, python: str, recordings: Sequence[Recording], state: Path) -> None:
    """Add to `state` a line for the compiler, and one for each recording that it lacks."""
    done = state.read_text(encoding="utf-8").splitlines() if state.exists() else []
    if len(done) == 1 + len(recordings) or (done and "refused" in done[0]):
        return
    example, *options = VARIANTS[name] or ("",)
    with state.open("a", encoding="utf-8") as file:
        try:
            runner: Any
            if not example:
                graph = folder / ("static_qdq.onnx" if name == "16 and 8 bits" else "static.onnx")
                runner = Graph(graph, positions(folder) if name == FIXED else {})
            else:
                place = folder.parent / name.replace(" ", "_")
                shutil.copytree(folder, place, dirs_exist_ok=True)
                npu = repository().resolve() / "examples" / "npu"
                remote = runpy.run_path(str(npu / "remote.py"))["RemoteRunner"]
                runner = remote(python, npu / f"{example}.py", place.resolve(), *options)
        except OSError as error:
            file.write(json.dumps({"refused": str(error)}) + "\n")
            return
        if not done:
            file.write(json.dumps({"on_cpu": getattr(runner, "on_cpu", [])}) + "\n")
        beside = Beside(runner, folder)
        recognizer = Recognizer.load(folder, runner=beside)
        for number, recording in enumerate(recordings[max(len(done) - 1, 0) :], max(len(done), 1)):
            show_progress(f"{name}: {number} of {len(recordings)}")
            text = recognizer.transcribe(recording.path).text
            file.write(json.dumps({"text": text, "alike": beside.alike}) + "\n")
            file.flush()
            beside.alike = []


def summary(lines: Sequence[str], plain: Sequence[str], recordings: Sequence[Recording]) -> dict[str, Any]:
    """What the lines of a variant say, beside those of `PLAIN`."""
    about, *rows = map(json.loads, lines)
    if "refused" in about:
        return about
    pairs = [pair for row in rows for pair in row["alike"]]
    both = (rows, map(json.loads, plain[1 : len(lines)]))
    texts, expected = ([words(row["text"]) for row in each] for each in both)
    transcripts = [words(recording.transcript) for recording in recordings[: len(rows)]]
    return {
        **about,
        "recordings": len(rows),
        "chunks": len(pairs),
        "cosine": float(np.mean([pair[0] for pair in pairs])),
        "least_cosine": min(pair[0] for pair in pairs),
        "same_best_tokens": float(np.mean([pair[1] for pair in pairs])),
        "different": sum(map(edit_distance, expected, texts)),
        "words": sum(map(len, expected)),
        "errors": sum(map(edit_distance, transcripts, texts)),
        "spoken": sum(map(len, transcripts)),
    }


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Values for the pages: a row for each variant."""
    rows, versions, variants = [], results["versions"], results["variants"]
    for name, own in variants.items():
        example, _, kind = name.partition(" ") if VARIANTS[name] else (PLAIN, "", name)
        kind = "float32" if name == PLAIN else kind
        who = f"{PACKAGES.get(example, PLAIN)} {versions[example]}"
        if "refused" in own:
            rows.append((who, kind, f"refused: {own['refused']}", *[""] * 6))
            continue
        different = f"{own['different']} of {own['words']} ({own['different'] / own['words']:.1%})"
        rows.append(
            (
                who,
                kind,
                "whole",
                ", ".join(own["on_cpu"]) or "nothing",
                f"{own['cosine']:.4f} ({own['least_cosine']:.3f})",
                f"{own['same_best_tokens']:.1%}",
                own["recordings"],
                different,
                f"{own['errors'] / own['spoken']:.1%}",
            )
        )
    fixed, plain = variants[FIXED], variants[PLAIN]
    return {
        "table": table(HEADER, rows, left=4),
        "recordings": str(results["num_recordings"]),
        "chunks": str(plain["chunks"]),
        "fixed": f"{fixed['different']} of {fixed['words']} words",
        "fixed_errors": f"{fixed['errors'] / fixed['spoken']:.1%}",
        "plain_errors": f"{plain['errors'] / plain['spoken']:.1%}",
    }


def targets(results: Mapping[str, Any]) -> list[Target]:
    """Words that differ from onnxruntime's."""
    return [
        Target(
            name=f"words that {name} changes in a simulator",
            found=100 * own["different"] / own["words"] if "words" in own else 100.0,
            limit=limit,
            at_most=True,
            unit=" %",
        )
        for name, limit in LIMITS.items()
        if (own := results["variants"].get(name))
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = recognition_parser("simulators", __doc__)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, help="recordings to quantize by")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder that keeps the work")
    parser.add_argument("--python", type=named, action="append", default=[], metavar="EXAMPLE=PATH")
    parser.add_argument("--only", choices=VARIANTS, help="recognise by one variant, and publish nothing")
    args = parser.parse_args(arguments)
    recordings = [recording for path in args.lists for recording in read_recordings(path)]
    folder, pythons = args.work_dir / "static", dict(args.python)
    if not folder.exists():
        convert_static(args.bundle, folder, recordings=args.calibration, qdq=True, progress=show_progress)
    chosen = {name: own for name, own in VARIANTS.items() if not own or own[0] in pythons}
    for name in [args.only] if args.only else chosen:
        state = args.work_dir / f"{name.replace(' ', '_')}.jsonl"
        recognise(name, folder, pythons.get((VARIANTS[name] or ("",))[0], ""), recordings, state)
    if args.only:
        return
    lines = {n: (args.work_dir / f"{n.replace(' ', '_')}.jsonl").read_text("utf-8").splitlines() for n in chosen}
    versions = {PLAIN: _version("python", PLAIN)} | {e: _version(pythons[e], PACKAGES[e]) for e in pythons}
    found = {name: summary(own, lines[PLAIN], recordings) for name, own in lines.items()}
    content = {"num_recordings": len(recordings), "versions": versions, "variants": found, **of_bundle(args.bundle)}
    publish(args.results, content, values)


def _version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    command = [python, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


if __name__ == "__main__":
    run_script(main)
