"""The convolution of streamed blocks, between its projections, as one call, which native kernels replace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from u2moe.quantize.passes.normalization import is_last_axis
from u2moe.quantize.passes.quantized_rows import activation_of
from u2moe.quantize.passes.rewrite import Rewrite, new_call, only_reader, present
from u2moe.quantize.weights import Weights
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.attention import END
from u2moe.runtime.graph.builder import GraphBuilder, build_function
from u2moe.runtime.graph.file import shape_of

_MOST_NODES = 5
"""Of an activation, one after the other."""


@dataclass(frozen=True, kw_only=True)
class CachedConvolution:
    """A gated linear unit, a depthwise convolution over a cache and the unit, a normalisation and an activation.

    Attributes:
        kernel: frames that the convolution sees.
        activation: one of `ACTIVATIONS`; "": none.
        bias: whether the convolution has a bias.
        norm: whether a layer normalisation follows; `epsilon`: of it.
    """

    kernel: int
    activation: str
    bias: bool
    norm: bool
    epsilon: float

    def attributes(self) -> dict[str, int | float | str]:
        """Of the function's calls."""
        return {**asdict(self), "bias": int(self.bias), "norm": int(self.norm)}

    def function(self, channels: int) -> ir.Function:
        """The function.

        Inputs: `linear` and `gate` [batch, time, channels], `cache` [blocks, batch, kernel - 1, channels], `block` (),
        `weight` [channels, 1, 1, kernel], with a bias `bias` [channels], with a normalisation `norm_weight` and
        `norm_bias` [channels]. Outputs: `y` [batch, time, channels]; `kept` [1, batch, kernel - 1, channels], the last
        frames that the convolution sees, as they are cached.
        """
        names = ["linear", "gate", "cache", "block", "weight", *(["bias"] if self.bias else [])]
        names += ["norm_weight", "norm_bias"] if self.norm else []

        def body(g: GraphBuilder, inputs: list[ir.Value]) -> list[ir.Value]:
            linear, gate, cache, block, *parameters = inputs
            taps, norms = parameters[: 1 + self.bias], parameters[1 + self.bias :]
            unit = g.op("Mul", linear, g.op("Sigmoid", gate))
            seen = g.op("Concat", g.op("Gather", cache, block, axis=0), unit, axis=1)
            kept = g.op("Unsqueeze", g.op("Slice", seen, [1 - self.kernel], [END], [1]), [0])
            image = g.op("Transpose", g.op("Unsqueeze", seen, [1]), perm=[0, 3, 1, 2])
            y = g.op("Conv", image, *taps, group=channels, kernel_shape=[1, self.kernel], pads=[0, 0, 0, 0])
            y = g.op("Squeeze", g.op("Transpose", y, perm=[0, 2, 3, 1]), [1])
            if self.norm:
                y = g.op("LayerNormalization", y, *norms, axis=-1, epsilon=self.epsilon)
            return [activation(g, y, self.activation) if self.activation else y, kept]

        return build_function("CachedConvolution", names, body, self.attributes())


class GroupConvolution(Rewrite):
    """Afterwards each block that caches frames convolves them in one call. The numbers stay what they are."""

    def rewrite(self, model: ir.Model, _: Weights) -> bool:
        """Replace what stands between the projections of each block that reads the cache."""
        readers = list(_readers(model))
        for conv, both in readers:
            _group(model, conv, both)
        RemoveUnusedNodesPass()(model)
        return bool(readers)


def _readers(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Convolutions over a cache and a gated linear unit, and the nodes that put one in front of the other."""
    for node in model.graph:
        if node.op_type != "Conv":
            continue
        both: ir.Node | None = node
        for expected in ("Transpose", "Unsqueeze", "Concat"):
            both = None if both is None else present(both, 0).producer()
            if both is not None and both.op_type != expected:
                both = None
        if both is None:
            continue
        before = [present(both, index).producer() for index in range(2)]
        if [None if own is None else own.op_type for own in before] == ["Gather", "Mul"]:
            yield node, both


def _group(model: ir.Model, conv: ir.Node, both: ir.Node) -> None:
    gather, unit = (present(both, index).producer() for index in range(2))
    sliced = next((use.node for use in both.outputs[0].uses() if use.node.op_type == "Slice"), None)
    sigmoid = None if unit is None else present(unit, 1).producer()
    if gather is None or unit is None or sliced is None or sigmoid is None or sigmoid.op_type != "Sigmoid":
        return
    if not _is_over_time(conv, both, sliced):
        return
    end, epsilon = only_reader(only_reader(conv)).outputs[0], 0.0
    norms: list[ir.Value] = []
    readers = [use.node for use in end.uses()]
    if len(readers) == 1 and is_last_axis(readers[0]):
        norms, epsilon = _parameters(readers[0]), readers[0].attributes["epsilon"].as_float()
        end = readers[0].outputs[0]
    kind, y = _activated(end)
    taps = _parameters(conv)
    channels, _, _, kernel = shape_of(present(conv, 1))
    form = CachedConvolution(kernel=kernel, activation=kind, bias=len(taps) > 1, norm=bool(norms), epsilon=epsilon)
    inputs = [present(unit, 0), present(sigmoid, 0), *(present(gather, index) for index in range(2)), *taps, *norms]
    call = new_call(model, form.function(channels), both, inputs, form.attributes())
    model.graph.insert_before(both, call)
    for before, after in zip((y, only_reader(sliced).outputs[0]), call.outputs, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.replace_all_uses_with(after)


def _is_over_time(conv: ir.Node, both: ir.Node, sliced: ir.Node) -> bool:
    """Whether each channel is convolved by itself, with all frames of the cache, of which the last ones are kept."""
    channels, _, height, kernel = shape_of(present(conv, 1))
    found = {key: np.asarray(conv.attributes[key].value).tolist() for key in conv.attributes}
    expected = {"group": channels, "kernel_shape": [1, kernel], "pads": [0] * 4}
    constants = [present(sliced, index).const_value for index in range(1, len(sliced.inputs))]
    kept = [None if tensor is None else tensor.numpy().tolist() for tensor in constants]
    is_last = kept == [[1 - kernel], [END], [1]]
    return height == 1 and found == expected and both.attributes["axis"].as_int() == 1 and is_last


def _parameters(node: ir.Node) -> list[ir.Value]:
    return [present(node, index) for index in range(1, len(node.inputs))]


def _activated(x: ir.Value) -> tuple[str, ir.Value]:
    """The activation of x and its result; "" and x if none follows."""
    waiting = [x]
    for _ in range(_MOST_NODES):
        waiting = [use.node.outputs[0] for value in waiting for use in value.uses()]
        for value in waiting:
            kind, before = activation_of(value)
            if kind is not None and before is x:
                return kind, value
    return "", x
