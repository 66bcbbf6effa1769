"""Which experts do the tokens of real speech touch, chunk by chunk, and how many bytes of weights is that?"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.benchmarks.instruments.onnx_file import OnnxFile, with_outputs
from u2moe.benchmarks.instruments.probe import Mode, Samples
from u2moe.benchmarks.instruments.statistics import percentiles
from u2moe.runtime import Bundle
from u2moe.runtime.encoder import Encoder, required_cache_size
from u2moe.runtime.errors import BundleError
from u2moe.runtime.features import Fbank
from u2moe.runtime.mixture import read_mixture
from u2moe.runtime.session import Session, SessionSettings
from u2moe.runtime.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A mixture of experts in the encoder.

    Attributes:
        name: path of its node.
        tokens: name of the value that goes in.
        gate: the router, float32 [dim, experts].
        top_k: experts of a token.
        expert_bytes: weights of one expert as stored.
    """

    name: str
    tokens: str
    gate: npt.NDArray[np.float32]
    top_k: int
    expert_bytes: int


def layers_of(bundle: Bundle) -> list[Layer]:
    """The mixtures of experts of a bundle's encoder, in order; none in a dense model.

    Raises:
        BundleError: a mixture of experts without a router.
    """
    graph = OnnxFile(bundle.path / bundle.manifest.model.graphs()[0].file)
    layers = []
    for node in graph.nodes:
        mixture = read_mixture(node.domain, node.op_type, node.attributes)
        if mixture is None:
            continue
        weights = [graph.weights[name] for name in node.inputs if name in graph.weights]
        gate = next((weight for weight in weights if weight.group == "routers"), None)
        if gate is None:
            raise BundleError(f"{bundle.path}: {node.name} has no router among its weights")
        num_bytes = sum(weight.num_bytes for weight in weights if weight is not gate)
        layers.append(
            Layer(
                name=node.name.rsplit("/", 1)[0].replace("/", "."),
                tokens=node.inputs[0],
                gate=gate.array().astype(np.float32),
                top_k=mixture.top_k,
                expert_bytes=num_bytes // mixture.num_experts,
            )
        )
    return layers


def measure_experts(
    bundle: Bundle,
    recordings: Sequence[Samples],
    modes: Sequence[Mode],
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Experts that the chunks of recordings touch.

    Args:
        bundle: whose encoder.
        recordings: samples at the model's rate.
        modes: chunks; full context is one chunk per recording.
        progress: called with a line for each mode.

    Returns:
        By the name of the mode, see `summary`; empty for a model without experts.
    """
    layers = layers_of(bundle)
    if not layers:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        routers = Routers(bundle, layers, Path(folder))
        result = {}
        for mode in modes:
            progress(f"experts: {mode.name}")
            counts = [chunk for samples in recordings for chunk in routers.recognise(samples, mode)]
            if counts:
                result[mode.name] = summary(layers, np.stack(counts))
        del routers
    return result


def summary(layers: Sequence[Layer], counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    """What tokens per expert [chunks, layers, experts] mean.

    Returns:
        num_chunks, num_experts, experts_per_token.
        touched: mean number of experts with tokens in a chunk, by layer, and over all of them.
        bytes_touched: percentiles over the chunks, of all layers together, and `bytes` of all experts.
        load: share that each expert gets of the layer's choices, `experts_per_token` for each token.
        load_entropy: of that, by layer, from 0 (one expert does all) to 1 (all do the same); and over all.
    """
    touched = counts > 0
    sizes = np.array([layer.expert_bytes for layer in layers])
    load = counts.sum(axis=0) / counts.sum(axis=(0, 2))[:, np.newaxis]
    logs = np.log(load, where=load > 0, out=np.zeros_like(load))
    entropy = -(load * logs).sum(axis=1) / np.log(max(load.shape[1], 2))
    names = [layer.name for layer in layers]
    per_layer = touched.sum(axis=2).mean(axis=0)
    return {
        "num_chunks": len(counts),
        "num_experts": counts.shape[2],
        "experts_per_token": layers[0].top_k,
        "touched": {"mean": float(per_layer.mean()), "layers": dict(zip(names, per_layer.tolist(), strict=True))},
        "bytes_touched": percentiles((touched.sum(axis=2) * sizes).sum(axis=1).tolist()),
        "bytes": int(sizes.sum() * counts.shape[2]),
        "load": dict(zip(names, np.round(load, 4).tolist(), strict=True)),
        "load_entropy": {"mean": float(entropy.mean()), "layers": dict(zip(names, entropy.tolist(), strict=True))},
    }


class Routers:
    """The encoder of a bundle with what goes into its mixtures of experts as further outputs.

    Chunks run through it as in a stream; the router's product is done again here, in float32 as in the graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        layers: Sequence[Layer],
        folder: Path,
        options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        """Write the graph into `folder` and load it, with `options` where there are any."""
        config = bundle.manifest.model
        graph = config.graphs()[0]
        content = (bundle.path / graph.file).read_bytes()
        (folder / graph.file).write_bytes(with_outputs(content, [layer.tokens for layer in layers]))
        for name in bundle.manifest.files:
            if name.startswith(f"{graph.file}."):  # weights beside the graph
                _link(bundle.path / name, folder / name)
        options = options or SessionSettings().session_options()
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(str(folder / graph.file), options, providers=providers)
        self._names = [tensor.name for tensor in graph.outputs] + [layer.tokens for layer in layers]
        self._layers = layers
        self._bundle = bundle
        self._counts: list[npt.NDArray[np.int64]] = []

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """As `Session.run`; counts the tokens of each expert besides."""
        result = dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))
        self._counts.append(np.stack([tokens_per_expert(layer, result[layer.tokens]) for layer in self._layers]))
        return result

    def recognise(self, samples: Samples, mode: Mode) -> list[npt.NDArray[np.int64]]:
        """Tokens per expert [layers, experts] of each chunk."""
        config = self._bundle.manifest.model
        fbank, windows = Fbank(self._bundle.manifest.features), Windows(config, mode.chunk_size)
        windows.accept(fbank.accept(samples))
        windows.accept(fbank.finish())
        windows.finish()
        encoder = Encoder(cast("Session", self), config)  # all that it needs of a session is `run`
        self._counts = []
        caches, required = encoder.start(), required_cache_size(mode.chunk_size or 1, mode.num_left_chunks)
        while (window := windows.take()) is not None:
            _, caches = encoder.step(window[np.newaxis], caches, required_cache_size=required)
        return self._counts


def tokens_per_expert(layer: Layer, tokens: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """How many of the tokens [..., dim] each expert gets: [experts]."""
    dim, num_experts = layer.gate.shape
    logits = tokens.astype(np.float32).reshape(-1, dim) @ layer.gate
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, : layer.top_k]
    return np.bincount(chosen.ravel(), minlength=num_experts).astype(np.int64)


def _link(source: Path, target: Path) -> None:
    """A file in another folder, without a copy where the system can."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)
