"""Malformed layers for the native kernels: wrong attributes, weights, shapes and inputs, loaded and run. For every
graph, onnxruntime must return a result or an error. A seed makes different layers for each instruction set in
U2MOE_KERNELS_ISA."""

import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from damage import damaged, one_of
from drawn_layers import Random, Shapes, draw_layer
from layers import Array, session_with

from u2moe.runtime.bundle.functions import NATIVE

Model = onnx.ModelProto
ODD_NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 5, 16, 24, 64, 65, 128, 1024, 1025, 2**24, 2**31, 2**40, 2**63 - 1)
ODD_SIZES = (0, 1, 2, 7, 16, 17, 33, 40)
ODD_FLOATS = (np.nan, np.inf, -np.inf, 3e38, -1e38, 1e-44, 0.0, -1.0)
ODD_TEXTS = ("", "relu", "Swish", "gelu", "x" * 300, "a\0b")
DTYPES = (np.int8, np.uint8, np.float32, np.int64, np.float16)
HUGE = 2**24
"""Size of an axis of an array that another axis makes empty. With a larger size, onnxruntime would request memory that
makes the address sanitizer end the process, unlike the system."""
_DATA_FILE = "weights.bin"


def use_damaged_layers(library: Path, folder: Path) -> Callable[[Random], str]:
    """Return a function that damages a layer, and runs it with the kernels of `library` on one or two threads."""
    isa = zlib.crc32(os.environ.get("U2MOE_KERNELS_ISA", "").encode())

    def use(random: Random) -> str:
        random = np.random.default_rng([int(random.integers(2**32)), isa])
        layer = draw_layer(library, random)
        for _ in range(int(random.integers(0, 4))):
            one_of(DAMAGES, random)(layer.model, random)
        source: bytes | Path = layer.model.SerializeToString()
        if random.random() < 0.05:
            source = damaged(bytes(source), random)
        elif random.random() < 0.15:
            source = _with_external_data(layer.model, folder, random)
        session = session_with(source, library, num_threads=int(random.integers(1, 3)))
        for _ in range(2):
            session.run(None, _feeds(session, layer.shapes(random), random))
        return "accepted"

    return use


# -------------------- damage


def _change_attribute(model: Model, random: Random) -> None:
    """Remove an attribute, change its type or value, or add one."""
    node = model.graph.node[0]
    own = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    name = one_of([*own, *own, "layout", "in", "out", "hidden", "bias"], random)
    kind = one_of(("nothing", "same", "same", "number", "text", "float", "list", "tensor"), random)
    own[name] = _odd_value(kind, own.get(name, 0), random)
    del node.attribute[:]
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in own.items() if value is not None)


def _odd_value(kind: str, before: Any, random: Random) -> Any:
    """Return a value of an attribute of this kind, or of its former type; None: no attribute."""
    if kind == "same":
        kind = {bytes: "text", float: "float", list: "list"}.get(type(before), "number")
    if kind == "number":
        return one_of(ODD_NUMBERS, random)
    if kind == "text":
        return one_of(ODD_TEXTS, random)
    if kind == "float":
        return float(one_of((*ODD_FLOATS, 0.5), random))
    if kind == "list":
        return [one_of(ODD_NUMBERS, random) for _ in range(one_of((1, 2, 2, 3), random))]
    if kind == "tensor":
        return onnx.numpy_helper.from_array(np.ones(3, np.float32))
    return None


def _change_weight(model: Model, random: Random) -> None:
    """Change shape, type or size; use a shape that does not fit the bytes; or use numbers at the limits."""
    if not model.graph.initializer:
        return
    tensor = one_of(model.graph.initializer, random)
    if len(tensor.raw_data) != math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize:
        return  # already external
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
    """Remove, exchange or repeat inputs; swap constants and inputs of the graph."""
    inputs = model.graph.node[0].input
    if not inputs:
        return
    position, other = (int(random.integers(len(inputs))) for _ in range(2))
    action = one_of(("remove", "swap", "repeat", "empty", "cut", "variable", "constant"), random)
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
    elif action == "constant":
        _make_constant(model, random)
    else:
        _make_variable(model, inputs[position])


