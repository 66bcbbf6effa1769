"""The same weights in other implementations: torch, other graphs, and onnxruntime's own operators and quantizer.

    python -m u2moe.benchmarks.peers.same_weights FOLDER [--results FILE] [--at-most 1]

FOLDER holds the bundles of a random model (`full_size.models`); missing ones, and peers, are created. They do not fit
into memory together, so they are measured in groups that all include our int8, in turn on one thread. Results are
written cell by cell; a second run continues where the first was stopped. The placement of memory changes the times of
a process by several percent while experts are read: `--more` adds the rounds of another process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from u2moe.benchmarks.full_size.models import Artefact, make_artefact
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios, timed
from u2moe.benchmarks.instruments.workload import (
    NUM_CHUNKS,
    NUM_WARM_CHUNKS,
    Frames,
    streaming_round,
    utterance,
    windows,
)
from u2moe.benchmarks.peers import graphs
from u2moe.benchmarks.peers.torch_encoder import TorchEncoder, with_loops
from u2moe.benchmarks.results.files import results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import recorded, resumed
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.export.checkpoint import Checkpoint
from u2moe.quantize.arithmetic import relative_error
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import SessionSettings

Run = Callable[[], list[Frames]]
MIXTURE = "moe-1b"
REFERENCE = "ours, int8"
MODES = {"streaming": "streaming", "full": "full context"}
REPETITIONS = {"torch": 3, "float32": 3, "int8": 5}
"""Rounds of each group, after a warm-up."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another way to compute the encoder.

    Attributes:
        name: its name in the table.
        kind: format of the experts, "fp32", "int8" or "int4".
        limit: largest relative error of a small model's encoder output that still counts as the same computation:
            float32 sums have another order, and integers round activations and weights, so that a router near a tie
            may choose another expert.
        needed: target for the speedup of our int8; None: no target.
    """

    name: str
    kind: str
    limit: float
    needed: float | None = None


FLOAT, INTEGER = 1e-4, 0.06
TORCH = Peer(name="torch eager, WeNet's loop over experts", kind="fp32", limit=FLOAT, needed=3)
MASKED = Peer(name="all experts under a mask", kind="fp32", limit=FLOAT, needed=3)
MOE = Peer(name="contrib MoE", kind="fp32", limit=FLOAT)
QMOE8 = Peer(name="contrib QMoE 8 bit, the rest ours", kind="int8", limit=INTEGER, needed=1.5)
QMOE4 = Peer(name="contrib QMoE 4 bit, the rest ours", kind="int4", limit=INTEGER, needed=1.5)
# inlined, because it does not look into functions and would leave the experts in float32
STOCK = Peer(name="quantize_dynamic, matrices", kind="int8", limit=INTEGER, needed=1.5)
# its convolutions have one scale for all frames, which the loudest of them decides: the error depends on the recording,
# and was 0.04 to 0.104 in parts of the clips of two demo models
STOCK_ALL = Peer(name="quantize_dynamic, all it can", kind="int8", limit=0.15, needed=1.5)
OURS = Peer(name=REFERENCE, kind="int8", limit=INTEGER)
OURS_FLOAT = Peer(name="ours, float32", kind="fp32", limit=0)
GROUPS: Mapping[str, tuple[Peer, ...]] = {
    "torch": (OURS, OURS_FLOAT, TORCH),
    "float32": (OURS, MASKED, MOE),
    "int8": (OURS, QMOE8, QMOE4, STOCK, STOCK_ALL),
}
"""Peers that are in memory together."""
KEYS = {
    TORCH: "torch",
    MASKED: "masked",
    MOE: "moe",
    QMOE8: "qmoe8",
    QMOE4: "qmoe4",
    STOCK: "stock",
    STOCK_ALL: "stock_all",
}
"""Keys of peers in file names and on pages."""
ALL_PEERS = tuple(dict.fromkeys(peer for group in GROUPS.values() for peer in group))


class Peers:
    """All implementations of one model's encoder, created if missing."""

    def __init__(self, artefact: Artefact, progress: Callable[[str], None] = lambda _: None) -> None:
        self.artefact = artefact
        self.bundle = Bundle.open(artefact.bundle("fp32"), verify=False)
        self.graph = self.bundle.manifest.model.graphs()[0]
        self.source = self.bundle.path / self.graph.file
        self.folder = artefact.folder / "peers"
        self.progress = progress

    def file(self, peer: Peer) -> Path:
        """The graph of a peer; torch has none."""
        if peer == OURS:
            return self.artefact.bundle("int8") / self.graph.file
        if peer == OURS_FLOAT:
            return self.source
        ways: dict[Peer, Callable[[Path], None]] = {
            MASKED: partial(graphs.masked, self.source),
            MOE: partial(graphs.contrib_moe, self.source),
            QMOE8: partial(graphs.contrib_qmoe, self.source, bits=8),
            QMOE4: partial(graphs.contrib_qmoe, self.source, bits=4),
            STOCK: partial(self._stock, matmuls_only=True),
            STOCK_ALL: partial(self._stock, matmuls_only=False),
        }
        return self._made(KEYS[peer], ways[peer])

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        file = self.folder / name / self.graph.file
        if not (self.folder / name).is_dir():
            self.progress(f"making {name}")
            partial_folder = self.folder / f"{name}.partial"
            make(partial_folder / self.graph.file)
            partial_folder.rename(self.folder / name)
        return file

    def _stock(self, target: Path, *, matmuls_only: bool) -> None:
        inlined = self._made("inlined", partial(graphs.inlined, self.source))
        graphs.stock_dynamic(inlined, target, matmuls_only=matmuls_only)

    def load(self, peer: Peer) -> Encoder | TorchEncoder:
        """The encoder of a peer, on one thread."""
        if peer == TORCH:
            torch.set_num_threads(1)
            return TorchEncoder(with_loops(Checkpoint.open(self.artefact.checkpoint).network().encoder))
        manifest = self.bundle.manifest
        session = Session(self.file(peer), self.graph, manifest, SessionSettings(num_threads=1, kernels="onnxruntime"))
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
        file = self.folder / f"expected-{mode}.npy"
        if not file.exists():
            self.progress(f"what to expect, {mode}")
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, _joined(self.one_round(self.load(OURS_FLOAT), mode, utterance(self.bundle))))
        found: Frames = np.load(file)
        return found

    def make(self, wanted: Iterable[Peer]) -> None:
        """Create everything that these need, so that measuring only loads and runs."""
        for peer in wanted:
            if peer != TORCH:
                self.file(peer)
        for mode in MODES:
            self.expected(mode)


