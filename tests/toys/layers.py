"""Single quantized layers as graphs of one call, and random weights for them."""

import numpy as np
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import int8_columns
from u2moe.quantize.formats import conversion
from u2moe.runtime.graph.attention import cached_attention, next_cache
from u2moe.runtime.graph.builder import ATTRIBUTES

_OPSETS = {"": 18, "u2moe": 1, "com.microsoft": 1}
_NUM_BLOCKS = 3
"""Blocks of an attention cache."""


def layer_model(function, inputs, weights, attributes):
    """Return one call of a function as an ONNX file.

    Args:
        function: the called function.
        inputs: dtypes of the inputs, by name; of any shape.
        weights: constants after the inputs, in order.
        attributes: attributes of the call.
    """
    outputs = [output.name for output in function.outputs]
    return packed_layer_model(function.name, outputs, inputs, weights, attributes, [function])


def packed_layer_model(operator, outputs, inputs, weights, attributes, functions=()):
    """Return the same for a native operator without a function, such as those with packed weights."""
    fed = [ir.val(name, dtype=ir.DataType.from_numpy(np.dtype(kind)), shape=None) for name, kind in inputs.items()]
    initial = _constants(weights)
    own = ir.node(operator, [*fed, *initial], attributes, domain="u2moe", num_outputs=len(outputs))
    kinds = [ir.DataType.INT64 if operator == "SharedPrefixes" else ir.DataType.FLOAT] * len(outputs)
    if operator == "Int8Rows":
        kinds[0] = ir.DataType.UINT8
    for made, name, kind in zip(own.outputs, outputs, kinds, strict=True):
        made.name, made.type = name, ir.TensorType(kind)
    return _serialized(fed, own.outputs, [own], initial, functions)


def _constants(weights):
    return [ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in weights.items()]


def _serialized(inputs, outputs, nodes, initializers, functions):
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=_OPSETS, name="layer")
    return ir.to_proto(ir.Model(graph, ir_version=8, functions=functions)).SerializeToString()


def session_of(chain, inputs, initial, dtype=np.float32):
    """Return a session of consecutive calls; the last call also takes the weights.

    Args:
        chain: the functions.
        inputs: ranks of the inputs, by name.
        initial: weights, by name.
        dtype: type of the inputs and the output.
    """
    kind, weights, calls = ir.DataType.from_numpy(np.dtype(dtype)), _constants(initial), []
    fed = values = [ir.val(name, dtype=kind, shape=(None,) * rank) for name, rank in inputs.items()]
    for function in chain:
        values = [*values, *(weights if function is chain[-1] else ())]
        outputs = [ir.val(output.name) for output in function.outputs]
        calls.append(ir.Node(function.domain, function.name, values, outputs=outputs))
        values = outputs
    values[0].name, values[0].type = "y", ir.TensorType(kind)
    return session_with(_serialized(fed, values, calls, weights, chain))


def session_with(model, library=None, num_threads=1):
    """Return a session of a model, with native kernels if a library is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = num_threads, 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=("CPUExecutionProvider",), enable_fallback=0)


def streamed_convolution_model(form, channels, random):
    """Return the convolution of a streamed block between its projections, with random weights."""
    shapes = {"weight": (channels, 1, 1, form.kernel)}
    shapes |= {"bias": (channels,)} if form.bias else {}
    shapes |= dict.fromkeys(("norm_weight", "norm_bias"), (channels,)) if form.norm else {}
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    fed = {"linear": np.float32, "gate": np.float32, "cache": np.float32, "block": np.int64}
    return layer_model(form.function("cached", channels), fed, weights, form.attributes())


def random_matrix(random, rows, columns):
    """Return a weight [rows, columns] that preserves the size of its input."""
    return random.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))


def mixture_weights(random, mixture, dim, hidden):
    """Return the weights of a mixture, by name in the order of its inputs after x."""
    made = conversion(mixture.weights, mixture.block_size)
    weights = {"gate": random_matrix(random, dim, mixture.num_experts)}
    if mixture.bias and made.joins_biases:
        weights["w2_bias"] = 0.2 * random.standard_normal((mixture.num_experts, dim)).astype(np.float32)
    for expert in range(mixture.num_experts):
        for part, shape in (("w1", (dim, hidden)), ("w2", (hidden, dim))):
            name = f"e{expert}_{part}"
            weights |= zip(made.names(name, bias=False), made.parts(random_matrix(random, *shape)), strict=True)
            if mixture.bias and not (made.joins_biases and part == "w2"):
                weights[f"{name}_bias"] = 0.2 * random.standard_normal(shape[1]).astype(np.float32)
    return weights


def mixture_model(mixture, weights, dim, hidden):
    """Return a mixture with these weights."""
    function = conversion(mixture.weights, mixture.block_size).mixture(mixture, dim, hidden)
    return layer_model(function, {"x": np.float32}, weights, mixture.attributes())


def convolutions_model(both, num_outputs, random, changed=None):
    """Return both convolutions of the front end with random weights, with some attributes changed."""
    first, second = (window.kernel**2 for window in (both.first, both.second))
    weight, scale = int8_columns(random.standard_normal((second * both.channels, num_outputs)).astype(np.float32))
    first_weight = random.standard_normal((first + 1, both.channels)).astype(np.float32)
    bias = random.standard_normal(num_outputs).astype(np.float32)
    weights = {"first_weight": first_weight, "weight": weight, "scale": scale, "bias": bias}
    function = both.function()
    return layer_model(function, {"x": np.float32}, weights, {**function.meta[ATTRIBUTES], **(changed or {})})


def attention_model(heads, *, relative):
    """Return an attention with a cache."""
    function = cached_attention(heads, "relative" if relative else "")
    kinds = {node.name: np.int64 if node.name in ("block", "first_kept") else np.float32 for node in function.inputs}
    return layer_model(function, kinds, {}, function.meta[ATTRIBUTES])


def next_cache_model(num_blocks):
    """Return the node for the next chunk's cache."""
    function = next_cache(num_blocks)
    kinds = {node.name: np.int64 if node.name == "first" else np.float32 for node in function.inputs}
    return layer_model(function, kinds, {}, {})


def attention_shapes(heads, batch, time, past, *, relative, wide):
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
