"""The same weights by other means, beside ours: torch, other graphs, and onnxruntime's own operators and quantizer.

    python -m u2moe.benchmarks.kernel_peers FOLDER --results kernel_peers.json [--at-most 1]

FOLDER holds the bundles of a random model (`artefacts`), its whole encoder; what is missing there is made, peers too.
They do not fit into memory together: they are measured group by group, our int8 in every group, all of a group in
turn, one thread. Results are written cell by cell; a second run goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from u2moe.benchmarks import peer_graphs
from u2moe.benchmarks.artefacts import Artefact, make_artefact
from u2moe.benchmarks.machine import describe_machine
from u2moe.benchmarks.measurement import Spread, interleaved
from u2moe.benchmarks.torch_peer import TorchEncoder, with_loops
from u2moe.benchmarks.utterances import (
    CHUNK_S,
    NUM_CHUNKS,
    NUM_WARM_CHUNKS,
    UTTERANCE_S,
    Frames,
    streaming_round,
    utterance,
    windows,
)
from u2moe.export.checkpoint import Checkpoint
from u2moe.export.random_checkpoint import PRESETS, random_config, write_random_checkpoint
from u2moe.quantize.arithmetic import relative_error
from u2moe.runtime.bundle import Bundle
from u2moe.runtime.encoder import Encoder
from u2moe.runtime.session import Session, SessionSettings

Run = Callable[[], list[Frames]]
REFERENCE = "ours, int8"
MODES = ("streaming", "full")
REPETITIONS = 5


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another way to compute the encoder.

    Attributes:
        name: as the table shows it.
        kind: "fp32" or "int8" or "int4": of the experts.
        limit: relative error of the encoder output of a small model that is still the same computation: float32 adds
            in another order; integers round activations and weights, and a router that is nearly undecided may then
            choose another expert.
        needed: how many times as fast ours in int8 shall be; None: nothing was set.
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
QMOE8_STOCK = Peer(name="contrib QMoE 8 bit, the rest quantize_dynamic", kind="int8", limit=INTEGER, needed=1.5)
STOCK = Peer(name="quantize_dynamic after inlining, MatMul", kind="int8", limit=INTEGER, needed=1.5)
# its convolutions have one scale for all frames that they see
STOCK_ALL = Peer(name="quantize_dynamic after inlining, all it can", kind="int8", limit=0.1, needed=1.5)
STOCK_CALLS = Peer(name="quantize_dynamic, experts stay float32", kind="fp32", limit=INTEGER, needed=1.5)
OURS = Peer(name=REFERENCE, kind="int8", limit=INTEGER)
OURS_FLOAT = Peer(name="ours, float32", kind="fp32", limit=0)
GROUPS: Mapping[str, tuple[Peer, ...]] = {
    "torch": (OURS, OURS_FLOAT, TORCH),
    "float32": (OURS, MASKED, MOE),
    "int8": (OURS, QMOE8, QMOE4, STOCK),
    "stock": (OURS, QMOE8_STOCK, STOCK_ALL, STOCK_CALLS),
}
"""What is in memory together."""


class Peers:
    """The encoders of one model by all means, made where they are missing."""

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
        source = self.source
        ways: dict[Peer, tuple[str, Callable[[Path], None]]] = {
            MASKED: ("masked", partial(peer_graphs.masked, source)),
            MOE: ("moe", partial(peer_graphs.contrib_moe, source)),
            QMOE8: ("qmoe8", partial(peer_graphs.contrib_qmoe, source, bits=8, our_rest=True)),
            QMOE4: ("qmoe4", partial(peer_graphs.contrib_qmoe, source, bits=4, our_rest=True)),
            QMOE8_STOCK: ("qmoe8_stock", self._stock_around_qmoe),
            STOCK: ("stock", partial(self._stock_inlined, matmuls_only=True)),
            STOCK_ALL: ("stock_all", partial(self._stock_inlined, matmuls_only=False)),
            STOCK_CALLS: ("stock_calls", partial(peer_graphs.stock_dynamic, source, matmuls_only=True)),
        }
        return self._made(*ways[peer])

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        file = self.folder / name / self.graph.file
        if not (self.folder / name).is_dir():
            self.progress(f"making {name}")
            partial_folder = self.folder / f"{name}.partial"
            make(partial_folder / self.graph.file)
            partial_folder.rename(self.folder / name)
        return file

    def _stock_inlined(self, target: Path, *, matmuls_only: bool) -> None:
        inlined = self._made("inlined", partial(peer_graphs.inlined, self.source))
        peer_graphs.stock_dynamic(inlined, target, matmuls_only=matmuls_only)

    def _stock_around_qmoe(self, target: Path) -> None:
        make = partial(peer_graphs.contrib_qmoe, self.source, bits=8, our_rest=False)
        peer_graphs.stock_dynamic(self._made("qmoe8_alone", make), target, matmuls_only=True)

    def encoder(self, peer: Peer) -> Encoder:
        """A peer that onnxruntime runs, on one thread."""
        manifest = self.bundle.manifest
        session = Session(self.file(peer), self.graph, manifest, SessionSettings(num_threads=1))
        return Encoder(session, manifest.model)

    def torch_encoder(self) -> TorchEncoder:
        """The peer that torch runs, on one thread."""
        directory = self.folder / "checkpoint"
        if not (directory / "final.pt").exists():
            self.progress("making a checkpoint")
            write_random_checkpoint(directory, random_config(**PRESETS[self.artefact.name]))
        torch.set_num_threads(1)
        return TorchEncoder(with_loops(Checkpoint.open(directory).network().encoder))

    def one_round(self, peer: Peer, mode: str, frames: Frames) -> Run:
        """What one round of "streaming" or "full" does; returns the encoder output, chunk by chunk."""
        if peer == TORCH:
            encoder = self.torch_encoder()
            if mode == "full":
                return lambda: [encoder.whole(frames)[None]]
            chunks = list(windows(self.bundle.manifest.model, frames))
            _, caches, offset = encoder.stream(chunks[:NUM_WARM_CHUNKS])
            following = chunks[NUM_WARM_CHUNKS:][: NUM_CHUNKS["streaming"]]
            return lambda: encoder.stream(following, caches, offset)[0]
        graph = self.encoder(peer)
        if mode == "full":
            return lambda: [graph.whole(frames)[None]]
        return streaming_round(graph, frames, 1, NUM_CHUNKS["streaming"])


def run(
    root: Path,
    results: Path,
    *,
    name: str = "moe-1b",
    groups: Mapping[str, Sequence[Peer]] = GROUPS,
    at_most: int | None = None,
    repetitions: int = REPETITIONS,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what the results lack, and write them after every cell, which is a mode of a group.

    Args:
        root: folder of the bundles.
        results: JSON file, which may hold cells already.
        name: preset of `random_checkpoint`, one with experts.
        groups: peers that are measured in turn.
        at_most: stop after so many new cells.
        repetitions: rounds of a cell.
        progress: called with a line for each step.
    """
    content: dict[str, Any] = {"model": name, "machine": describe_machine(), "cells": {}}
    if results.exists():
        content = json.loads(results.read_text(encoding="utf-8"))
    wanted = [(group, mode) for group in groups for mode in MODES]
    missing = [(group, mode) for group, mode in wanted if f"{group}/{mode}" not in content["cells"]][:at_most]
    peers = Peers(make_artefact(name, root, progress=progress), progress)
    frames = utterance(peers.bundle)
    for group, mode in missing:
        progress(f"{group}, {mode}")
        content["cells"][f"{group}/{mode}"] = _measure(peers, groups[group], mode, frames, repetitions)
        content["machine"] = describe_machine()
        written = results.with_suffix(".partial")
        written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        written.replace(results)
    return content


