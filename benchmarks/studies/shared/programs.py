"""Runs programs that recognise files, and measures their memory. Makes the programs' environments and graphs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.benchmarks.instruments.host import status_bytes
from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS
from u2moe.benchmarks.results.files import read_json, write_json
from u2moe.export.sherpa import SherpaOptions, export_sherpa

ENGINES = Path(__file__).with_name("engines.py")
BUFFER_S = 0.1  # seconds of audio that a live source delivers at once
_LOOK_S = 0.01
Line = Mapping[str, Any]


def json_lines(output: str, _errors: str) -> list[Line]:
    """Parse the output of our programs."""
    return [json.loads(line) for line in output.splitlines()]


def sherpa_lines(output: str, errors: str) -> list[Line]:
    """Parse the times in the output of sherpa-onnx's program. These times are rounded to two digits."""
    load = 1000 * float(re.findall(r"Recognizer created in (\S+) s", output)[0])
    took = re.findall(r"Elapsed seconds: ([^,]+),", errors)
    return [{"load_ms": load, "ms": 1000 * float(seconds)} for seconds in took]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A command to which the names of the files to recognise are appended. `read` parses its stdout and stderr."""

    command: Sequence[str]
    folder: Path | None = None
    read: Callable[[str, str], list[Line]] = json_lines

    def run(self, files: Sequence[Path]) -> tuple[list[Line], float]:
        """Run the program; return the lines of its output and its peak memory in MB. A failure is a RuntimeError."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            command = [*self.command, *map(str, files)]
            process = subprocess.Popen(command, cwd=self.folder, stdout=output, stderr=errors)  # noqa: S603 - ours
            most = 0
            while process.poll() is None:
                most = max(most, status_bytes("VmHWM", process.pid) or 0)
                time.sleep(_LOOK_S)
            output.seek(0)
            errors.seek(0)
            if process.returncode:
                raise RuntimeError(f"{command[0]} failed: {errors.read().decode(errors='replace')[-2000:]}")
            return self.read(output.read().decode(), errors.read().decode(errors="replace")), most / 1e6


def engine(
    name: str, options: Mapping[str, Any], *, python: str | Path = sys.executable, buffer_s: float = BUFFER_S
) -> Program:
    """Return a program that runs the recogniser `name` of `engines`. `python` must have the recogniser's package."""
    return Program(command=[str(python), str(ENGINES), name, json.dumps(options), str(buffer_s)])


def on_one_core(program: Program) -> Program:
    """Return the program limited to one core and one thread. By default, most libraries start a thread per core."""
    limits = ["taskset", "-c", str(min(os.sched_getaffinity(0))), "env", "OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1"]
    return replace(program, command=[*limits, *program.command])


def write_wav(file: Path, samples: npt.NDArray[np.float32], sample_rate: int) -> Path:
    """Write samples, float32 in [-1, 1], as a 16-bit WAV file. Return its path."""
    soundfile.write(file, samples, sample_rate, subtype="PCM_16")
    return file


def make_environment(folder: Path, requirements: Sequence[str], version: str | None = "") -> dict[str, Any]:
    """Return the environment in `folder`. Create it if it is missing or has other requirements or another `version`.

    Requirements are for pip; `version` is that of local ones, such as a commit. The result has the interpreter's path,
    `python`, and `installed_bytes`, the size of all packages with models. A RuntimeError ends with pip's stderr.
    """
    folder = folder.resolve()
    record, wanted = read_json(folder / "installed.json"), {"requirements": list(requirements), "version": version}
    if not wanted.items() <= record.items():
        show_progress(f"installing {', '.join(requirements)}")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        python, before = folder / "bin" / "python", _size(folder)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - pinned requirements
        if done.returncode:
            shutil.rmtree(folder)
            raise RuntimeError(f"cannot install {', '.join(requirements)}: {done.stderr.strip()[-600:]}")
        record = {**wanted, "python": str(python), "installed_bytes": _size(folder) - before}
        write_json(folder / "installed.json", record)
    return record


def _size(folder: Path) -> int:
    """Return the total size in bytes of all files except bytecode."""
    files = (file for file in folder.rglob("*") if "__pycache__" not in file.parts)
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def sherpa_graphs(bundle: Path, folder: Path) -> Path:
    """Return `folder`, which contains a bundle's graphs for sherpa-onnx. If it does not exist, create the graphs."""
    if not folder.is_dir():
        show_progress("graphs for sherpa-onnx")
        folder.parent.mkdir(parents=True, exist_ok=True)
        export_sherpa(bundle, folder, SherpaOptions(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS))
    return folder
