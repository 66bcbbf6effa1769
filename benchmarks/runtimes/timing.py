"""How long a program takes to load and to recognise, by its own clock, and its peak of memory. Runs it, and parses."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.host import status_bytes

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

    Args:
        command: the program and its options; the files are added.
        files: recordings.
        cwd: its working folder.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
        ValueError: it printed other lines than it must.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - programs of this repository
            [str(part) for part in [*command, *files, *files]], cwd=cwd, stdout=output, stderr=errors
        )
        most = 0.0
        while process.poll() is None:
            most = max(most, peak_mb(process.pid))
            time.sleep(_LOOK_S)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{command[0]} failed: {errors.read().decode(errors='replace')[-2000:]}")
        lines = [json.loads(line) for line in output.read().decode().splitlines()]
    return timing_of(lines, len(files), most)


def timing_of(lines: Sequence[dict[str, Any]], num_files: int, mb: float = 0.0) -> Timing:
    """The timing in the lines of a program that recognised `num_files` files twice; lines without times are skipped.

    Times are in milliseconds: `ms` to recognise a file, without loading, and `load_ms` (`loadMs`).

    Raises:
        ValueError: not two lines with times for each file.
    """
    timed = [line for line in lines if "ms" in line]
    if not timed or len(timed) != 2 * num_files:
        raise ValueError(f"expected times of {num_files} files twice, found {len(timed)} lines with times")
    load_ms = timed[0]["loadMs" if "loadMs" in timed[0] else "load_ms"]
    return Timing(load=load_ms / 1000, took=sum(line["ms"] for line in timed[num_files:]) / 1000, mb=mb)


def peak_mb(process: int) -> float:
    """Most resident memory of a process so far, in MB; 0 if it has ended."""
    return (status_bytes("VmHWM", process) or 0) / 1e6
