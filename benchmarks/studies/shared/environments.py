"""Separate environments for other recognisers, with only what they need, and the size of the installation."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import venv
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from u2moe.benchmarks.results.files import read_json, repository, write_json
from u2moe.benchmarks.studies.shared.script import report


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


def committed_source(target: Path) -> Path:
    """A copy of the last commit of this repository: building in place would leave files. Returns `target`."""
    shutil.rmtree(target, ignore_errors=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=repository(), capture_output=True, check=True)  # noqa: S607
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(target, filter="data")
    return target.resolve()