def _make_variable(model: Model, name: str) -> None:
    """Turn a constant into an input of the graph."""
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name == name:
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
            del model.graph.initializer[index]
            return


def _make_constant(model: Model, random: Random) -> None:
    """Turn an input of the graph into a constant. A node of only constants is computed at creation."""
    if not model.graph.input:
        return
    value = model.graph.input.pop(int(random.integers(len(model.graph.input))))
    shape = [one_of(ODD_SIZES, random) for _ in range(int(random.integers(0, 5)))]
    kind = value.type.tensor_type.elem_type
    if kind != onnx.TensorProto.STRING:
        array = np.ones(shape, onnx.helper.tensor_dtype_to_np_dtype(kind))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))


def _change_node(model: Model, random: Random) -> None:
    """Change operator, number, domain or number of outputs; drop the function."""
    node = model.graph.node[0]
    action = one_of(("operator", "number", "domain", "outputs", "function", "twice"), random)
    if action == "operator":
        node.op_type = one_of(NATIVE, random)
    elif action == "number":
        node.op_type += one_of(("_2", "_9", "_10", "_0"), random)
    elif action == "domain":
        node.domain = one_of(("", "com.microsoft"), random)
    elif action == "outputs":
        node.output.append("another")
    elif action == "function":
        del model.functions[:]
    else:
        again = model.graph.node.add()
        again.CopyFrom(node)
        again.name = "again"
        again.output[:] = [f"again{index}" for index in range(len(node.output))]


def _change_declaration(model: Model, random: Random) -> None:
    """Declare other types or shapes of the graph's inputs and outputs."""
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
    """Write the model as a file, with weights in another, at offsets that may be invalid."""
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


def _feeds(session: Any, shapes: Shapes, random: Random) -> dict[str, Array]:
    """Return inputs of the session's types, in these shapes, one of them possibly changed."""
    feeds, values = {}, session.get_inputs()
    odd = int(random.integers(len(values))) if values and random.random() < 0.2 else -1
    for index, value in enumerate(values):
        shape = list(shapes.get(value.name, [size if isinstance(size, int) else 1 for size in value.shape]))
        if index == odd:
            _change_shape(shape, random)
        feeds[value.name] = _numbers(shape, _KINDS.get(value.type, np.float32), random)
    return feeds


def _change_shape(shape: list[int], random: Random) -> None:
    """Change the size of an axis, remove or add axes, or make the array empty with a huge axis."""
    action = one_of(("size", "size", "cut", "more", "huge"), random)
    if action == "more" or not shape:
        shape.insert(0, one_of(ODD_SIZES, random))
    elif action == "cut":
        del shape[: int(random.integers(1, len(shape) + 1))]
    elif action == "huge" and len(shape) > 1:
        empty, huge = random.permutation(len(shape))[:2].tolist()
        shape[empty], shape[huge] = 0, HUGE
    else:
        shape[int(random.integers(len(shape)))] = one_of(ODD_SIZES, random)


def _numbers(shape: Sequence[int], kind: Any, random: Random) -> Array:
    """Return random numbers, sometimes with odd ones; integers are small, because they may be counts."""
    if kind == np.int64:
        return np.full(shape, one_of(ODD_NUMBERS, random) if random.random() < 0.2 else random.integers(-1, 3))
    array = np.asarray(random.standard_normal(shape) * 10.0 ** random.integers(-3, 4))
    if random.random() < 0.3 and array.size:
        np.put(array, random.integers(0, array.size, 3), one_of(ODD_FLOATS, random))
    with np.errstate(all="ignore"):
        return array.astype(kind)
