"""What other recognisers need: environments with their packages alone, and for sherpa-onnx graphs of a bundle."""

from __future__ import annotations

import shutil
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS
from u2moe.benchmarks.results.files import read_json, write_json
from u2moe.benchmarks.studies.shared.script import report
from u2moe.export.sherpa import export_sherpa
from u2moe.export.sherpa_graphs import SherpaOptions


def make_environment(folder: Path, requirements: Sequence[str], version: str | None = "") -> dict[str, Any]:
    """The environment in `folder`, created if it is missing or was made from something else.

    Args:
        folder: folder of the environment.
        requirements: requirements for pip.
        version: of what the requirements refer to, if that can change while they do not.

    Returns:
        `python`: path of its interpreter; `installed_bytes`: of packages, their dependencies, and the models in them.

    Raises:
        RuntimeError: the requirements cannot be installed; the message has the last output of pip.
    """
    folder = folder.resolve()
    record, wanted = read_json(folder / "installed.json"), {"requirements": list(requirements), "version": version}
    if not wanted.items() <= record.items():
        report(f"installing {', '.join(requirements)}")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        python, before = folder / "bin" / "python", _size(folder)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - what a peer needs
        if done.returncode:
            shutil.rmtree(folder)
            raise RuntimeError(f"{', '.join(requirements)}: cannot be installed: {done.stderr.strip()[-600:]}")
        record = {**wanted, "python": str(python), "installed_bytes": _size(folder) - before}
        write_json(folder / "installed.json", record)
    return record


def _size(folder: Path) -> int:
    """Bytes of all files except those that the interpreter writes."""
    files = (file for file in folder.rglob("*") if "__pycache__" not in file.parts)
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def sherpa_graphs(bundle: Path, folder: Path) -> Path:
    """A bundle's graphs for sherpa-onnx in `folder`, made if they are missing."""
    if not folder.is_dir():
        report("graphs for sherpa-onnx")
        folder.parent.mkdir(parents=True, exist_ok=True)
        export_sherpa(bundle, folder, SherpaOptions(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS))
    return folder
