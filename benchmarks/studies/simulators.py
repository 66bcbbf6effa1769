"""How accurate are graphs of fixed shape in the simulators of NPU compilers? Compares the simulators with onnxruntime.

    python -m u2moe.benchmarks.studies.simulators FLOAT32 TEST.tsv ... --calibration FILE ... --work-dir WORK
        --python qualcomm=QNN/bin/python --python rockchip=... --python litert=... --python intel=... [--only VARIANT]

Each --python names a toolchain, and the Python interpreter of an environment in which the toolchain is installed. This
interpreter runs a script of `examples/npu/`. Simulators take seconds per chunk, so WORK keeps the results of each
variant. An interrupted run resumes from these results, and several runs with --only may work in parallel. Each variant
is compared on the recordings processed so far.
"""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.benchmarks.results.files import publish, repository
from u2moe.benchmarks.results.markdown import Target, table
from u2moe.benchmarks.studies.shared.script import named, recognition_parser, script
from u2moe.export import convert_static
from u2moe.export.comparison import Array
from u2moe.export.profiles.calibration import alike
from u2moe.export.profiles.conversion import Run, session_of
from u2moe.runtime import Recognizer
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.model.static_encoder import StaticEncoder
from u2moe.runtime.text.word_errors import edit_distance, words

PACKAGES = {"": "onnxruntime", "qualcomm": "onnxruntime-qnn", "rockchip": "rknn-toolkit2"}
PACKAGES |= {"litert": "ai-edge-litert", "intel": "openvino"}  # packages that run the graph, by script
PLAIN, FIXED, QDQ = "float32", "fixed positions", "16 and 8 bits"
VARIANTS: dict[str, tuple[str, ...]] = {
    PLAIN: ("",), FIXED: ("",), QDQ: ("",),
    "qualcomm float16": ("qualcomm",), "qualcomm 16 and 8 bits": ("qualcomm", "qdq"),
    "rockchip float16": ("rockchip", "rk3588"), "rockchip int8": ("rockchip", "rk3588", "int8"),
    "litert float32": ("litert",), "litert int8": ("litert", "int8"), "intel float32": ("intel",),
}  # fmt: skip
"""For each variant, the script in `examples/npu/` and its options."""
LIMITS = {"qualcomm float16": 1, "qualcomm 16 and 8 bits": 5, "rockchip float16": 1}
"""Maximum percentage of words that differ from onnxruntime's, by variant."""


def positions(folder: Path) -> dict[str, Array]:
    """Return the position encodings of the first chunk that has its full left context."""
    encoder = Recognizer.load(folder).model.encoder
    if not isinstance(encoder, StaticEncoder):
        raise TypeError(f"{folder}: the graph does not have a fixed shape")
    left = encoder.form.left_frames(encoder.config, 1)
    tensors = {name: np.asarray(tensor[:, 0]) for name, tensor in encoder.start().tensors.items()}
    feeds = encoder.feeds(np.zeros((encoder.config.window, encoder.config.feature_size)), left, tensors)
    return {rate.positions: feeds[rate.positions] for rate in encoder.form.rates if rate.positions}


def opened(name: str, folder: Path, python: str) -> tuple[Run, list[str]]:
    """Return the function that runs a variant, and operators left to the CPU. OSError: the graph cannot be compiled."""
    example, *options = VARIANTS[name]
    if not example:
        run = session_of(folder / ("static_qdq.onnx" if name == QDQ else "static.onnx"))
        fixed = positions(folder) if name == FIXED else {}
        return lambda inputs: run({**inputs, **fixed}), []
    place, npu = folder.parent / name.replace(" ", "_"), repository().resolve() / "examples" / "npu"
    shutil.copytree(folder, place, dirs_exist_ok=True)
    remote = runpy.run_path(str(npu / "remote.py"))["RemoteRunner"]
    runner = remote(python, npu / f"{example}.py", place.resolve(), *options)
    return runner.run, runner.on_cpu


def recognise(name: str, folder: Path, python: str, recordings: Sequence[Recording]) -> None:
    """Append missing recordings to a variant's results, which begin with the operators on the CPU, or an error."""
    state = folder.parent / f"{name.replace(' ', '_')}.jsonl"
    done = state.read_text(encoding="utf-8").splitlines() if state.exists() else []
    if len(done) == 1 + len(recordings) or (done and "refused" in done[0]):
        return
    with state.open("a", encoding="utf-8") as file:
        try:
            run, on_cpu = opened(name, folder, python)
        except OSError as error:
            file.write(json.dumps({"refused": str(error)}) + "\n")
            return
        if not done:
            file.write(json.dumps({"on_cpu": on_cpu}) + "\n")
        plain, cosines = session_of(folder / "static.onnx"), list[tuple[float, float]]()

        def beside(inputs: dict[str, Array]) -> dict[str, Array]:
            """Run the simulator. Compare its log-probabilities with those of the float graph for the same inputs."""
            found = run(inputs)
            cosines.append(alike(plain(inputs)["log_probs"], found["log_probs"]))
            return found

        recognizer = Recognizer.load(folder, runner=SimpleNamespace(run=beside))
        for number, recording in list(enumerate(recordings))[max(len(done) - 1, 0) :]:
            show_progress(f"{name}: {number} of {len(recordings)}")
            cosines.clear()
            text = recognizer.transcribe(recording.path).text
            file.write(json.dumps({"text": text, "alike": cosines}) + "\n")
            file.flush()