def _measure(
    peers: Peers, group: Sequence[Peer], mode: str, frames: Frames, repetitions: int
) -> dict[str, dict[str, Any]]:
    """Seconds of every round and the error against our float32 graph, by the name of the peer."""
    expected = _joined(peers.one_round(OURS_FLOAT, mode, frames))  # loaded for this, and dropped
    runs = {peer.name: peers.one_round(peer, mode, frames) for peer in group}
    errors = {name: relative_error(expected, _joined(call)) for name, call in runs.items()}
    seconds = interleaved({name: _timed(call) for name, call in runs.items()}, repetitions)
    return {name: {"seconds": values, "relative_error": errors[name]} for name, values in seconds.items()}


def _joined(run: Run) -> Frames:
    """Encoder output [time, dim] of a round."""
    outputs = [output[0] for output in run()]
    return np.concatenate(outputs)


def _timed(run: Run) -> Callable[[], float]:
    def timed() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return timed


def speedup(content: Mapping[str, Any], peer: str, mode: str) -> float:
    """How many times as long a peer takes as ours in int8: the median over rounds, in which the two took turns."""
    cell = _cell(content, peer, mode)
    pairs = zip(cell[peer]["seconds"], cell[REFERENCE]["seconds"], strict=True)
    return float(statistics.median(peers / ours for peers, ours in pairs))


