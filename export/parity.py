"""Compares torch with onnxruntime for every graph of a bundle: chunk by chunk, batch by batch, expert by expert."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from u2moe.export.comparison import Array, Comparison, ParityReport, compare_features, compared
from u2moe.export.model import SpeechModel
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.positions import NUM_LEARNED
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.errors import ParityError
from u2moe.runtime.graph.file import array_of
from u2moe.runtime.model.encoder import Encoder, join_rows, split_rows
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import SessionSettings

Pairs = dict[str, list[tuple[Array, Array]]]  # for each tensor, the values from torch and from onnxruntime

NEAR_TIE = 1e-4
"""If a router's k-th largest logit and the next one are closer than this, two correct programs may choose different
experts, and everything downstream differs. If an input has such a tie and its outputs exceed a limit, it proves
nothing, so it is replaced by another."""
MAX_DRAWS = 8
ROUNDING = 4
"""A tensor that exceeds its limit is accepted if its error is at most this multiple of the error of torch in float32.
Both errors are differences from torch in float64. Programs that round in different places have errors of the same size,
but not in the same values."""
MOST_ROUNDING = 100
"""A limit raised for rounding is at most this multiple of the original limit; a higher limit would prove nothing."""
CHUNKS = ((16, -1), (16, 4), (16, 0), (8, 2), (4, 1), (1, 8), (25, -1))
"""(chunk size, left chunks) for the comparison of streams: WeNet's usual values and some unusual ones."""


