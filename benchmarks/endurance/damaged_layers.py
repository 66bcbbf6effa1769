"""Single quantized layers whose attributes, weights, shapes and inputs lie, for the native kernels: loaded and run.

    python -m u2moe.benchmarks.endurance.damaged_layers LIBRARY

answers seeds as `worker` does. Whatever the graph says, onnxruntime must give a result or an error. A seed makes other
layers for each instruction set that U2MOE_KERNELS_ISA names.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from u2moe.benchmarks.endurance.damage import damaged, one_of
from u2moe.benchmarks.endurance.worker import Use, answer
from u2moe.benchmarks.instruments.layers import (
    Array,
    Attributes,
    int4_weights,
    int8_weights,
    layer_model,
    packed_layer_model,
    random_matrix,
    session_with,
)
from u2moe.benchmarks.script import run_script, script_parser
from u2moe.quantize.arithmetic import int8_columns
from u2moe.quantize.experts.int4 import int4_mixture
from u2moe.quantize.experts.int8 import int8_mixture
from u2moe.quantize.token_scales import (
    int8_feed_forward,
    int8_gated_feed_forward,
    int8_linear,
    int8_matmul,
    int8_rows,
)
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.mixture import Mixture
from u2moe.runtime.native import ONNXRUNTIME_ERRORS

Random = np.random.Generator
Model = onnx.ModelProto
OPERATORS = (
    "Int8MixtureOfExperts", "Int4MixtureOfExperts", "Int8Rows", "Int8MatMul", "Int8Linear", "Int8FeedForward",
    "Int8GatedFeedForward",
)  # fmt: skip
ODD_NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 5, 16, 24, 64, 65, 128, 1024, 1025, 2**24, 2**31, 2**40, 2**63 - 1)
ODD_SIZES = (0, 1, 2, 7, 16, 17, 33, 40)
ODD_FLOATS = (np.nan, np.inf, -np.inf, 3e38, -1e38, 1e-44, 0.0, -1.0)
ODD_TEXTS = ("", "relu", "Swish", "gelu", "x" * 300, "a\0b")
DTYPES = (np.int8, np.uint8, np.float32, np.int64, np.float16)
_DATA_FILE = "weights.bin"


def use_damaged_layers(library: Path, folder: Path) -> Use:
    """A function that damages a layer, and runs it with the kernels of `library` on one or two threads."""
    isa = zlib.crc32(os.environ.get("U2MOE_KERNELS_ISA", "").encode())

    def use(random: Random) -> str:
        random = np.random.default_rng([int(random.integers(2**32)), isa])
        model, dim = drawn_layer(library, random)
        for _ in range(int(random.integers(0, 4))):
            one_of(DAMAGES, random)(model, random)
        source: bytes | Path = model.SerializeToString()
        if random.random() < 0.05:
            source = damaged(bytes(source), random)
        elif random.random() < 0.15:
            source = _with_external_data(model, folder, random)
        session = session_with(source, library, num_threads=int(random.integers(1, 3)))
        for _ in range(2):
            session.run(None, _feeds(session, dim, random))
        return "accepted"

    return use


# -------------------- layers before the damage


def drawn_layer(library: Path, random: Random) -> tuple[Model, int]:
    """A layer of any operator with random sizes, its weights packed or not; and the size of its rows."""
    dim, hidden = int(random.integers(1, 50)), int(random.integers(1, 80))
    operator, kind, has_bias = one_of(OPERATORS, random), str(one_of(ACTIVATIONS, random)), random.random() < 0.5
    if operator.endswith("Experts"):
        content = _mixture(library, operator, (dim, hidden), random)
    elif operator == "Int8Rows":
        content = layer_model(int8_rows(kind if kind in _FROM else None), {"x": np.float32}, {}, {"activation": kind})
    else:
        content = _linear(library, operator, (dim, hidden), (kind, has_bias), random)
    return onnx.load_from_string(content), dim


_FROM = ("relu", "gelu", "swish")
"""Activations after which rows have a lowest value."""


def _mixture(library: Path, operator: str, sizes: tuple[int, int], random: Random) -> bytes:
    num_experts = int(random.integers(1, 6))
    top_k = int(random.integers(1, num_experts + 1))
    mixture = Mixture(
        num_experts=num_experts,
        top_k=top_k,
        activation=one_of(ACTIVATIONS, random),
        bias=random.random() < 0.5,
        skip_below=0.3 if top_k > 1 and random.random() < 0.5 else 0.0,
        weights="int4" if operator.startswith("Int4") else "int8",
        block_size=one_of((16, 32, 64, 128), random) if operator.startswith("Int4") else 0,
    )
    attributes = mixture.attributes()
    if random.random() < 0.3:
        size = sum(packed_bytes(library, *shape, mixture.block_size) for shape in (sizes, sizes[::-1])) * num_experts
        weights = {"gate": random_matrix(random, sizes[0], num_experts), "packed": _lying_bytes(size, random)}
        own: Attributes = {**attributes, "hidden": sizes[1], "layout": 1}
        return packed_layer_model(operator, ["y"], {"x": np.float32}, weights, own)
    if mixture.block_size:
        weights = int4_weights(random, mixture, *sizes)
        return layer_model(int4_mixture(mixture, *sizes), {"x": np.float32}, weights, attributes)
    return layer_model(int8_mixture(mixture), {"x": np.float32}, int8_weights(random, mixture, *sizes), attributes)


def _linear(library: Path, operator: str, sizes: tuple[int, int], form: tuple[str, bool], random: Random) -> bytes:
    """A product or a feed-forward layer; `form` is its activation and whether it has biases."""
    kind, bias = form
    is_gated = operator == "Int8GatedFeedForward"
    is_layer = is_gated or operator == "Int8FeedForward"
    fed = {"q": np.uint8, "peak": np.float32} if operator == "Int8MatMul" else {"x": np.float32}
    attributes: dict[str, int | float | str] = {} if operator == "Int8MatMul" else {"activation": kind}
    shapes = {"w1": sizes, "w2": sizes[::-1]} if is_layer else {"weight": sizes}
    if is_gated:
        shapes = {"gate": sizes, **shapes}
    if random.random() < 0.3:
        size = sum(packed_bytes(library, *shape) for shape in shapes.values())
        attributes |= {"bias": int(bias), "hidden": sizes[1]} if is_layer else {"out": sizes[1]}
        attributes |= {"in": sizes[0], "layout": 1}
        return packed_layer_model(operator, ["y"], fed, {"packed": _lying_bytes(size, random)}, attributes)
    weights: dict[str, Array] = {}
    for name, shape in shapes.items():
        weights[name], scale = int8_columns(random_matrix(random, *shape))
        weights[f"{name}_scale"] = scale
        if bias and name != "gate":
            weights[f"{name}_bias"] = random.standard_normal(shape[1]).astype(np.float32)
    if is_layer:
        function = (int8_gated_feed_forward if is_gated else int8_feed_forward)(kind, bias=bias)
        return layer_model(function, fed, weights, {**attributes, "bias": int(bias)})
    if operator == "Int8MatMul":
        return layer_model(int8_matmul(bias=bias), fed, weights, attributes)
    return layer_model(int8_linear(kind if kind in _FROM else None, bias=bias), fed, weights, attributes)


def packed_bytes(library: Path, rows: int, columns: int, block_size: int = 0) -> int:
    """Bytes of a packed weight, as the library says."""
    pack = ctypes.CDLL(str(library))[f"u2moe_kernels_pack_int{4 if block_size else 8}"]
    pack.restype = ctypes.c_size_t
    last = ctypes.c_size_t(block_size) if block_size else ctypes.c_float(1)
    return int(pack(None, None, None, ctypes.c_size_t(rows), ctypes.c_size_t(columns), last, None))


def _lying_bytes(size: int, random: Random) -> Array:
    """Bytes for packed weights, scales and biases: of any value, so that some are no numbers, or small floats."""
    if random.random() < 0.5:
        return np.frombuffer(random.bytes(size), np.uint8)
    floats = random.standard_normal(-(-size // 4)).astype(np.float32)
    return floats.view(np.uint8)[:size].copy()


# -------------------- damage


def _change_attribute(model: Model, random: Random) -> None:
    node = model.graph.node[0]
    names = [attribute.name for attribute in node.attribute]
    name = one_of([*names, *names, "layout", "in", "out", "hidden", "bias"], random)
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    value: Any = one_of((None, "number", "number", "text", "float", "list", "tensor"), random)
    if value == "number":
        value = one_of(ODD_NUMBERS, random)
    elif value == "text":
        value = one_of(ODD_TEXTS, random)
    elif value == "float":
        value = float(one_of((*ODD_FLOATS, 0.5), random))
    elif value == "list":
        value = [1, 2]
    elif value == "tensor":
        value = onnx.numpy_helper.from_array(np.ones(3, np.float32))
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(onnx.helper.make_attribute(name, value))


def _change_weight(model: Model, random: Random) -> None:
    """Another shape, type or size; a shape that its bytes do not have; or numbers at the limits."""
    if not model.graph.initializer:
        return
    tensor = one_of(model.graph.initializer, random)
    if len(tensor.raw_data) != math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize:
        return  # it lies already
    action = one_of(("replace", "sizes", "more", "fewer", "shape", "numbers", "numbers"), random)
    if action == "replace":
        shape = [one_of(ODD_SIZES, random) for _ in range(int(random.integers(0, 5)))]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, one_of(DTYPES, random)), tensor.name))
    elif action == "sizes":
        array = np.resize(onnx.numpy_helper.to_array(tensor), [max(1, size + _step(random)) for size in tensor.dims])
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    elif action == "more":
        tensor.raw_data += bytes(int(random.integers(1, 100)))
    elif action == "fewer":
        tensor.raw_data = tensor.raw_data[: int(random.integers(0, len(tensor.raw_data) + 1))]
    elif action == "shape":
        if tensor.dims:
            tensor.dims[int(random.integers(len(tensor.dims)))] = one_of(ODD_NUMBERS, random)
    else:
        _set_numbers(tensor, random)


def _step(random: Random) -> int:
    return int(random.integers(-2, 3))


def _set_numbers(tensor: onnx.TensorProto, random: Random) -> None:
    array = onnx.numpy_helper.to_array(tensor).copy()
    if array.size == 0:
        return
    places = random.integers(0, array.size, int(random.integers(1, array.size + 1)))
    if array.dtype.kind == "f":
        array.flat[places] = one_of(ODD_FLOATS, random)
    else:
        limits = np.iinfo(array.dtype)
        array.flat[places] = one_of((limits.min, limits.max), random)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _change_inputs(model: Model, random: Random) -> None:
    inputs = model.graph.node[0].input
    if not inputs:
        return
    position, other = (int(random.integers(len(inputs))) for _ in range(2))
    action = one_of(("remove", "swap", "repeat", "empty", "cut", "variable"), random)
    if action == "remove":
        del inputs[position]
    elif action == "cut":
        del inputs[position:]
    elif action == "swap":
        inputs[position], inputs[other] = inputs[other], inputs[position]
    elif action == "repeat":
        inputs.append(inputs[position])
    elif action == "empty":
        inputs[position] = ""
    else:
        _make_variable(model, inputs[position])


def _make_variable(model: Model, name: str) -> None:
    """A constant becomes an input of the graph."""
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name == name:
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
            del model.graph.initializer[index]
            return


def _change_node(model: Model, random: Random) -> None:
    """Another operator, number, domain or number of outputs; the function goes."""
    node = model.graph.node[0]
    action = one_of(("operator", "number", "domain", "outputs", "function", "twice"), random)
    if action == "operator":
        node.op_type = one_of(OPERATORS, random)
    elif action == "number":
        node.op_type += one_of(("_2", "_9", "_10", "_0"), random)
    elif action == "domain":
        node.domain = one_of(("", "com.microsoft"), random)
    elif action == "outputs":
        node.output.append("another")
    elif action == "function":
        del model.functions[:]
    else:
        model.graph.node.append(node)
        for index in range(len(model.graph.node[1].output)):
            model.graph.node[1].output[index] = f"again{index}"


def _change_declaration(model: Model, random: Random) -> None:
    """The graph says other types or shapes of its inputs and outputs."""
    value = one_of([*model.graph.input, *model.graph.output], random)
    kind = one_of((value.type.tensor_type.elem_type, *_DECLARED), random)
    shape = [one_of((*ODD_SIZES, "n", -1), random) for _ in range(int(random.integers(0, 4)))]
    value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))


_DECLARED = (onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8, onnx.TensorProto.INT64, onnx.TensorProto.STRING)

DAMAGES: Sequence[Callable[[Model, Random], None]] = (
    _change_attribute, _change_attribute, _change_weight, _change_weight, _change_inputs, _change_node,
    _change_declaration,
)  # fmt: skip


def _with_external_data(model: Model, folder: Path, random: Random) -> Path:
    """The model as a file, with weights in another, at places where they may or may not be."""
    data = bytearray()
    for tensor in model.graph.initializer:
        content = bytes(tensor.raw_data)
        data += bytes(-len(data) % one_of((1, 4, 64, 4096), random))
        place = {"location": _DATA_FILE, "offset": str(len(data)), "length": str(len(content))}
        if random.random() < 0.1:
            place[one_of(("offset", "length"), random)] = str(one_of(ODD_NUMBERS, random))
        data += content
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
    if random.random() < 0.1:
        data = data[: int(random.integers(0, len(data) + 1))]
    (folder / _DATA_FILE).unlink(missing_ok=True)  # a new file: the old one may be mapped
    (folder / _DATA_FILE).write_bytes(data)
    (folder / "layer.onnx").write_bytes(model.SerializeToString())
    return folder / "layer.onnx"


# -------------------- inputs

_KINDS = {
    "tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
}  # fmt: skip


def _feeds(session: Any, dim: int, random: Random) -> dict[str, Array]:
    """Inputs of the types that the session wants, most of them with rows of size `dim`."""
    rows = [one_of((0, 1, 2, 3, 17), random) for _ in range(int(random.integers(0, 3)))]
    if random.random() < 0.05:
        rows = [300]
    last = one_of(ODD_SIZES, random) if random.random() < 0.1 else dim
    feeds = {}
    for value in session.get_inputs():
        shape = [*rows, 1 if value.name == "peak" else last]
        if random.random() < 0.05:
            shape = shape[int(random.integers(0, len(shape) + 1)) :]
        array = random.standard_normal(shape) * 10.0 ** random.integers(-3, 4)
        if random.random() < 0.3 and np.size(array):
            np.put(array, random.integers(0, np.size(array), 3), one_of(ODD_FLOATS, random))
        with np.errstate(all="ignore"):
            feeds[value.name] = np.asarray(array).astype(_KINDS.get(value.type, np.float32))
    return feeds


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer until the seeds end."""
    parser = script_parser("endurance.damaged_layers", __doc__)
    parser.add_argument("library", type=Path, help="file of the native kernels")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        answer(sys.stdin, use_damaged_layers(args.library.resolve(), Path(folder)), ONNXRUNTIME_ERRORS)


if __name__ == "__main__":
    run_script(main)
