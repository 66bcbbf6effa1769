"""Bundles of seeded random weights at any of the sizes of `random_checkpoint`, made where they are not there yet.

    python -m u2moe.benchmarks.artefacts FOLDER --models dense-225m moe-1b dense-1b [--again] [--parity]

Writes FOLDER/NAME/bundle (float32) and FOLDER/NAME/int8; the checkpoint between them is removed. A billion parameters
take 9 GB of memory. The comparison with torch takes minutes and is left out unless asked for: the graphs are made by
the same code that the tests compare at small sizes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from u2moe.export.checkpoint import Checkpoint
from u2moe.export.exporter import build_graphs, bundle_manifest, export_bundle, save_graph
from u2moe.export.random_checkpoint import PRESETS, random_config, write_random_checkpoint
from u2moe.quantize.config import recipe
from u2moe.quantize.quantizer import quantize_bundle
from u2moe.runtime.bundle import BundleWriter
from u2moe.runtime.manifest import TOKENS_FILE

PRECISIONS = {"fp32": "bundle", "int8": "int8"}
"""Folder of each precision."""


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """The bundles of one model.

    Attributes:
        name: preset of `random_checkpoint`.
        folder: where its bundles lie.
    """

    name: str
    folder: Path

    def bundle(self, precision: str) -> Path:
        """Folder of the bundle in that precision, "fp32" or "int8"."""
        return self.folder / PRECISIONS[precision]

    @property
    def ready(self) -> bool:
        """Whether both bundles are there; they are written all or nothing."""
        return all(self.bundle(precision).is_dir() for precision in PRECISIONS)


def make_artefact(
    name: str,
    root: Path,
    *,
    again: bool = False,
    parity: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Artefact:
    """Make what is missing of the bundles of preset `name` in `root`/`name`.

    Args:
        name: preset of `random_checkpoint`.
        root: folder of all models.
        again: make them anew, with the exporter and quantizer of today; old bundles stay until new ones are complete.
        parity: compare the graphs with torch.
        progress: called with a line for each step.

    Raises:
        ParityError: a graph differs from torch.
        BundleError: a folder cannot be written.
    """
    artefact = Artefact(name=name, folder=root / name)
    float32, checkpoint = artefact.bundle("fp32"), artefact.folder / "checkpoint"
    if again or not float32.is_dir():
        progress(f"{name}: random weights")
        write_random_checkpoint(checkpoint, random_config(**PRESETS[name]))
        progress(f"{name}: export")
        if parity:
            export_bundle(checkpoint, float32, overwrite=again, progress=progress)
        else:
            _export(checkpoint, float32, overwrite=again)
        shutil.rmtree(checkpoint)
    if again or not artefact.bundle("int8").is_dir():
        progress(f"{name}: int8")
        quantize_bundle(float32, artefact.bundle("int8"), recipe("int8"), overwrite=again)
    return artefact


def _export(directory: Path, out: Path, *, overwrite: bool) -> None:
    """The export without its comparison with torch."""
    checkpoint = Checkpoint.open(directory)
    manifest = bundle_manifest(checkpoint)
    with BundleWriter(out, overwrite=overwrite) as staging:
        for graph in build_graphs(checkpoint.network(), manifest):
            save_graph(graph, staging.path)
        staging.add(TOKENS_FILE, "".join(f"{token} {index}\n" for index, token in enumerate(checkpoint.tokens)))
        staging.finish(manifest)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m u2moe.benchmarks.artefacts", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the bundles lie, a folder for each model")
    parser.add_argument("--models", nargs="+", choices=sorted(PRESETS), default=["dense-225m", "moe-1b", "dense-1b"])
    parser.add_argument("--again", action="store_true", help="make bundles anew that are there")
    parser.add_argument("--parity", action="store_true", help="compare the graphs with torch")
    args = parser.parse_args(arguments)
    for name in args.models:
        make_artefact(name, args.folder, again=args.again, parity=args.parity, progress=_print)


def _print(line: str) -> None:
    print(f"- {line}", flush=True)


if __name__ == "__main__":
    main()
