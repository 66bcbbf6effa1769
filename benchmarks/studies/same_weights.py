"""How fast is the same network in eager torch, which WeNet uses? Compares torch's encoder with ours.

    python -m u2moe.benchmarks.studies.same_weights FOLDER [--prepare]

FOLDER receives bundles of MoE-1B (`random_models`) if they are missing. The encoders process the same speech in turn,
in one process on one thread. Ours run without native kernels. The torch network is the exporter's reference. It uses
WeNet's loop over experts, which selects and adds rows for one expert at a time. Other differences favour torch: its
caches (keys, values and convolution history) are at least as good as WeNet's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from u2moe.benchmarks.bench.terminal import spread
from u2moe.benchmarks.instruments import workload
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios, spread_of, timed
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_CHUNKS, NUM_LEFT_CHUNKS, NUM_WARM_CHUNKS, Frames
from u2moe.benchmarks.results.files import publish
from u2moe.benchmarks.results.markdown import Target, table
from u2moe.benchmarks.studies.shared.random_models import FLOAT, MIXTURE, make_bundle
from u2moe.benchmarks.studies.shared.script import script, study_parser
from u2moe.export.encoders.network import BlockCaches, SpeechEncoder
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.random_checkpoint import random_source, spread_routers
from u2moe.quantize.arithmetic import relative_error
from u2moe.runtime import Bundle, SessionSettings
from u2moe.runtime.model.encoder import Encoder, required_cache_size

Run = Callable[[], list[Frames]]
MODES = {"streaming": "streaming", "full": "full context"}
REPETITIONS = 5
INT8, FLOAT32, TORCH = "int8", "float32", "torch"
PEERS = {INT8: "u2moe, int8", FLOAT32: "u2moe, float32", TORCH: "torch eager, WeNet's loop over experts, float32"}


class LoopedExperts(nn.Module):
    """A layer of experts with our weights, computed as in WeNet's `MoEFFNLayer`."""

    def __init__(self, layer: MixtureOfExperts) -> None:
        super().__init__()
        self.gate = layer.gate
        self.experts = layer.experts
        self.num_experts_per_token = layer.num_experts_per_token

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [batch, time, dim] for x [batch, time, dim]."""
        tokens = x.view(-1, x.shape[-1])
        logits, chosen = torch.topk(self.gate(tokens), self.num_experts_per_token)
        shares = torch.softmax(logits, dim=1, dtype=torch.float32).to(x.dtype)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            output[rows] += shares[rows, places, None] * expert(tokens[rows])
        return output.view(x.shape)


@torch.inference_mode()
def stream(
    encoder: SpeechEncoder, chunks: list[Frames], caches: list[BlockCaches] | None = None, offset: int = 0
) -> tuple[list[Frames], list[BlockCaches] | None, int]:
    """Encode chunks [1, frames, mel] in order. Return their outputs, the caches and the next position."""
    required, outputs = required_cache_size(CHUNK_SIZE, NUM_LEFT_CHUNKS), []
    for chunk in chunks:
        output, caches = encoder.forward_chunk(torch.from_numpy(chunk), offset, caches, required)
        outputs.append(cast("Frames", output.numpy()))
        offset += output.shape[1]
    return outputs, caches, offset


def encoders(root: Path, model: str) -> tuple[Bundle, dict[str, Encoder | SpeechEncoder]]:
    """Return a preset's float32 bundle, and an encoder for each key of `PEERS`. Missing bundles are made in `root`."""
    bundle, settings = make_bundle(model, FLOAT, root), SessionSettings(num_threads=1, kernels="onnxruntime")
    source = random_source(root / model)
    tensors = {name: torch.from_numpy(tensor.numpy()) for name, tensor in source.tensors.items()}  # draw only once
    network = replace(source, tensors=tensors).network()
    spread_routers(network)
    for module in list(network.encoder.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, MixtureOfExperts):
                setattr(module, name, LoopedExperts(part))
    torch.set_num_threads(1)
    return bundle, {
        INT8: make_bundle(model, "int8", root).load(settings).encoder,
        FLOAT32: bundle.load(settings).encoder,
        TORCH: network.encoder,
    }


def one_round(encoder: Encoder | SpeechEncoder, mode: str, frames: Frames, bundle: Bundle) -> Run:
    """Return a function that runs a round in a mode ("streaming", "full") and returns the output for each chunk."""
    if isinstance(encoder, Encoder):
        if mode == "full":
            return lambda: [encoder.whole(frames)[None]]
        return workload.streaming_round(encoder, frames, 1, NUM_CHUNKS["streaming"])
    if mode == "full":
        whole, lengths = torch.from_numpy(frames[np.newaxis]), torch.tensor([len(frames)])
        return cast("Run", torch.inference_mode()(lambda: [encoder(whole, lengths)[0].numpy()]))
    chunks = list(workload.complete_windows(bundle.manifest.model, frames))
    _, caches, offset = stream(encoder, chunks[:NUM_WARM_CHUNKS])
    following = chunks[NUM_WARM_CHUNKS:][: NUM_CHUNKS["streaming"]]
    return lambda: stream(encoder, following, caches, offset)[0]


def measure(root: Path, model: str = MIXTURE) -> dict[str, Any]:
    """Return, by mode and peer, the `ms` of a chunk or an utterance, its ratio to int8, and the `error` to float32."""
    bundle, own = encoders(root, model)
    frames, modes = workload.utterance(bundle), dict[str, dict[str, Any]]()
    for mode in MODES:
        runs = {key: one_round(encoder, mode, frames, bundle) for key, encoder in own.items()}
        # These runs are also the warm-up.
        outputs = {key: np.concatenate([output[0] for output in run()]) for key, run in runs.items()}
        seconds = interleaved({key: timed(run) for key, run in runs.items()}, REPETITIONS, warm_up=0)
        modes[mode] = {}
        for key, found in seconds.items():
            times = Spread.of([1e3 * value / NUM_CHUNKS.get(mode, 1) for value in found])
            error = relative_error(outputs[FLOAT32], outputs[key])
            modes[mode][key] = {"ms": times.data(), "times": ratios(found, seconds[INT8]).data(), "error": error}
    return {"modes": modes}


def targets(content: Mapping[str, Any]) -> Iterator[Target]:
    """Yield, for each mode, the minimum ratio of torch's time to that of u2moe with int8."""
    for mode, title in MODES.items():
        found = spread_of(content["modes"][mode][TORCH]["times"])
        yield Target(name=f"time of {PEERS[TORCH]} / time of u2moe, int8, {title}", found=found, limit=3, at_most=False)


def values(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a table with a row for each peer, and each peer's time relative to that of int8."""
    rows, found = [], dict[str, str]()
    for key, name in PEERS.items():
        cells = {mode: content["modes"][mode][key] for mode in MODES}
        shown = [(spread(cell["ms"], 1, 0), spread(cell["times"], 1, 2)) for cell in cells.values()]
        rows.append([name, *(text for pair in shown for text in pair), f"{cells['full']['error']:.1e}"])
        found |= {f"{key}.{mode}": f"{cell['times']['median']:.2f}" for mode, cell in cells.items()}
    header = ("", "chunk, ms", "ratio", "ten seconds, ms", "ratio", "error")
    return {"table": table(header, rows), **found}


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("same_weights", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--prepare", action="store_true", help="only create missing bundles; do not measure")
    args = parser.parse_args(arguments)
    if args.prepare:
        make_bundle(MIXTURE, "int8", args.folder)
    else:
        publish(args.results, measure(args.folder), values)
