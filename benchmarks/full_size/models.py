"""Bundles of seeded random weights in any of the sizes of `random_checkpoint`, created if missing.

The comparison with torch takes minutes and is skipped unless requested: the same code builds the graphs that the tests
compare at small sizes. With it, the bundle is made by the command `u2moe export` in a separate process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u2moe.benchmarks.results.files import read_json, write_json
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.exporter import build_graphs, bundle_manifest
from u2moe.export.random_checkpoint import PRESETS, random_config, write_random_checkpoint
from u2moe.quantize.config import recipe
from u2moe.quantize.quantizer import quantize_bundle
from u2moe.runtime.bundle.manifest import TOKENS_FILE
from u2moe.runtime.bundle.writer import BundleWriter
from u2moe.runtime.graph.file import save_graph

PRECISIONS = {"fp32": "bundle", "int8": "int8"}
"""Folder of each precision."""
_EXPORT = """
import json, sys, time
from u2moe.benchmarks.instruments.host import status_bytes
from u2moe.runtime.cli import main
code = main(["export", *sys.argv[1:]])
print(json.dumps({"code": code, "cpu_s": time.process_time(), "peak_bytes": status_bytes("VmHWM")}))
"""


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """The bundles of one model.

    Attributes:
        name: preset of `random_checkpoint`.
        folder: folder of its bundles.
    """

    name: str
    folder: Path

    @property
    def checkpoint(self) -> Path:
        """Directory of the weights in WeNet's layout."""
        return self.folder / "checkpoint"

    @property
    def export(self) -> dict[str, Any]:
        """Costs of the export with parity: `cpu_s`, `peak_bytes`, and `said`, its summary; empty without parity."""
        return read_json(self.folder / "export.json")

    def bundle(self, precision: str) -> Path:
        """Folder of the bundle in that precision, "fp32" or "int8"."""
        return self.folder / PRECISIONS[precision]

    @property
    def ready(self) -> bool:
        """Whether both bundles exist; they are written atomically."""
        return all(self.bundle(precision).is_dir() for precision in PRECISIONS)


def make_artefact(
    name: str,
    root: Path,
    *,
    again: bool = False,
    parity: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Artefact:
    """Create the missing bundles of preset `name` in `root`/`name`.

    Args:
        name: preset of `random_checkpoint`.
        root: folder of all models.
        again: recreate bundles with the current exporter and quantizer; old ones stay until the new ones are complete.
        parity: compare newly created graphs with torch.
        progress: called with a line for each step.

    Raises:
        RuntimeError: the export with parity failed; the message has its last output.
        BundleError: a folder cannot be written.
    """
    artefact = Artefact(name=name, folder=root / name)
    float32, checkpoint = artefact.bundle("fp32"), artefact.checkpoint
    if not checkpoint.is_dir():
        progress(f"{name}: random weights")
        unfinished = checkpoint.with_suffix(".partial")
        write_random_checkpoint(unfinished, random_config(**PRESETS[name]))
        unfinished.rename(checkpoint)
    if again or not float32.is_dir():
        progress(f"{name}: export")
        (_export_and_compare if parity else _export)(artefact, overwrite=again)
    if again or not artefact.bundle("int8").is_dir():
        progress(f"{name}: int8")
        quantize_bundle(float32, artefact.bundle("int8"), recipe("int8"), overwrite=again)
    return artefact


def _export_and_compare(artefact: Artefact, *, overwrite: bool) -> None:
    """Run the command `u2moe export`, and record its costs."""
    folders = [str(artefact.checkpoint), str(artefact.bundle("fp32"))]
    command = [sys.executable, "-c", _EXPORT, *folders, *(["--overwrite"] if overwrite else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    *said, cost = done.stdout.strip().splitlines() or [""]
    if done.returncode or json.loads(cost)["code"]:
        raise RuntimeError(f"{artefact.name}: export failed: {done.stderr.strip()[-600:]}")
    write_json(artefact.folder / "export.json", {**json.loads(cost), "said": said[0]})


def _export(artefact: Artefact, *, overwrite: bool) -> None:
    """Export without the comparison with torch."""
    checkpoint = Checkpoint.open(artefact.checkpoint)
    manifest = bundle_manifest(checkpoint)
    with BundleWriter(artefact.bundle("fp32"), overwrite=overwrite) as staging:
        for graph in build_graphs(checkpoint.network(), manifest):
            save_graph(graph, staging.path / f"{graph.graph.name}.onnx")
        staging.add(TOKENS_FILE, "".join(f"{token} {index}\n" for index, token in enumerate(checkpoint.tokens)))
        staging.finish(manifest)
