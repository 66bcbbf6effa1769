"""JSON files of results, written atomically, and their place in a clone. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from u2moe.runtime.whole_file import write_text


def repository() -> Path:
    """The clone that scripts work in: the current folder.

    Raises:
        FileNotFoundError: it is not a clone. Scripts in an installed package have no other way to find one.
    """
    here = Path.cwd()
    if not (here / "benchmarks" / "results").is_dir():
        raise FileNotFoundError(f"{here}: is not a clone of u2moe; change to its root, or name the files to use")
    return here


def results_file(name: str) -> Path:
    """Where the results of a script are kept in a clone, which is the current folder."""
    return Path("benchmarks", "results", f"{name}.json")


def read_json(file: Path) -> dict[str, Any]:
    """The content of a results file; empty if there is none."""
    if not file.exists():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a results file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1) + "\n")