class Parity:
    """Compares a network with the graphs in a folder. Errors name `subject`, because the folder may be deleted then."""

    def __init__(self, network: SpeechModel, folder: Path, manifest: Manifest, seed: int = 0, *, subject: Path) -> None:
        self.subject, self.network, self.config = subject, network, manifest.model
        settings = SessionSettings(num_threads=torch.get_num_threads())
        graphs = {graph: folder / graph.file for graph in manifest.model.graphs()}
        self.sessions = {graph.name: Session(file, graph, manifest, settings) for graph, file in graphs.items()}
        self.encoder = Encoder(self.sessions["encoder"], manifest.model)
        self.saved = {graph.name: ir.load(file) for graph, file in graphs.items()}
        self.random = np.random.default_rng(seed)
        self.report = ParityReport()
        self.routers = {name: part for name, part in network.named_modules() if isinstance(part, MixtureOfExperts)}
        self.counts = {name: np.zeros(len(part.experts), np.int64) for name, part in self.routers.items()}
        self.margin = np.inf  # the smallest of any routing decision
        self.features = (folder / contract.features().file, manifest)

    @torch.inference_mode()
    def run(self, progress: Callable[[str], None] = lambda _: None) -> ParityReport:
        """Run all comparisons. Raises ParityError, which names the case, tensor, difference and limit."""
        config = self.config
        progress("features")
        self.report.comparisons.append(compare_features(*self.features))
        longest = config.num_features(config.max_position)
        # the number of learned positions is limited, so every one of them is compared
        long = longest if self.network.config.encoder.learned_positions else 700
        for frames in (config.window, config.window + 1, 150, long):
            self._case(f"full context, {frames} frames", partial(self._full_context, frames), progress)
        self._case("padded batch, full context", self._padded_batch, progress)
        if config.streaming:
            for size, left in CHUNKS:
                chunk_size = config.whole_chunk(size)
                frames = 1600 if (size, left) == (16, 4) else 12 * chunk_size * config.subsampling_rate + 5
                frames = min(max(frames, 120), 1600, longest)
                case = f"stream of {frames} frames, chunk {chunk_size}, left {left if left >= 0 else 'all'}"
                self._case(case, partial(self._stream, chunk_size, left, frames), progress)
            self._case("batch of streams at different positions", self._stream_batch, progress)
        if config.decoder != "none":
            self._case("decoder, two utterances", self._decoder, progress)
        for name in self.routers:
            self._case(f"experts of {name}", partial(self._experts, name), progress)
        self.report.tokens_per_expert = {name: counts.tolist() for name, counts in self.counts.items()}
        return self.report

    def _case(self, case: str, compare: Callable[[], Pairs], progress: Callable[[str], None]) -> None:
        """Run one case; repeat it with new inputs if a difference exceeds its limit and a router has a near tie."""
        progress(case)
        for draw in range(MAX_DRAWS):
            self.margin, drawn = np.inf, self.random.bit_generator.state
            with ExitStack() as stack:
                for name, layer in self.routers.items():
                    stack.enter_context(layer.register_forward_pre_hook(partial(self._record, name)))
                pairs = compare()
            comparisons = [compared(case, tensor, parts) for tensor, parts in pairs.items()]
            if all(item.is_equal for item in comparisons):
                break
            if not self.margin < NEAR_TIE or draw + 1 == MAX_DRAWS:
                comparisons = self._compared_exactly(compare, drawn, pairs, comparisons)
                break
            self.report.num_redrawn += 1
        is_tie, sides = self.margin < NEAR_TIE, self.report.sides
        tie = f"; a router has near ties between experts for all {MAX_DRAWS} inputs" if is_tie else ""
        for item in sorted(comparisons, key=lambda item: item.difference / item.limit, reverse=True):
            self.report.add(item, self.subject, sides, tie)
            if item.rounding is not None:
                progress(f"{item.tensor}: equal within rounding: {item.told(sides)}")

    def _record(self, name: str, layer: MixtureOfExperts, inputs: tuple[Tensor, ...]) -> None:
        """Count each expert's tokens, and keep the smallest margin of a routing decision."""
        tokens = inputs[0].reshape(-1, inputs[0].shape[-1])
        logits, k = layer.gate(tokens).sort(dim=-1, descending=True), layer.num_experts_per_token
        self.counts[name] += torch.bincount(logits.indices[:, :k].flatten(), minlength=len(layer.experts)).numpy()
        if k < len(layer.experts) and len(tokens):
            self.margin = min(self.margin, float((logits.values[:, k - 1] - logits.values[:, k]).min()))

    def _compared_exactly(
        self, compare: Callable[[], Pairs], drawn: Any, pairs: Pairs, comparisons: list[Comparison]
    ) -> list[Comparison]:
        """Return `comparisons`. If one exceeds its limit, it is replaced by a comparison with torch in float64."""
        self.random.bit_generator.state = drawn
        single, self.network = self.network, copy.deepcopy(self.network).double()
        try:
            exact = compare()
        finally:
            self.network = single

        def settled(found: Comparison) -> Comparison:
            if found.is_equal:
                return found
            parts, single = exact[found.tensor], pairs[found.tensor]
            own = [(right, torch_value) for (right, _), (torch_value, _) in zip(parts, single, strict=True)]
            rounding = compared(found.case, found.tensor, own).difference
            limit = min(ROUNDING * rounding, MOST_ROUNDING * found.limit)
            return replace(compared(found.case, found.tensor, parts), limit=limit, rounding=rounding)

        return [settled(found) for found in comparisons]

    def _torch(self, values: Array) -> Tensor:
        """Return the values as a torch tensor in the precision of the network."""
        return torch.from_numpy(values).to(self.network.ctc.ctc_lo.weight.dtype)

    def _features(self, *shape: int) -> Array:
        """Return seeded features [*shape, mel] with the statistics of the training data, smooth in time like speech."""
        noise = self.random.standard_normal((*shape, self.config.feature_size))
        smooth = noise.copy()
        smooth[..., 1:, :] = 0.6 * noise[..., 1:, :] + 0.8 * noise[..., :-1, :]
        if (cmvn := self.network.encoder.global_cmvn) is not None:
            smooth = smooth / cmvn.istd.numpy() + cmvn.mean.numpy()
        return smooth.astype(np.float32)

    def _encoded(self, pairs: list[tuple[Array, Array]]) -> Pairs:
        """Return pairs of encoder outputs [1, time, dim], and pairs of the resulting log-probabilities."""
        own = [self.network.ctc(self._torch(one)).numpy() for one, _ in pairs]
        found = (self.sessions["ctc"].run({"encoder_out": out})["log_probs"] for _, out in pairs)
        return {"output": pairs, "log_probs": list(zip(own, map(np.asarray, found), strict=True))}

    def _full_context(self, frames: int) -> Pairs:
        features = self._features(1, frames)
        return self._encoded([(self._torch_full(features), self._whole(features))])

    def _torch_full(self, features: Array) -> Any:
        return self.network.encoder(self._torch(features), torch.tensor([features.shape[1]]))[0].numpy()

    def _whole(self, features: Array) -> Array:
        """Encode a whole utterance as the runtime does: in one call, or in static chunks."""
        static = self.config.static_chunk_size if self.config.streaming else 0
        whole = self.encoder.chunked(features[0], static, -1) if static else self.encoder.whole(features[0])
        return whole[np.newaxis]

    def _padded_batch(self) -> Pairs:
        lengths = np.array([230, 131, self.config.window])
        features = self._features(3, lengths.max())
        if self.config.static_chunk_size and self.config.streaming:
            return self._encoded([(self._torch_full(features[:1]), self._whole(features[:1]))])
        if self.config.streaming:
            start = self.encoder.start(3)
            output, caches = self.encoder.step(features, start, required_cache_size=0, chunk_lens=lengths)
            times = caches.offset
        else:
            result = self.sessions["encoder"].run({"chunk": features, "chunk_lens": lengths})
            output, times = result["output"], result["output_lens"]
        pairs = []
        for row, (length, time) in enumerate(zip(lengths.tolist(), times.tolist(), strict=True)):
            expected = self._torch_full(features[row : row + 1, :length])
            if expected.shape[1] != time:
                raise ParityError(f"{self.subject}: padded batch: output_lens is {time}, expected {expected.shape[1]}")
            pairs.append((expected, np.asarray(output[row : row + 1, :time])))
        return self._encoded(pairs)

    def _windows(self, features: Array, chunk_size: int) -> list[Array]:
        rate, window = self.config.subsampling_rate, self.config.window
        length, stride = self.config.num_features(chunk_size), chunk_size * rate
        return [features[:, start : start + length] for start in range(0, features.shape[1] - window + 1, stride)]

    def _stream(self, chunk_size: int, left: int, frames: int) -> Pairs:
        """Stream through both encoders, each with its own caches. Return a pair per chunk for each output and cache."""
        required = chunk_size * left if left >= 0 else -1
        caches, torch_caches = self.encoder.start(), None
        result: Pairs = {"output": []}
        for window in self._windows(self._features(1, frames), chunk_size):
            offset = int(caches.offset[0])
            chunk = self._torch(window)
            expected, torch_caches = self.network.encoder.forward_chunk(chunk, offset, torch_caches, required)
            output, caches = self.encoder.step(window, caches, required_cache_size=required)
            result["output"].append((expected.numpy(), np.asarray(output)))
            for name, found in caches.tensors.items():
                stacked = torch.stack([own[name] for own in torch_caches if name in own]).numpy()
                result.setdefault(f"r_{name}", []).append((stacked, np.asarray(found)))
        return self._encoded(result["output"]) | result

    def _stream_batch(self) -> Pairs:
        """Check a batch of four streams that have 0, 1, 3 and 7 earlier chunks; one stream's current chunk is short."""
        chunk_size, left = self.config.whole_chunk(8), 3
        required, past = chunk_size * left, (0, 1, 3, 7)
        frames = max(700, self.config.num_features(chunk_size * (max(past) + 1)))
        windows = [self._windows(self._features(1, frames), chunk_size)[: count + 1] for count in past]
        windows[1][-1] = windows[1][-1][:, : self.config.window + self.config.subsampling_rate]
        expected, states = [], []
        for parts in windows:
            state, torch_state, offset, encode = self.encoder.start(), None, 0, self.network.encoder.forward_chunk
            for window in parts[:-1]:
                output, torch_state = encode(self._torch(window), offset, torch_state, required)
                _, state = self.encoder.step(window, state, required_cache_size=required)
                offset += output.shape[1]
            output, _ = encode(self._torch(parts[-1]), offset, torch_state, required)
            expected.append(output.numpy())
            states.append(state)
        lengths = np.array([parts[-1].shape[1] for parts in windows])
        chunk = np.full((len(past), lengths.max(), self.config.feature_size), 7.0, np.float32)
        for row, parts in enumerate(windows):
            chunk[row, : lengths[row]] = parts[-1][0]
        batch = join_rows([split_rows(state, [min(int(state.offset[0]), required)])[0] for state in states])
        found = np.asarray(self.encoder.step(chunk, batch, required_cache_size=required, chunk_lens=lengths)[0])
        return self._encoded([(each, found[row : row + 1, : each.shape[1]]) for row, each in enumerate(expected)])

    def _decoder(self) -> Pairs:
        """Compare scores for two utterances of different lengths, which torch scores one at a time."""
        # with learned positions, there are two hypotheses: an empty and the longest possible one
        is_learned = self.network.left_decoder.config.learned_positions
        frames, num, longest = (40, 23), *((2, NUM_LEARNED - 1) if is_learned else (6, 24))
        memory = self.random.standard_normal((2, max(frames), self.config.output_size)).astype(np.float32)
        tokens = self.random.integers(0, self.config.vocab_size, (2, num, longest))
        lengths = self.random.integers(1, longest, (2, num))
        lengths[:, 0], lengths[:, 1] = 0, longest
        feeds: dict[str, Array] = {"hyps": tokens, "hyps_lens": lengths, "encoder_out": memory}
        feeds["encoder_lens"] = np.array(frames)
        result = self.sessions["decoder"].run(feeds)
        pairs: Pairs = {}
        for row, time in enumerate(frames):
            rows = self._torch(memory[row : row + 1, :time]).expand(num, -1, -1)
            hypotheses = torch.from_numpy(tokens[row]), torch.from_numpy(lengths[row])
            scores = self.network.score(*hypotheses, rows, torch.full((num,), time))
            for name, value in zip(("score", "r_score", "next_log_probs"), scores, strict=True):
                if value is not None:
                    pairs.setdefault(name, []).append((value.numpy(), result[name][row]))
        return pairs

    def _experts(self, name: str) -> Pairs:
        """Compare a mixture node with the torch layer, on random tokens and on tokens that reach each expert."""
        session = moe_session(self.saved[name.split(".", 1)[0]], name)
        block, layer = self.network.get_submodule(name.rpartition(".")[0]), self.network.get_submodule(name)
        scale = getattr(block, "scale", 1.0)  # the weights in the graph include it
        gate = cast("MixtureOfExperts", layer).gate.weight.float()
        toward = torch.linalg.pinv(gate) * (3 / gate.norm(dim=1).clamp(min=1e-3)).max()
        spread = torch.from_numpy(self.random.standard_normal((64, gate.shape[1])).astype(np.float32))
        inputs = [spread, spread[:1]]
        inputs += [toward[:, expert] * 3 + 0.2 * spread[: 1 + expert] for expert in range(len(gate))]
        expected = [(scale * layer(self._torch(tokens.numpy()))).numpy() for tokens in inputs]
        found = [session.run(None, {"x": tokens.numpy()})[0] for tokens in inputs]
        return {"moe": list(zip(expected, found, strict=True))}


def moe_session(model: ir.Model, layer: str) -> onnxruntime.InferenceSession:
    """Return a session for one mixture of a saved graph; `layer` is its path in the state dict. Raises ParityError."""
    calls = (node for node in model.graph if node.domain == contract.MOE_DOMAIN)
    node = next((node for node in calls if str(node.name).replace("/", ".").startswith(f"{layer}.")), None)
    if node is None:
        raise ParityError(f"graph {model.graph.name}: has no node for layer {layer}")
    x, y = (ir.val(name, dtype=ir.DataType.FLOAT, shape=("tokens", "dim")) for name in "xy")
    # copies with values in memory, because a model in memory has no weight files
    values = [(value, ir.tensor(array_of(value), name=value.name)) for value in node.inputs[1:] if value is not None]
    weights = [ir.Value(name=old.name, type=old.type, shape=old.shape, const_value=new) for old, new in values]
    call = ir.Node(node.domain, node.op_type, [x, *weights], node.attributes.values(), outputs=[y], name=node.name)
    graph = ir.Graph([x], [y], nodes=[call], initializers=weights, opset_imports=model.graph.opset_imports, name=layer)
    alone = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(ir.to_proto(alone).SerializeToString(), options)
