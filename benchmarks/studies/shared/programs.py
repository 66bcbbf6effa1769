"""Programs that recognise files: their output as lines, and their peak memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.benchmarks.instruments.host import status_bytes

ENGINES = Path(__file__).with_name("engines.py")
PORTION_S = 0.1
"""Seconds of audio that a live source delivers at once."""
_LOOK_S = 0.01
Line = Mapping[str, Any]


def json_lines(output: str, _errors: str) -> list[Line]:
    """Output of our programs."""
    return [json.loads(line) for line in output.splitlines()]


def sherpa_lines(output: str, errors: str) -> list[Line]:
    """Times that sherpa-onnx's program prints, with two digits."""
    load = 1000 * float(re.findall(r"Recognizer created in (\S+) s", output)[0])
    took = re.findall(r"Elapsed seconds: ([^,]+),", errors)
    return [{"load_ms": load, "ms": 1000 * float(seconds)} for seconds in took]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A command that recognises the files behind it; `read` makes lines of its stdout and stderr."""

    command: Sequence[str]
    folder: Path | None = None
    read: Callable[[str, str], list[Line]] = json_lines

    def run(self, files: Sequence[Path]) -> tuple[list[Line], float]:
        """The lines that it prints, and the peak of its resident memory in MB.

        Raises:
            RuntimeError: it failed; with the end of what it printed.
        """
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
    name: str, options: Mapping[str, Any], *, python: str | Path = sys.executable, portion_s: float = PORTION_S
) -> Program:
    """One of `engines`, with its options, in the environment of a Python that has its package."""
    return Program(command=[str(python), str(ENGINES), name, json.dumps(options), str(portion_s)])


def on_one_core(program: Program) -> Program:
    """The same with one core and one thread: by default most of these libraries start a thread for every core."""
    threads = [f"{name}_NUM_THREADS=1" for name in ("OMP", "OPENBLAS")]
    core = str(min(os.sched_getaffinity(0)))
    return replace(program, command=["taskset", "-c", core, "env", *threads, *program.command])


def write_wav(file: Path, samples: npt.NDArray[np.float32], sample_rate: int) -> Path:
    """Write samples, float32 in [-1, 1], as a WAV file that all programs can read; returns its path."""
    soundfile.write(file, samples, sample_rate, subtype="PCM_16")
    return file
