"""Malformed layers for the native kernels: wrong attributes, weights, shapes and inputs, loaded and run. For every
graph, onnxruntime must return a result or an error. A seed makes different layers for each instruction set in
U2MOE_KERNELS_ISA."""

import math
import os
import zlib

import numpy as np
import onnx
from damage import damaged, one_of
from drawn_layers import draw_layer
from layers import session_with

from u2moe.runtime.bundle.functions import NATIVE

ODD_NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 5, 16, 24, 64, 65, 128, 1024, 1025, 2**24, 2**31, 2**40, 2**63 - 1)
ODD_SIZES = (0, 1, 2, 7, 16, 17, 33, 40)
ODD_FLOATS = (np.nan, np.inf, -np.inf, 3e38, -1e38, 1e-44, 0.0, -1.0)
ODD_TEXTS = ("", "relu", "Swish", "gelu", "x" * 300, "a\0b")
DTYPES = (np.int8, np.uint8, np.float32, np.int64, np.float16)
HUGE = 2**24
"""Size of an axis of an array that another axis makes empty. With a larger size, onnxruntime would request memory that
makes the address sanitizer end the process, unlike the system."""
_DATA_FILE = "weights.bin"


def use_damaged_layers(library, folder):
    """Return a function that damages a layer, and runs it with the kernels of `library` on one or two threads."""
    isa = zlib.crc32(os.environ.get("U2MOE_KERNELS_ISA", "").encode())

    def use(random):
        random = np.random.default_rng([int(random.integers(2**32)), isa])
        model, shapes = draw_layer(library, random)
        for _ in range(random.integers(0, 4)):
            one_of(DAMAGES, random)(model, random)
        source = model.SerializeToString()
        if random.random() < 0.05:
            source = damaged(source, random)
        elif random.random() < 0.15:
            source = _with_external_data(model, folder, random)
        session = session_with(source, library, num_threads=int(random.integers(1, 3)))
        for _ in range(2):
            session.run(None, _feeds(session, shapes(random), random))
        return "accepted"

    return use


# -------------------- damage


def _change_attribute(model, random):
    """Remove an attribute, change its type or value, or add one."""
    node = model.graph.node[0]
    own = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    name = one_of([*own, *own, "layout", "in", "out", "hidden", "bias"], random)
    same = {bytes: "text", float: "float", list: "list"}.get(type(own.get(name)), "number")
    kind = one_of(("nothing", same, same, "number", "text", "float", "list", "tensor"), random)
    values = {
        "number": one_of(ODD_NUMBERS, random),
        "text": one_of(ODD_TEXTS, random),
        "float": float(one_of((*ODD_FLOATS, 0.5), random)),
        "list": [one_of(ODD_NUMBERS, random) for _ in range(one_of((1, 2, 2, 3), random))],
        "tensor": onnx.numpy_helper.from_array(np.ones(3, np.float32)),
    }
    own[name] = values.get(kind)
    del node.attribute[:]
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in own.items() if value is not None)


def _change_weight(model, random):
    """Change shape, type or size; use a shape that does not fit the bytes; or use numbers at the limits."""
    if not model.graph.initializer:
        return
    tensor = one_of(model.graph.initializer, random)
    if len(tensor.raw_data) != math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize:
        return  # already external
    array = onnx.numpy_helper.to_array(tensor).copy()
    match one_of(("replace", "sizes", "more", "fewer", "shape", "numbers", "numbers"), random):
        case "replace":
            array = np.ones(_odd_shape(random), one_of(DTYPES, random))
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        case "sizes":
            array = np.resize(array, [max(1, size + random.integers(-2, 3)) for size in tensor.dims])
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        case "more":
            tensor.raw_data += bytes(int(random.integers(1, 100)))
        case "fewer":
            tensor.raw_data = tensor.raw_data[: random.integers(0, len(tensor.raw_data) + 1)]
        case "shape":
            if tensor.dims:
                tensor.dims[int(random.integers(len(tensor.dims)))] = one_of(ODD_NUMBERS, random)
        case _:
            if array.size:
                places = random.integers(0, array.size, random.integers(1, array.size + 1))
                is_float, kind = array.dtype.kind == "f", array.dtype
                limits = ODD_FLOATS if is_float else (np.iinfo(kind).min, np.iinfo(kind).max)
                array.flat[places] = one_of(limits, random)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _odd_shape(random):
    return [one_of(ODD_SIZES, random) for _ in range(random.integers(0, 5))]


