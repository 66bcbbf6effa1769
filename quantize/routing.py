"""Records the inputs of an encoder's mixtures of experts by chunk, and the experts that routers choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.layers import scope
from u2moe.quantize.observed import Array, ObservedGraph
from u2moe.runtime.bundle.contract import PACKED
from u2moe.runtime.bundle.weight_formats import HALF
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.model.encoder import Encoder, Windows, required_cache_size
from u2moe.runtime.model.native import choose_kernels
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import DEFAULT_PROVIDER


@dataclass(frozen=True, kw_only=True)
class RoutedLayer:
    """A mixture of experts of an encoder.

    Attributes:
        name: the layer's scope.
        tokens: name of its input.
        gate: weight of the router, float32 [dim, experts].
        gate_name: its name in the graph.
        top_k: experts per token.
        expert_bytes: bytes of one expert's weights as stored.
    """

    name: str
    tokens: str
    gate: Array
    gate_name: str
    top_k: int
    expert_bytes: int

    def choices(self, tokens: Array) -> Array:
        """Experts [n, k] of tokens [..., dim], the most likely first."""
        logits = tokens.astype(np.float32).reshape(-1, len(self.gate)) @ self.gate
        return np.argsort(-logits, axis=1, kind="stable")[:, : self.top_k]

    def shares(self, tokens: Array) -> Array:
        """Routing weights [n, experts] of tokens [n, dim]; 0 for experts that are not chosen."""
        logits, chosen = tokens @ self.gate, self.choices(tokens)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = np.zeros_like(odds)
        np.put_along_axis(shares, chosen, np.take_along_axis(odds, chosen, axis=1), axis=1)
        weights: Array = shares / shares.sum(axis=1, keepdims=True)
        return weights

    def counts(self, tokens: Array) -> npt.NDArray[np.int64]:
        """Number of tokens [..., dim] routed to each expert: [experts]."""
        return np.bincount(self.choices(tokens).ravel(), minlength=self.gate.shape[1]).astype(np.int64)


class ExpertInputs:
    """The encoder of a bundle, with the inputs of its mixtures of experts as extra outputs; float32 or quantized.

    Attributes:
        layers: the mixtures by scope, in order; empty for a dense model.

    Raises:
        BundleError: the router of a mixture of experts is not a weight.
        KernelsError: weights are packed for native kernels, which cannot run here.
    """

    def __init__(self, bundle: Bundle, options: onnxruntime.SessionOptions | None = None) -> None:
        """Read the graph; it is loaded on its first run, with `options` if given, and with native kernels if packed."""
        self.config = bundle.manifest.model
        model = ir.load(bundle.path / self.config.graphs()[0].file)
        self.layers = {layer.name: layer for node in model.graph if (layer := routed_layer(node)) is not None}
        inputs = [x for node in model.graph if mixture_of(node) is not None and (x := node.inputs[0]) is not None]
        quantization = bundle.manifest.quantization
        kernels = choose_kernels("native", [DEFAULT_PROVIDER]) if PACKED in quantization else None
        dtype = ir.DataType.FLOAT16 if quantization.get("whole") == HALF.name else ir.DataType.FLOAT
        self._graph = ObservedGraph(model, inputs, options, kernels, dtype)

    def chunks(
        self, frames: Array, chunk_size: int | None = None, num_left_chunks: int = -1
    ) -> Iterator[dict[str, Array]]:
        """Tokens [time, dim] that each layer reads, by its name, for every chunk of features; of full context one."""
        windows = Windows(self.config, chunk_size)
        windows.accept(frames)
        windows.finish()
        encoder = Encoder(cast("Session", self._graph), self.config)  # it needs only `run`
        caches, required = encoder.start(), required_cache_size(chunk_size or 1, num_left_chunks)
        while (window := windows.take()) is not None:
            _, caches = encoder.step(window[np.newaxis], caches, required_cache_size=required)
            seen = self._graph.seen
            yield {name: seen[layer.tokens].astype(np.float32)[0] for name, layer in self.layers.items()}

    def experts(self, frames: Array) -> dict[str, Array]:
        """Sorted experts [time, k] of each layer's tokens, with full context; none of too few frames for a chunk."""
        tokens = next(self.chunks(frames), {}) if self.layers else {}
        return {name: np.sort(self.layers[name].choices(x), axis=1) for name, x in tokens.items()}


def routed_layer(node: ir.Node) -> RoutedLayer | None:
    """The mixture of experts that a node calls, or None."""
    mixture = mixture_of(node)
    if mixture is None:
        return None
    x, gate, *weights = node.inputs
    if x is None or gate is None or gate.const_value is None:
        raise BundleError(f"{node.name} has no router among its weights")
    makers = [weight.producer() if weight is not None else None for weight in weights]
    stored = [maker.inputs[0] if maker else weight for maker, weight in zip(makers, weights, strict=True)]
    num_bytes = sum(weight.const_value.nbytes for weight in stored if weight is not None and weight.const_value)
    return RoutedLayer(
        name=scope(node),
        tokens=str(x.name),
        gate=gate.const_value.numpy().astype(np.float32),
        gate_name=str(gate.name),
        top_k=mixture.top_k,
        expert_bytes=num_bytes // mixture.num_experts,
    )
