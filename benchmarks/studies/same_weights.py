"""How do the same weights run by other means? Torch as WeNet uses it, onnxruntime's QMoE, and its own quantizer.

    python -m u2moe.benchmarks.studies.same_weights FOLDER [--results FILE] [--prepare] [--at-most 1]

FOLDER holds the bundles of MoE-1B (`random_models`); missing ones, and peers, are created. They do not fit into memory
together, so they are measured in groups that all include our int8, in turn on one thread. Results are written cell by
cell; a second run measures the missing ones.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios, timed
from u2moe.benchmarks.instruments.workload import (
    NUM_CHUNKS,
    NUM_WARM_CHUNKS,
    Frames,
    streaming_round,
    utterance,
    windows,
)
from u2moe.benchmarks.results.files import results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import recorded, resumed
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared import graphs
from u2moe.benchmarks.studies.shared.random_models import FLOAT, MIXTURE, make_bundle
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.benchmarks.studies.shared.torch_encoder import TorchEncoder, with_loops
from u2moe.export.checkpoint import Checkpoint
from u2moe.quantize.arithmetic import relative_error
from u2moe.runtime.graph.external import external_of
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import SessionSettings

Run = Callable[[], list[Frames]]
MODES = {"streaming": "streaming", "full": "full context"}


@dataclass(frozen=True, kw_only=True)
class WeightsPeer:
    """Another way to compute the encoder.

    Attributes:
        key: in file names and on pages; `name`: in the table.
        kind: format of the experts, "fp32", "int8" or "int4".
        limit: largest relative error of a small model's encoder output that still counts as the same computation:
            float32 sums have another order, and integers round activations and weights, so that a router near a tie
            may choose another expert.
        needed: target for the speedup of our int8; None: no target.
    """

    key: str
    name: str
    kind: str
    limit: float = 0.06
    needed: float | None = None


OURS = WeightsPeer(key="int8", name="ours, int8", kind="int8")
OURS_FLOAT = WeightsPeer(key="float32", name="ours, float32", kind="fp32", limit=0)
TORCH = WeightsPeer(key="torch", name="torch eager, WeNet's loop over experts", kind="fp32", limit=1e-4, needed=3)
QMOE8 = WeightsPeer(key="qmoe8", name="contrib QMoE 8 bit, the rest ours", kind="int8", needed=1.5)
QMOE4 = WeightsPeer(key="qmoe4", name="contrib QMoE 4 bit, the rest ours", kind="int4", needed=1.5)
# inlined, because it does not look into functions and would leave the experts in float32
STOCK = WeightsPeer(key="stock", name="quantize_dynamic, matrices", kind="int8", needed=1.5)
PEERS = (OURS, OURS_FLOAT, TORCH, QMOE8, QMOE4, STOCK)
GROUPS = {"torch": (OURS, OURS_FLOAT, TORCH), "int8": (OURS, QMOE8, QMOE4, STOCK)}
"""Peers that are in memory together."""
REPETITIONS = {"torch": 3, "int8": 5}


class Encoders:
    """All implementations of one model's encoder, created if missing."""

    def __init__(self, root: Path, name: str = MIXTURE) -> None:
        """Open the bundles of preset `name` in a folder."""
        self.bundle = make_bundle(name, FLOAT, root, report)
        self.int8 = make_bundle(name, "int8", root, report)
        self.graph = self.bundle.manifest.model.graphs()[0]
        self.folder = root / name

    def file(self, peer: WeightsPeer) -> Path:
        """The graph of a peer; torch has none."""
        source = self.bundle.path / self.graph.file
        if peer in (OURS, OURS_FLOAT):
            return (self.int8.path if peer == OURS else self.bundle.path) / self.graph.file
        if peer == STOCK:
            inlined = self._made("inlined", partial(graphs.inlined, source))
            return self._made(peer.key, partial(graphs.stock_dynamic, inlined))
        return self._made(peer.key, partial(graphs.contrib_qmoe, source, bits=4 if peer == QMOE4 else 8))

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        folder = self.folder / "peers" / name
        if not folder.is_dir():
            report(f"making {name}")
            unfinished = folder.with_suffix(".partial")
            make(unfinished / self.graph.file)
            unfinished.rename(folder)
        return folder / self.graph.file

    def load(self, peer: WeightsPeer) -> Encoder | TorchEncoder:
        """The encoder of a peer, on one thread."""
        if peer == TORCH:
            torch.set_num_threads(1)
            return TorchEncoder(with_loops(Checkpoint.open(self.folder / "checkpoint").network().encoder))
        file = self.file(peer)
        external = {file.name: external_of(ir.load(file))}
        manifest = dataclasses.replace(self.bundle.manifest, external=external)
        session = Session(file, self.graph, manifest, SessionSettings(num_threads=1, kernels="onnxruntime"))
        return Encoder(session, manifest.model)

    def one_round(self, encoder: Encoder | TorchEncoder, mode: str, frames: Frames) -> Run:
        """A function that does one round of "streaming" or "full" and returns the encoder output, chunk by chunk."""
        if mode == "full":
            return lambda: [encoder.whole(frames)[None]]
        if isinstance(encoder, Encoder):
            return streaming_round(encoder, frames, 1, NUM_CHUNKS["streaming"])
        chunks = list(windows(self.bundle.manifest.model, frames))
        _, caches, offset = encoder.stream(chunks[:NUM_WARM_CHUNKS])
        following = chunks[NUM_WARM_CHUNKS:][: NUM_CHUNKS["streaming"]]
        return lambda: encoder.stream(following, caches, offset)[0]

    def expected(self, mode: str) -> Frames:
        """Encoder output [time, dim] of our float32 graph, stored because loading that graph takes long."""
        file = self.folder / "peers" / f"expected-{mode}.npy"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, joined(self.one_round(self.load(OURS_FLOAT), mode, utterance(self.bundle))))
        found: Frames = np.load(file)
        return found


