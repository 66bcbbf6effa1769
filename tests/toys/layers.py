"""Single quantized layers as graphs of one call, and random weights for them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import int8_columns
from u2moe.quantize.formats import conversion
from u2moe.quantize.passes.front_end import FirstConvolutions
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.attention import Heads, cached_attention, next_cache
from u2moe.runtime.graph.builder import ATTRIBUTES
from u2moe.runtime.graph.convolution import TimeConvolution

Array = npt.NDArray[Any]
Attributes = Mapping[str, int | float | str | list[int]]
_CPU = ("CPUExecutionProvider",)
_OPSETS = {"": 18, "u2moe": 1, "com.microsoft": 1}
_NUM_BLOCKS = 3
"""Blocks of an attention cache."""


def layer_model(
    function: ir.Function, inputs: Mapping[str, npt.DTypeLike], weights: Mapping[str, Array], attributes: Attributes
) -> bytes:
    """Return one call of a function as an ONNX file.

    Args:
        function: the called function.
        inputs: dtypes of the inputs, by name; of any shape.
        weights: constants after the inputs, in order.
        attributes: attributes of the call.
    """
    names = [output.name or "" for output in function.outputs]
    return _model(function.name, names, inputs, weights, attributes, [function])


def packed_layer_model(
    operator: str, outputs: Sequence[str], inputs: Mapping[str, npt.DTypeLike], weights: Mapping[str, Array],
    attributes: Attributes,
) -> bytes:  # fmt: skip
    """Return the same for a native operator without a function, such as those with packed weights."""
    return _model(operator, outputs, inputs, weights, attributes, [])


def _model(
    operator: str, outputs: Sequence[str], inputs: Mapping[str, npt.DTypeLike], weights: Mapping[str, Array],
    attributes: Attributes, functions: Sequence[ir.Function],
) -> bytes:  # fmt: skip
    fed = [ir.val(name, dtype=ir.DataType.from_numpy(np.dtype(kind)), shape=None) for name, kind in inputs.items()]
    initial = []
    for name, array in weights.items():
        tensor = ir.tensor(array, name=name)
        initial.append(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        )
    own = ir.node(operator, [*fed, *initial], attributes, domain="u2moe", num_outputs=len(outputs))
    kinds = [ir.DataType.INT64 if operator == "SharedPrefixes" else ir.DataType.FLOAT] * len(outputs)
    if operator == "Int8Rows":
        kinds[0] = ir.DataType.UINT8
    for made, name, kind in zip(own.outputs, outputs, kinds, strict=True):
        made.name, made.type = name, ir.TensorType(kind)
    graph = ir.Graph(fed, own.outputs, nodes=[own], initializers=initial, opset_imports=_OPSETS, name="layer")
    return bytes(ir.to_proto(ir.Model(graph, ir_version=8, functions=functions)).SerializeToString())


def streamed_convolution_model(form: TimeConvolution, channels: int, random: np.random.Generator) -> bytes:
    """Return the convolution of a streamed block between its projections, with random weights."""
    shapes: dict[str, tuple[int, ...]] = {"weight": (channels, 1, 1, form.kernel)}
    shapes |= {"bias": (channels,)} if form.bias else {}
    shapes |= dict.fromkeys(("norm_weight", "norm_bias"), (channels,)) if form.norm else {}
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    fed = {"linear": np.float32, "gate": np.float32, "cache": np.float32, "block": np.int64}
    return layer_model(form.function("cached", channels), fed, weights, form.attributes())


def session_with(
    model: bytes | Path, library: Path | None = None, num_threads: int = 1
) -> onnxruntime.InferenceSession:
    """Return a session of a model, with native kernels if a library is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=_CPU, enable_fallback=0)


def random_matrix(random: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.float32]:
    """Return a weight [rows, columns] that preserves the size of its input."""
    matrix: npt.NDArray[np.float32] = random.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))
    return matrix


def mixture_weights(random: np.random.Generator, mixture: Mixture, dim: int, hidden: int) -> dict[str, Array]:
    """Return the weights of a mixture, by name in the order of its inputs after x."""
    made = conversion(mixture.weights, mixture.block_size)
    weights: dict[str, Array] = {"gate": random_matrix(random, dim, mixture.num_experts)}
    if mixture.bias and made.joins_biases:
        weights["w2_bias"] = 0.2 * random.standard_normal((mixture.num_experts, dim)).astype(np.float32)
    for expert in range(mixture.num_experts):
        for part, shape in (("w1", (dim, hidden)), ("w2", (hidden, dim))):
            name = f"e{expert}_{part}"
            weights |= zip(made.names(name, bias=False), made.parts(random_matrix(random, *shape)), strict=True)
            if mixture.bias and not (made.joins_biases and part == "w2"):
                weights[f"{name}_bias"] = 0.2 * random.standard_normal(shape[1]).astype(np.float32)
    return weights


def mixture_model(mixture: Mixture, weights: Mapping[str, Array], dim: int, hidden: int) -> bytes:
    """Return a mixture with these weights."""
    function = conversion(mixture.weights, mixture.block_size).mixture(mixture, dim, hidden)
    return layer_model(function, {"x": np.float32}, weights, mixture.attributes())


def convolutions_model(
    both: FirstConvolutions, num_outputs: int, random: np.random.Generator, changed: Attributes | None = None
) -> bytes:
    """Return both convolutions of the front end with random weights, with some attributes changed."""
    first, second = (window.kernel**2 for window in (both.first, both.second))
    weight, scale = int8_columns(random.standard_normal((second * both.channels, num_outputs)).astype(np.float32))
    weights: dict[str, Array] = {
        "first_weight": random.standard_normal((first + 1, both.channels)).astype(np.float32),
        "weight": weight,
        "scale": scale,
        "bias": random.standard_normal(num_outputs).astype(np.float32),
    }
    function = both.function()
    return layer_model(function, {"x": np.float32}, weights, {**function.meta[ATTRIBUTES], **(changed or {})})


def attention_model(heads: Heads, *, relative: bool, changed: Attributes | None = None) -> bytes:
    """Return an attention with a cache, with some attributes changed."""
    function = cached_attention(heads, "relative" if relative else "")
    kinds: dict[str, npt.DTypeLike] = {node.name or "": np.float32 for node in function.inputs}
    kinds |= {"block": np.int64, "first_kept": np.int64}
    return layer_model(function, kinds, {}, {**function.meta[ATTRIBUTES], **(changed or {})})


def next_cache_model(num_blocks: int) -> bytes:
    """Return the node for the next chunk's cache."""
    function = next_cache(num_blocks)
    kinds = {node.name or "": np.int64 if node.name == "first" else np.float32 for node in function.inputs}
    return layer_model(function, kinds, {}, {})


def attention_shapes(
    heads: Heads, batch: int, time: int, past: int, *, relative: bool, wide: Sequence[bool]
) -> dict[str, tuple[int, ...]]:
    """Return shapes of the float32 inputs of an attention, with a cache of three blocks. `wide` selects the axes that
    are not 1: those of the bias (batch, heads, time), and the batch of the positions."""
    axes = (size if own else 1 for own, size in zip(wide, (batch, heads.num_heads, time), strict=True))
    width, keys = heads.num_heads * heads.size, past + time
    return {
        "query": (batch, time, width),
        "key_value": (batch, time, heads.num_kv_heads * 2 * heads.size),
        "cache": (_NUM_BLOCKS, batch, heads.num_kv_heads, past, 2 * heads.size),
        "bias": (*axes, keys),
        **({"positions": (batch if wide[0] else 1, keys, width)} if relative else {}),
    }
