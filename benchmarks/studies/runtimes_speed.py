"""How fast do the runtimes load and recognise, and in how much memory? One thread each, on the clips of the demo model.

    python -m u2moe.benchmarks.studies.runtimes_speed [--cpp build/cpp/u2moe_transcribe] [--output FILE]

Needs `npm ci --ignore-scripts` in examples/browser. Each program recognises the clips twice in one process and takes
the time itself; processes take turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

from u2moe.benchmarks.instruments.host import status_bytes
from u2moe.benchmarks.instruments.statistics import interleaved, timed
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import publish
from u2moe.benchmarks.studies.runtimes import recordings_of
from u2moe.benchmarks.studies.shared import programs
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.export.profiles.conversion import convert_bundle
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.places import DEMO_FOLDER

RATE = 16_000
_LOOK_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One run of a program.

    Attributes:
        load: seconds from the path of the bundle to a recogniser that is ready.
        took: seconds for all files, the second time they were recognised.
        mb: peak of its resident memory in MB.
    """

    load: float
    took: float
    mb: float


def run_timed(command: Sequence[object], files: Sequence[Path], cwd: Path | None = None) -> Timing:
    """Run a program on files, each twice, that prints a JSON line with its times for each.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
        ValueError: it printed other lines than it must.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        arguments = [str(part) for part in [*command, *files, *files]]
        process = subprocess.Popen(arguments, cwd=cwd, stdout=output, stderr=errors)  # noqa: S603 - of this repository
        most = 0
        while process.poll() is None:
            most = max(most, status_bytes("VmHWM", process.pid) or 0)
            time.sleep(_LOOK_S)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command[0]} failed: {errors.read().decode(errors='replace')[-2000:]}")
        lines = [json.loads(line) for line in output.read().decode().splitlines()]
    return timing_of(lines, len(files), most / 1e6)


def timing_of(lines: Sequence[Mapping[str, Any]], num_files: int, mb: float) -> Timing:
    """The timing in the lines of a program that recognised `num_files` files twice; lines without times are skipped.

    Times are in milliseconds: `ms` to recognise a file, without loading, and `load_ms` (`loadMs`).

    Raises:
        ValueError: not two lines with times for each file.
    """
    found = [line for line in lines if "ms" in line]
    if not found or len(found) != 2 * num_files:
        raise ValueError(f"expected times of {num_files} files twice, found {len(found)} lines with times")
    load_ms = found[0]["loadMs" if "loadMs" in found[0] else "load_ms"]
    return Timing(load=load_ms / 1000, took=sum(line["ms"] for line in found[num_files:]) / 1000, mb=mb)


def measure(bundle: Path, cpp: str | None, repeats: int) -> dict[str, Any]:
    """Times in seconds and memory in MB.

    Returns:
        `seconds` of audio; `loads`: of the encoder by format; `runtimes`: `load`, `rtf` and `mb` (peak of the process)
        of each.
    """
    recordings = recordings_of([], None, RATE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = programs.write_wav(folder, recordings, RATE)
        ort = convert_bundle(bundle, folder / "ort", "ort").path
        encoders = {"onnx": bundle / "encoder.onnx", "ort": ort / "encoder.ort"}
        loads = interleaved({kind: timed(partial(_session, file)) for kind, file in encoders.items()}, repeats)
        python = [sys.executable, "-m", "u2moe.benchmarks.studies.shared.python_program", str(bundle)]
        cases = {
            "Python": partial(run_timed, python, files),
            "Node, onnxruntime-node": partial(
                run_timed, programs.node_command(bundle, "node"), files, programs.node_folder()
            ),
            "Node, WebAssembly": partial(run_timed, programs.node_command(ort, "web"), files, programs.node_folder()),
        }
        if cpp:
            cases["C++"] = partial(run_timed, [*programs.cpp_command(cpp, bundle), "--timing"], files)
        runs = interleaved(cases, repeats, warm_up=0, title="runtimes", progress=report)
    seconds = sum(map(len, recordings)) / RATE
    return {
        "seconds": round(seconds, 2),
        "loads": {kind: round(statistics.median(values), 4) for kind, values in loads.items()},
        "runtimes": {name: summary(timings, seconds) for name, timings in runs.items()},
    }


def _session(file: Path) -> None:
    options = SessionSettings(kernels="onnxruntime").session_options()
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def summary(timings: Sequence[Timing], seconds: float) -> dict[str, float]:
    """Medians of the times and the largest memory: `load` in seconds, `rtf`, `mb`."""
    return {
        "load": round(statistics.median(item.load for item in timings), 3),
        "rtf": round(statistics.median(item.took for item in timings) / seconds, 5),
        "mb": round(max(item.mb for item in timings)),
    }


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show."""
    rows = [
        (name, f"{item['load']:.2f}", f"{item['rtf']:.4f}", f"{item['mb']:.0f}")
        for name, item in results["runtimes"].items()
    ]
    loads = {f"{kind}_load": f"{1000 * seconds:.0f}" for kind, seconds in results["loads"].items()}
    return {"table": table(("runtime", "load, s", "real-time factor", "peak memory, MB"), rows), **loads}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = script_parser("studies.runtimes_speed", __doc__)
    parser.add_argument("--cpp", metavar="COMMAND", help="the program of examples/cpp")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    publish(DEMO_FOLDER, measure(DEMO_FOLDER, args.cpp, args.repeats), values, args.output)
    return 0


if __name__ == "__main__":
    run_script(main)