def joined(run: Run) -> Frames:
    """Encoder output [time, dim] of a round."""
    return np.concatenate([output[0] for output in run()])


def measure(encoders: Encoders, group: str, mode: str, repetitions: int | None = None) -> dict[str, Any]:
    """Seconds of every round and the error against our float32, by the name of the peer."""
    frames = utterance(encoders.bundle)
    runs = {peer.name: encoders.one_round(encoders.load(peer), mode, frames) for peer in GROUPS[group]}
    expected = encoders.expected(mode)
    errors = {name: relative_error(expected, joined(call)) for name, call in runs.items()}  # warms up, too
    cases = {name: timed(call) for name, call in runs.items()}
    seconds = interleaved(cases, repetitions or REPETITIONS[group], warm_up=0)
    return {name: {"seconds": values, "relative_error": errors[name]} for name, values in seconds.items()}


def speedup(cell: Mapping[str, Any], peer: WeightsPeer) -> Spread:
    """Ratio of a peer's time to that of our int8."""
    return ratios(cell[peer.name]["seconds"], cell[OURS.name]["seconds"])


def _cells(content: Mapping[str, Any], mode: str) -> Iterator[tuple[WeightsPeer, Mapping[str, Any]]]:
    """Each peer with the first cell of this mode that has it."""
    own = [cell for key, cell in content["cells"].items() if key.endswith(f"/{mode}")]
    for peer in PEERS:
        if cell := next((cell for cell in own if peer.name in cell), None):
            yield peer, cell


def targets(content: Mapping[str, Any]) -> Iterator[Target]:
    """The speedup of our int8 over each peer."""
    for mode, title in MODES.items():
        for peer, cell in _cells(content, mode):
            if peer.needed:
                name = f"ours in int8 faster than {peer.name} ({peer.kind}), {title}"
                yield Target(name=name, found=speedup(cell, peer), limit=peer.needed, at_most=False)


def values(content: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each peer, how many times as long each takes, and ours in each group."""
    rows: dict[WeightsPeer, list[str]] = {peer: [peer.name, peer.kind] for peer in PEERS}
    found: dict[str, str] = {}
    for mode in MODES:
        for peer, cell in _cells(content, mode):
            times = [1e3 * value / NUM_CHUNKS.get(mode, 1) for value in cell[peer.name]["seconds"]]
            rows[peer] += [quartiles(Spread.of(times), 0), quartiles(speedup(cell, peer))]
            rows[peer] += [f"{cell[peer.name]['relative_error']:.1e}"] if mode == "full" else []
            found[f"{peer.key}.{mode}"] = f"{speedup(cell, peer).median:.2f}"
    header = ("", "experts", "streaming, ms", "x", "full context, ms", "x", "error")
    own = [
        1e3 * statistics.median(cell[OURS.name]["seconds"]) / NUM_CHUNKS["streaming"]
        for key, cell in content["cells"].items()
        if key.endswith("/streaming")
    ]
    found["own_chunks"] = ", ".join(f"{value:.0f}" for value in own)
    return {"table": table(header, rows.values(), left=2), **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.same_weights", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--results", type=Path, help="JSON file; continued if it exists")
    parser.add_argument("--model", default=MIXTURE, help=f"preset with experts (default: {MIXTURE})")
    parser.add_argument("--at-most", type=int, metavar="CELLS", help="stop after this many new cells")
    parser.add_argument("--prepare", action="store_true", help="create the graphs of all peers, and measure nothing")
    args = parser.parse_args(arguments)
    encoders = Encoders(args.folder, args.model)
    for peer in PEERS:
        if peer != TORCH:
            encoders.file(peer)
    results = args.results or results_file("same_weights")
    content = resumed(results, {"model": args.model, "cells": {}})
    cells = [(group, mode) for group in GROUPS for mode in MODES if f"{group}/{mode}" not in content["cells"]]
    for group, mode in [] if args.prepare else cells[: args.at_most]:
        report(f"{group}, {mode}")
        content["cells"][f"{group}/{mode}"] = measure(encoders, group, mode)
        write_json(results, recorded(content))
    print(values(content)["table"] if content["cells"] else "nothing has been measured")


if __name__ == "__main__":
    run_script(main)