def _cell(content: Mapping[str, Any], peer: str, mode: str) -> dict[str, Any]:
    """The first cell with this peer."""
    cells = content["cells"].items()
    found: dict[str, Any] = next(cell for key, cell in cells if key.endswith(f"/{mode}") and peer in cell)
    return found


TEXT = f"""Measured on {{machine}}: encoder of {{model}} with the same weights and the same speech, one thread.
Streaming: milliseconds per chunk of 16 frames ({1e3 * CHUNK_S:.0f} ms of audio) with 4 chunks left; full context:
milliseconds for {UTTERANCE_S:g} s. Medians, quartiles in brackets. "x" is how many times as long it takes as our int8
in the same rounds, and what the targets are for, streaming and full context. Error: norm of the difference from the
encoder output of our float32 graph over its norm; random weights amplify it, since their routers are nearly undecided.
"""


def table(content: Mapping[str, Any]) -> str:
    """The results as Markdown, with the targets."""
    machine = content["machine"]
    text = TEXT.format(
        machine=f"{machine['processor']}, onnxruntime {machine['onnxruntime']}, commit {machine['commit']}",
        model=content["model"],
    )
    header = ("", "experts", "streaming", "x", "full context", "x", "error", "target")
    lines = [text, f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    shown = dict.fromkeys(peer for group in GROUPS.values() for peer in group)
    names = {name for cell in content["cells"].values() for name in cell}
    lines += [_row(content, peer) for peer in shown if peer.name in names]
    return "\n".join(lines) + "\n"


def _row(content: Mapping[str, Any], peer: Peer) -> str:
    parts, factors, errors = [], [], []
    for mode, rounds in (("streaming", NUM_CHUNKS["streaming"]), ("full", 1)):
        item = _cell(content, peer.name, mode)[peer.name]
        spread = Spread.of([1e3 * value / rounds for value in item["seconds"]])
        factors.append(speedup(content, peer.name, mode))
        parts += [f"{spread.median:.0f} ({spread.low:.0f}-{spread.high:.0f})", f"{factors[-1]:.2f}"]
        errors.append(item["relative_error"])
    verdict = ""
    if peer.needed is not None:
        reached = ", ".join("met" if factor >= peer.needed else "**not met**" for factor in factors)
        verdict = f"{peer.needed:g} x: {reached}"
    return f"| {peer.name} | {peer.kind} | {' | '.join(parts)} | {max(errors):.1e} | {verdict} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m u2moe.benchmarks.kernel_peers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where the bundles lie, or are made")
    parser.add_argument("--results", type=Path, required=True, help="JSON file, continued if it is there")
    parser.add_argument("--model", default="moe-1b", help="preset with experts (default: moe-1b)")
    parser.add_argument("--at-most", type=int, metavar="CELLS", help="end after so many new cells")
    parser.add_argument("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS))
    parser.add_argument("--make", action="store_true", help="make the graphs of all peers, and measure nothing")
    args = parser.parse_args(arguments)
    groups = {name: GROUPS[name] for name in args.groups}
    if args.make:
        peers = Peers(make_artefact(args.model, args.folder, progress=_print), _print)
        for peer in dict.fromkeys(peer for group in groups.values() for peer in group if peer != TORCH):
            peers.file(peer)
        return
    content = run(args.folder, args.results, name=args.model, groups=groups, at_most=args.at_most, progress=_print)
    missing = [f"{group}/{mode}" for group in GROUPS for mode in MODES if f"{group}/{mode}" not in content["cells"]]
    print(f"{args.results}: missing {', '.join(missing)}" if missing else table(content))


def _print(line: str) -> None:
    print(f"- {line}", flush=True)


if __name__ == "__main__":
    main()
