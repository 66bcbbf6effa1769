"""What the mixtures of experts of a bundle's encoder read when it hears speech. One session, and nothing is kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.runtime import contract
from u2moe.runtime.bundle import Bundle
from u2moe.runtime.graph.mixture import mixture_of
from u2moe.runtime.session import DEFAULT_PROVIDER

Array = npt.NDArray[Any]


class ExpertInputs:
    """The encoder of a bundle with the inputs of its mixtures of experts as outputs; in float32 or quantized.

    Attributes:
        layers: the router's weight [dim, experts] and the experts of each token, by the name of the layer's scope.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.config = bundle.manifest.model
        encoder = self.config.graphs()[0]
        model = ir.load(bundle.path / encoder.file)
        half = bundle.manifest.quantization.get("whole") == "fp16"
        self.layers: dict[str, tuple[Array, int]] = {}
        self.names: list[str] = []
        model.graph.outputs.clear()
        for node in model.graph:
            x, gate = (*node.inputs, None, None)[:2]
            mixture = mixture_of(node)
            if mixture is None or x is None or x.name is None or gate is None or gate.const_value is None:
                continue
            self.layers[scope(node)] = (gate.const_value.numpy().astype(np.float32), mixture.top_k)
            self.names.append(x.name)
            x.type = ir.TensorType(ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)
            if x not in model.graph.outputs:
                model.graph.outputs.append(x)
        self.inputs = encoder.inputs
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = None
        if self.names:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                file = Path(folder) / encoder.file
                _link_weights(bundle.path / encoder.file, file)
                ir.save(model, file)
                self.session = onnxruntime.InferenceSession(str(file), options, providers=[DEFAULT_PROVIDER])

    def tokens(self, frames: Array) -> dict[str, Array]:
        """Tokens [time, dim] that each layer reads for features [frames, mel], with full context."""
        if self.session is None:
            return {}
        fixed = {"chunk": frames[np.newaxis], "chunk_lens": np.array([len(frames)])}
        feeds = {tensor.name: fixed.get(tensor.name, self._start(tensor)) for tensor in self.inputs}
        found = self.session.run(self.names, feeds)
        return {layer: x.astype(np.float32)[0] for layer, x in zip(self.layers, found, strict=True)}

    def experts(self, frames: Array) -> dict[str, Array]:
        """Sorted experts [time, k] of the tokens of each layer."""
        result = {}
        for layer, x in self.tokens(frames).items():
            gate, top_k = self.layers[layer]
            result[layer] = np.sort(np.argsort(-(x @ gate), axis=1, kind="stable")[:, :top_k], axis=1)
        return result

    def _start(self, tensor: contract.Tensor) -> Array:
        """Zeros for an input: positions at the start, caches of nothing."""
        shape = [1 if axis == "batch" else self.config.axis(axis) or 0 for axis in tensor.axes]
        return np.zeros(shape, tensor.dtype)


def _link_weights(graph: Path, other: Path) -> None:
    """Put the weights that lie beside a graph, if any do, beside another, where onnxruntime insists on finding them."""
    for file in graph.parent.glob(f"{graph.name}.data"):
        target = other.with_name(file.name)
        try:
            os.link(file, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, target)


def scope(node: ir.Node) -> str:
    """The name of the layer whose node this is."""
    return (node.name or "").rsplit("/", 1)[0].replace("/", ".")
