"""How do the same weights run by other means? Torch as WeNet uses it, onnxruntime's QMoE, and its own quantizer.

    python -m u2moe.benchmarks.studies.same_weights FOLDER [--prepare] [--results FILE]

FOLDER holds the bundles of MoE-1B (`random_models`); missing ones, and the graphs of peers, are created. All encode the
same speech in turn, in one process of about 13 GB, on onnxruntime alone and one thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass

from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios, spread_of, timed
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
from u2moe.benchmarks.results.provenance import measured_here
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.qmoe import qmoe, save_used
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
REPETITIONS = 5


@dataclass(frozen=True, kw_only=True)
class WeightsPeer:
    """A way to compute the encoder.

    Attributes:
        key: in results; `name`: in the table.
        limit: largest relative error of a small model's encoder output that still counts as the same computation:
            float32 sums have another order, and integers round activations and weights, so that a router near a tie
            may choose another expert.
    """

    key: str
    name: str
    limit: float = 0.06


OURS = WeightsPeer(key="int8", name="u2moe, int8")
OURS_FLOAT = WeightsPeer(key="float32", name="u2moe, float32", limit=0)
TORCH = WeightsPeer(key="torch", name="torch eager, WeNet's loop over experts, float32", limit=1e-4)
QMOE = WeightsPeer(key="qmoe8", name="onnxruntime's QMoE in 8 bit, the rest u2moe")
STOCK = WeightsPeer(key="stock", name="onnxruntime's quantize_dynamic of our graph")
PEERS = (OURS, OURS_FLOAT, TORCH, QMOE, STOCK)


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
        folder = self.folder / "peers" / peer.key
        if not folder.is_dir():
            report(f"making {peer.key}")
            unfinished = folder.with_suffix(".partial")
            unfinished.mkdir(parents=True, exist_ok=True)
            (qmoe if peer == QMOE else stock)(source, unfinished / self.graph.file)
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


def stock(source: Path, target: Path) -> None:
    """Write the encoder as onnxruntime's `quantize_dynamic` makes it, with matrices per channel.

    It does not look into functions, so these are inlined before. Convolutions stay: ConvInteger is slow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - takes seconds to import

    inlined = target.with_name("inlined.onnx")
    save_used(InlinePass()(ir.load(source)).model, inlined)
    quantize_dynamic(
        inlined, target, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=inlined.with_name(f"{inlined.name}.data").exists(),
    )  # fmt: skip


def joined(run: Run) -> Frames:
    """Encoder output [time, dim] of a round."""
    return np.concatenate([output[0] for output in run()])


def measure(encoders: Encoders, mode: str, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """By peer `ms` of a chunk or of ten seconds, `times` as long as our int8, and the `error` against our float32."""
    frames = utterance(encoders.bundle)
    runs = {peer.key: encoders.one_round(encoders.load(peer), mode, frames) for peer in PEERS}
    outputs = {key: joined(run) for key, run in runs.items()}  # warms up, too
    seconds = interleaved({key: timed(run) for key, run in runs.items()}, repetitions, warm_up=0)
    return {
        key: {
            "ms": Spread.of([1e3 * value / NUM_CHUNKS.get(mode, 1) for value in own]).data(),
            "times": ratios(own, seconds[OURS.key]).data(),
            "error": relative_error(outputs[OURS_FLOAT.key], outputs[key]),
        }
        for key, own in seconds.items()
    }


def targets(content: Mapping[str, Any]) -> Iterator[Target]:
    """How many times as fast our int8 is to be as torch."""
    for mode, title in MODES.items():
        name, found = (
            f"u2moe in int8 faster than {TORCH.name}, {title}",
            spread_of(content["modes"][mode]["torch"]["times"]),
        )
        yield Target(name=name, found=found, limit=3, at_most=False)


def values(content: Mapping[str, Any]) -> dict[str, str]:
    """Values for the pages: a row for each peer, and how many times as long each takes."""
    rows = []
    found: dict[str, str] = {}
    for peer in PEERS:
        cells = [content["modes"][mode][peer.key] for mode in MODES]
        shown = [(quartiles(spread_of(cell["ms"]), 0), quartiles(spread_of(cell["times"]))) for cell in cells]
        rows.append([peer.name, *(text for pair in shown for text in pair), f"{cells[-1]['error']:.1e}"])
        found |= {
            f"{peer.key}.{mode}": f"{cell['times']['median']:.2f}" for mode, cell in zip(MODES, cells, strict=True)
        }
    header = ("", "a chunk, ms", "times as long", "ten seconds, ms", "times as long", "error")
    return {"table": table(header, rows), **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.same_weights", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--results", type=Path, metavar="JSON", help="file for the results")
    parser.add_argument("--model", default=MIXTURE, help=f"preset with experts (default: {MIXTURE})")
    parser.add_argument("--prepare", action="store_true", help="create the graphs of all peers, and measure nothing")
    args = parser.parse_args(arguments)
    encoders = Encoders(args.folder, args.model)
    for peer in (OURS, OURS_FLOAT, QMOE, STOCK):
        encoders.file(peer)
    if not args.prepare:
        content = {**measured_here(), "modes": {mode: measure(encoders, mode) for mode in MODES}}
        write_json(args.results or results_file("same_weights"), content)
        print(values(content)["table"])


if __name__ == "__main__":
    run_script(main)
