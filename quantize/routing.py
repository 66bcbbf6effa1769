"""Records the inputs of an encoder's mixtures of experts by chunk, and the experts that routers choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.names import scope
from u2moe.runtime.bundle.contract import PACKED
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.model.encoder import Encoder, required_cache_size
from u2moe.runtime.model.native import Kernels, choose_kernels
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import DEFAULT_PROVIDER
from u2moe.runtime.model.windows import Windows

Array = npt.NDArray[Any]


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
        encoder = self.config.graphs()[0]
        model = ir.load(bundle.path / encoder.file)
        self.layers = {layer.name: layer for node in model.graph if (layer := routed_layer(node)) is not None}
        half = bundle.manifest.quantization.get("whole") == "fp16"
        kind = ir.TensorType(ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
        inputs = {node.inputs[0] for node in model.graph if mixture_of(node) is not None} - {None}
        for value in inputs - set(model.graph.outputs):
            cast("ir.Value", value).type = kind
            model.graph.outputs.append(cast("ir.Value", value))
        self._names = [str(value.name) for value in model.graph.outputs]
        self._seen: dict[str, Array] = {}
        kernels = choose_kernels("native", [DEFAULT_PROVIDER]) if PACKED in bundle.manifest.quantization else None
        self._load = partial(load_graph, model, options, kernels)

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        return self._load()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`."""
        self._seen = dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))
        return self._seen

    def chunks(
        self, frames: Array, chunk_size: int | None = None, num_left_chunks: int = -1
    ) -> Iterator[dict[str, Array]]:
        """Tokens [time, dim] that each layer reads, by its name, for every chunk of features [frames, mel].

        With full context there is one chunk.
        """
        windows = Windows(self.config, chunk_size)
        windows.accept(frames)
        windows.finish()
        encoder = Encoder(cast("Session", self), self.config)  # it needs only `run`
        caches, required = encoder.start(), required_cache_size(chunk_size or 1, num_left_chunks)
        while (window := windows.take()) is not None:
            _, caches = encoder.step(window[np.newaxis], caches, required_cache_size=required)
            yield {name: self._seen[layer.tokens].astype(np.float32)[0] for name, layer in self.layers.items()}

    def tokens(self, frames: Array) -> dict[str, Array]:
        """Like `chunks`, with full context; empty if there are too few frames for a chunk."""
        return next(self.chunks(frames), {}) if self.layers else {}

    def experts(self, frames: Array) -> dict[str, Array]:
        """Sorted experts [time, k] of each layer's tokens, with full context."""
        return {name: np.sort(self.layers[name].choices(x), axis=1) for name, x in self.tokens(frames).items()}


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


def load_graph(
    model: ir.Model, options: onnxruntime.SessionOptions | None = None, kernels: Kernels | None = None
) -> onnxruntime.InferenceSession:
    """A session of a modified graph. Keep the graph while the session is in use: its weights stay memory-mapped.

    External weights are passed as values: a hard link beside the modified graph would make onnx-ir refuse the original
    file in other processes.
    """
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    if kernels is not None:
        kernels.register(options)
    weights = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    options.add_external_initializers(list(weights), list(weights.values()))
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=[DEFAULT_PROVIDER])
