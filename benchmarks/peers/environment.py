"""Separate environments for other recognisers, with only what they need, and the size of the installation."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tomllib
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from u2moe.benchmarks.results.files import read_json, write_json

_RECORD = "installed.json"
_NOT_SOURCE = (".*", "__pycache__", "*.egg-info", "build", "dist", "exp", "tests", "examples", "docs")
"""What is excluded from the copy of a repository for installation, including results."""


@dataclass(frozen=True, kw_only=True)
class PeerEnvironment:
    """A virtual environment with one recogniser.

    Attributes:
        python: its interpreter.
        installed_bytes: size of all installed files: packages, their dependencies, and the models in them.
    """

    python: Path
    installed_bytes: int


def make_environment(
    folder: Path,
    requirements: Sequence[str],
    *,
    made_of: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> PeerEnvironment:
    """The environment in `folder`, created if it is missing or was made from other requirements.

    Args:
        folder: folder of the environment.
        requirements: requirements for pip.
        made_of: version of what the requirements refer to, if that can change while they do not.
        progress: called with a line when something is installed.

    Raises:
        RuntimeError: the requirements cannot be installed; the message has the last output of pip.
    """
    python = folder / "bin" / "python"
    record, wanted = read_json(folder / _RECORD), {"requirements": list(requirements), "made_of": made_of}
    if not wanted.items() <= record.items():
        progress(f"installing {', '.join(requirements)}")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        before = _size(folder)
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-compile", *requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - what a peer needs
        if done.returncode:
            shutil.rmtree(folder)
            raise RuntimeError(f"{', '.join(requirements)}: cannot be installed: {done.stderr.strip()[-600:]}")
        record = {**wanted, "installed_bytes": _size(folder) - before}
        write_json(folder / _RECORD, record)
    return PeerEnvironment(python=python, installed_bytes=record["installed_bytes"])


def _size(folder: Path) -> int:
    """Bytes of all files except those that the interpreter writes."""
    files = (file for file in folder.rglob("*") if "__pycache__" not in file.parts)
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def copy_source(repository: Path, target: Path) -> Path:
    """Copy the packaged files of a repository, because building in place would leave files. Returns `target`."""
    shutil.rmtree(target, ignore_errors=True)

    def left_out(folder: str, names: list[str]) -> set[str]:
        measured = ("*.json",) if Path(folder) == repository / "benchmarks" / "results" else ()
        return shutil.ignore_patterns(*_NOT_SOURCE, *measured)(folder, names)

    if not (repository / "pyproject.toml").exists():
        raise FileNotFoundError(f"{repository}: is not a clone of u2moe; change to its root")
    shutil.copytree(repository, target, ignore=left_out)
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    for folder in project["tool"]["setuptools"]["package-dir"].values():
        if not (target / folder).exists():  # packaged, but among what is left out
            shutil.copytree(repository / folder, target / folder)
    return target


def digest(folder: Path) -> str:
    """The sha256 of the names and contents of all files below a folder."""
    result = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content = file.read_bytes()
        result.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return result.hexdigest()