def summary(lines: Sequence[str], plain: Sequence[str], recordings: Sequence[Recording]) -> dict[str, Any]:
    """Compare the result lines of a variant with those of `PLAIN`."""
    about: dict[str, Any] = json.loads(lines[0])
    rows = [json.loads(line) for line in lines[1:]]
    if "refused" in about:
        return about
    cosines, same = np.array([pair for row in rows for pair in row["alike"]]).T
    texts = [words(row["text"]) for row in rows]
    expected = [words(json.loads(line)["text"]) for line in plain[1 : len(lines)]]
    transcripts = [words(recording.transcript) for recording in recordings[: len(rows)]]
    return {
        **about, "recordings": len(rows), "chunks": len(cosines),
        "cosine": cosines.mean(), "least_cosine": cosines.min(), "same_best_tokens": same.mean(),
        "different": sum(map(edit_distance, expected, texts)), "words": sum(map(len, expected)),
        "errors": sum(map(edit_distance, transcripts, texts)), "spoken": sum(map(len, transcripts)),
    }  # fmt: skip


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a table with a row for each variant, and the numbers in the text."""
    rows, variants = [], results["variants"]
    for name, own in variants.items():
        example = VARIANTS[name][0]
        row = [f"{PACKAGES[example]} {results['versions'][example]}", name.removeprefix(example).strip()]
        if "refused" in own:
            rows.append([*row, own["refused"], *[""] * 5])
            continue
        row += [", ".join(own["on_cpu"]) or "nothing", f"{own['cosine']:.4f} ({own['least_cosine']:.4f})"]
        row += [f"{own['same_best_tokens']:.1%}", str(own["recordings"])]
        row.append(f"{own['different']} of {own['words']} ({own['different'] / own['words']:.1%})")
        rows.append([*row, f"{own['errors'] / own['spoken']:.1%}"])
    fixed, plain = variants[FIXED], variants[PLAIN]
    header = ("toolchain", "numbers", "on the CPU", "cosine, mean (minimum)", "same best tokens", "recordings")
    return {
        "table": table((*header, "words differing from onnxruntime", "word errors"), rows, left=3),
        "recordings": str(plain["recordings"]),
        "fixed": f"{fixed['different']} of {fixed['words']} words",
        "fixed_errors": f"{fixed['errors'] / fixed['spoken']:.1%}",
        "plain_errors": f"{plain['errors'] / plain['spoken']:.1%}",
    }


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Yield the limits on the percentage of words that differ from onnxruntime's."""
    for name, own in results["variants"].items():
        if name in LIMITS and "words" in own:
            title = f"{name}: words that differ from onnxruntime's in {own['recordings']} recordings"
            share = 100 * own["different"] / own["words"]
            yield Target(name=title, found=share, limit=LIMITS[name], at_most=True, unit=" %")


def _version(python: str, package: str) -> str:
    command = [python, "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = recognition_parser("simulators", __doc__)
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, help="recordings for calibration")
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for graphs and results")
    parser.add_argument("--python", type=named, action="append", default=[], metavar="EXAMPLE=PATH")
    parser.add_argument("--only", choices=VARIANTS, help="run only this variant, and do not publish the results")
    args = parser.parse_args(arguments)
    recordings = [recording for path in args.lists for recording in read_recordings(path)]
    folder, pythons = args.work_dir / "static", {"": sys.executable, **dict(args.python)}
    if not folder.exists():
        convert_static(args.bundle, folder, recordings=args.calibration, qdq=True, progress=show_progress)
    chosen = [name for name, (example, *_) in VARIANTS.items() if example in pythons]
    for name in [args.only] if args.only else chosen:
        recognise(name, folder, pythons[VARIANTS[name][0]], recordings)
    if args.only:
        return
    lines = {n: (args.work_dir / f"{n.replace(' ', '_')}.jsonl").read_text("utf-8").splitlines() for n in chosen}
    found = {name: summary(own, lines[PLAIN], recordings) for name, own in lines.items()}
    versions = {example: _version(python, PACKAGES[example]) for example, python in pythons.items()}
    publish(args.results, {"versions": versions, "variants": found}, values, bundle=args.bundle)
