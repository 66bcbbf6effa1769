"""Where and when results were measured: as data beside them, and as the sentence above their table."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from u2moe.benchmarks.machine import describe_machine
from u2moe.runtime.manifest import MANIFEST_FILE


def measured_here() -> dict[str, Any]:
    """The `machine` and the `date` of results."""
    return {"machine": describe_machine(), "date": dt.datetime.now(dt.UTC).date().isoformat()}


def of_bundle(folder: Path) -> dict[str, str]:
    """The `bundle` of results: the sha256 of its manifest, which has those of all its files."""
    return {"bundle": hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()}


def sentence(content: Mapping[str, Any]) -> str:
    """Processor, instruction sets, cores, onnxruntime, commit and date of results that have `measured_here`."""
    machine = content["machine"]
    version = f" ({machine['processor_version']})" if machine.get("processor_version") else ""
    return (
        f"Measured on {machine['processor']}{version} with {' '.join(machine['instruction_sets'])}, "
        f"{machine['usable_cores']} cores, onnxruntime {machine['onnxruntime']}, commit {machine['commit']}, "
        f"{content['date']}."
    )