def _change_inputs(model, random):
    """Remove, exchange or repeat inputs; swap constants and inputs of the graph."""
    inputs, fed, constants = model.graph.node[0].input, model.graph.input, model.graph.initializer
    if not inputs:
        return
    position, other = random.integers(len(inputs), size=2).tolist()
    match one_of(("remove", "swap", "repeat", "empty", "cut", "variable", "constant"), random):
        case "remove":
            del inputs[position]
        case "cut":
            del inputs[position:]
        case "swap":
            inputs[position], inputs[other] = inputs[other], inputs[position]
        case "repeat":
            inputs.append(inputs[position])
        case "empty":
            inputs[position] = ""
        case "constant":  # a node of only constants is computed at creation
            if fed:
                value = fed.pop(random.integers(len(fed)))
                kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
                if kind.kind != "O":  # strings
                    array = np.ones(_odd_shape(random), kind)
                    constants.append(onnx.numpy_helper.from_array(array, value.name))
        case _:
            for index, tensor in enumerate(constants):
                if tensor.name == inputs[position]:
                    fed.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
                    del constants[index]
                    break


def _change_node(model, random):
    """Change operator, number, domain or number of outputs; drop the function."""
    node = model.graph.node[0]
    match one_of(("operator", "number", "domain", "outputs", "function", "twice"), random):
        case "operator":
            node.op_type = one_of(NATIVE, random)
        case "number":
            node.op_type += one_of(("_2", "_9", "_10", "_0"), random)
        case "domain":
            node.domain = one_of(("", "com.microsoft"), random)
        case "outputs":
            node.output.append("another")
        case "function":
            del model.functions[:]
        case _:
            again = model.graph.node.add()
            again.CopyFrom(node)
            again.name = "again"
            again.output[:] = [f"again{index}" for index in range(len(node.output))]


def _change_declaration(model, random):
    """Declare other types or shapes of the graph's inputs and outputs."""
    value, kinds = one_of([*model.graph.input, *model.graph.output], random), onnx.TensorProto
    kind = one_of((value.type.tensor_type.elem_type, kinds.FLOAT, kinds.UINT8, kinds.INT64, kinds.STRING), random)
    shape = [one_of((*ODD_SIZES, "n", -1), random) for _ in range(random.integers(0, 4))]
    value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, shape))


DAMAGES = (
    _change_attribute, _change_attribute, _change_weight, _change_weight, _change_inputs, _change_node,
    _change_declaration,
)  # fmt: skip


def _with_external_data(model, folder, random):
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
        data = data[: random.integers(0, len(data) + 1)]
    (folder / _DATA_FILE).unlink(missing_ok=True)  # a new file: the old one may be mapped
    (folder / _DATA_FILE).write_bytes(data)
    (folder / "layer.onnx").write_bytes(model.SerializeToString())
    return folder / "layer.onnx"


# -------------------- inputs

_KINDS = {
    "tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(int64)": np.int64,
    "tensor(float16)": np.float16,
}  # fmt: skip


def _feeds(session, shapes, random):
    """Return inputs of the session's types, in these shapes, one of them possibly changed."""
    feeds, values = {}, session.get_inputs()
    odd = random.integers(len(values)) if values and random.random() < 0.2 else -1
    for index, value in enumerate(values):
        shape = list(shapes.get(value.name, [size if isinstance(size, int) else 1 for size in value.shape]))
        if index == odd:
            _change_shape(shape, random)
        feeds[value.name] = _numbers(shape, _KINDS.get(value.type, np.float32), random)
    return feeds


def _change_shape(shape, random):
    """Change the size of an axis, remove or add axes, or make the array empty with a huge axis."""
    action = one_of(("size", "size", "cut", "more", "huge"), random)
    if action == "more" or not shape:
        shape.insert(0, one_of(ODD_SIZES, random))
    elif action == "cut":
        del shape[: random.integers(1, len(shape) + 1)]
    elif action == "huge" and len(shape) > 1:
        empty, huge = random.permutation(len(shape))[:2]
        shape[empty], shape[huge] = 0, HUGE
    else:
        shape[random.integers(len(shape))] = one_of(ODD_SIZES, random)


def _numbers(shape, kind, random):
    """Return random numbers, sometimes with odd ones; integers are small, because they may be counts."""
    if kind == np.int64:
        return np.full(shape, one_of(ODD_NUMBERS, random) if random.random() < 0.2 else random.integers(-1, 3))
    array = np.asarray(random.standard_normal(shape) * 10.0 ** random.integers(-3, 4))
    if random.random() < 0.3 and array.size:
        np.put(array, random.integers(0, array.size, 3), one_of(ODD_FLOATS, random))
    with np.errstate(all="ignore"):
        return array.astype(kind)