def run(
    root: Path,
    results: Path,
    *,
    name: str = MIXTURE,
    groups: Mapping[str, Sequence[Peer]] = GROUPS,
    at_most: int | None = None,
    repetitions: int | None = None,
    more: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure the missing cells (a group in a mode), and write the results after each.

    Args:
        root: folder of the bundles.
        results: JSON file, which may already hold cells.
        name: preset of `random_checkpoint`, one with experts.
        groups: peers that are measured in turn.
        at_most: stop after this many new cells.
        repetitions: rounds of a cell; None: the default of its group.
        more: also measure existing cells, and add the rounds of this process to them.
        progress: called with a line for each step.
    """
    content = resumed(results, {"model": name, "cells": {}})
    wanted = [(group, mode) for group in groups for mode in MODES]
    missing = [(group, mode) for group, mode in wanted if more or f"{group}/{mode}" not in content["cells"]][:at_most]
    peers = Peers(make_artefact(name, root, progress=progress), progress)
    frames = utterance(peers.bundle)
    encoders: dict[str, Encoder | TorchEncoder] = {}
    for group, modes in groupby(missing, key=itemgetter(0)):
        encoders.clear()  # frees the memory for the group to come
        encoders |= {peer.name: peers.load(peer) for peer in groups[group]}
        for _, mode in modes:
            progress(f"{group}, {mode}")
            runs = {peer: peers.one_round(encoder, mode, frames) for peer, encoder in encoders.items()}
            measured = _measure(runs, peers.expected(mode), repetitions or REPETITIONS[group])
            before = content["cells"].get(f"{group}/{mode}", {})
            content["cells"][f"{group}/{mode}"] = {
                name: {**item, "seconds": [*before.get(name, {}).get("seconds", ()), *item["seconds"]]}
                for name, item in measured.items()
            }
            write_json(results, recorded(content))
    return content


def _measure(runs: Mapping[str, Run], expected: Frames, repetitions: int) -> dict[str, dict[str, Any]]:
    """Seconds of every round and the error against the expected output, by the name of the peer."""
    errors = {name: relative_error(expected, _joined(call)) for name, call in runs.items()}  # warms up, too
    cases = {name: timed(call) for name, call in runs.items()}
    seconds = interleaved(cases, repetitions, warm_up=0)
    return {name: {"seconds": values, "relative_error": errors[name]} for name, values in seconds.items()}


def _joined(run: Run) -> Frames:
    """Encoder output [time, dim] of a round."""
    return np.concatenate([output[0] for output in run()])


def speedup(cell: Mapping[str, Any], peer: Peer) -> Spread:
    """Ratio of a peer's time to that of our int8."""
    return ratios(cell[peer.name]["seconds"], cell[REFERENCE]["seconds"])


def _cell(content: Mapping[str, Any], peer: Peer, mode: str) -> dict[str, Any] | None:
    """The first cell of this mode with this peer."""
    cells = content["cells"].items()
    return next((cell for key, cell in cells if key.endswith(f"/{mode}") and peer.name in cell), None)


def targets(content: Mapping[str, Any]) -> list[Target]:
    """The speedup of our int8 over each peer, against its target."""
    measured = [(peer, mode, _cell(content, peer, mode)) for peer in ALL_PEERS if peer.needed for mode in MODES]
    return [
        Target(
            name=f"ours in int8 faster than {peer.name} ({peer.kind}), {MODES[mode]}",
            found=speedup(cell, peer),
            limit=peer.needed or 0,
            at_most=False,
        )
        for peer, mode, cell in measured
        if cell is not None
    ]


def values(content: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each peer, how many times as long each takes, and ours in each group."""
    header = ("", "experts", "streaming, ms", "x", "full context, ms", "x", "error")
    own = [
        1e3 * statistics.median(cell[REFERENCE]["seconds"]) / NUM_CHUNKS["streaming"]
        for key, cell in content["cells"].items()
        if key.endswith("/streaming")
    ]
    ratios_of = {
        f"{KEYS[peer]}.{mode}": f"{speedup(cell, peer).median:.2f}"
        for peer in KEYS
        for mode in MODES
        if (cell := _cell(content, peer, mode)) is not None
    }
    return {
        "table": table(header, (_row(content, peer) for peer in ALL_PEERS), left=2),
        "own_chunks": ", ".join(f"{value:.0f}" for value in own),
        **ratios_of,
    }


def _row(content: Mapping[str, Any], peer: Peer) -> tuple[str, ...]:
    parts, errors = [], []
    for mode in MODES:
        cell = _cell(content, peer, mode)
        if cell is None:
            parts += ["not measured", ""]
            continue
        num_chunks = NUM_CHUNKS.get(mode, 1)
        spread = Spread.of([1e3 * value / num_chunks for value in cell[peer.name]["seconds"]])
        parts += [quartiles(spread, 0), quartiles(speedup(cell, peer))]
        errors.append(cell[peer.name]["relative_error"])
    return peer.name, peer.kind, *parts, f"{max(errors):.1e}" if errors else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("peers.same_weights", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--results", type=Path, help="JSON file; continued if it exists")
    parser.add_argument("--model", default=MIXTURE, help=f"preset with experts (default: {MIXTURE})")
    parser.add_argument("--at-most", type=int, metavar="CELLS", help="stop after this many new cells")
    parser.add_argument("--more", action="store_true", help="also add rounds to existing cells")
    parser.add_argument("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS))
    parser.add_argument("--make", action="store_true", help="create the graphs of all peers, and measure nothing")
    args = parser.parse_args(arguments)
    groups = {name: GROUPS[name] for name in args.groups}
    if args.make:
        peers = Peers(make_artefact(args.model, args.folder, progress=report), report)
        peers.make(peer for peer in ALL_PEERS if any(peer in group for group in groups.values()))
        return
    options = {"name": args.model, "groups": groups, "at_most": args.at_most, "more": args.more}
    results = args.results or results_file("same_weights")
    content = run(args.folder, results, **options, progress=report)
    missing = [f"{group}/{mode}" for group in GROUPS for mode in MODES if f"{group}/{mode}" not in content["cells"]]
    print(f"{results}: missing {', '.join(missing)}" if missing else f"{results}: complete")


if __name__ == "__main__":
    run_script(main)
