"""Packs weights in the layout of the native kernels, which can then map the weights from the file.

A packed graph calls native operators instead of our functions, and contains no functions.
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from u2moe.quantize.arithmetic import Array
from u2moe.quantize.formats import CONVERSIONS, conversion
from u2moe.quantize.formats.conversion import WeightConversion
from u2moe.quantize.layers import Weights, calls, stored_value, turn_into
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle.weight_formats import INT8, LAYERS, WEIGHT_FORMATS
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.file import group_of, shape_of
from u2moe.runtime.model.native import CPU, choose_kernels

ALIGNMENT = 4096  # alignment of packed weights in bytes, because onnxruntime maps whole pages
_LINE = 64
_SMALLEST = 1024  # smaller weights, in bytes, stay in the graph, because shape inference needs some constants


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(choose_kernels("native", [CPU]).library))


@dataclass(frozen=True, kw_only=True)
class Product:
    """A weight, as stored parts of a format, and its bias, if any."""

    conversion: WeightConversion
    parts: Sequence[ir.Value]
    bias: ir.Value | None
    sizes: tuple[int, int]  # rows and columns
    expert: int | None = None  # index of the weight's expert in `bias`; None: `bias` belongs to this weight only

    def packed(self) -> Array:
        """Return the packed weight, uint8 [bytes]."""
        bias, to = None if self.bias is None else stored_array(self.bias), np.empty(self.pack(), np.uint8)
        if bias is not None and self.expert is not None:
            bias = np.ascontiguousarray(bias[self.expert])
        self.pack(*map(stored_array, self.parts), bias, to)
        return to

    def pack(self, *arrays: Array | None) -> int:
        """Return the packed size in bytes. Given `arrays` (parts, bias, target), pack parts and bias into target."""
        given = arrays or [None] * (len(self.parts) + 2)
        *pointers, to = (ctypes.c_void_p(None if array is None else array.ctypes.data) for array in given)
        block = [self.conversion.block_size] if self.conversion.block_size else []
        pack = _library()[f"u2moe_kernels_pack_{self.conversion.form.name}"]
        pack.restype = ctypes.c_size_t
        return int(pack(*pointers, *map(ctypes.c_size_t, [*self.sizes, *block]), to))


def pack_graph(model: ir.Model, layout: int) -> int:
    """In a quantized graph, pack the weights of all calls that native kernels compute; return the number of calls.

    Weights are read and packed one at a time when the graph is saved. `layout` is the version of their layout.
    """
    added, found = Weights(model), calls(model, *_PACKED)
    for node in found:
        values = [value for value in node.inputs if value is not None]
        num_others, attributes, products = _read(node, list(map(stored_value, values)))
        size, group = sum(product.pack() for product in products), group_of(products[0].parts[0])
        weights = added.add(f"{node.name}/packed", ir.DataType.UINT8, [size], partial(_packed, products), group)
        kept = {key: attribute.value for key, attribute in node.attributes.items()}
        model.functions.pop(node.op_identifier(), None)
        inputs = [*values[:num_others], weights]
        turn_into(node, plain_name(node.op_type), inputs, {**kept, **attributes, "layout": layout})
    RemoveUnusedNodesPass()(model)  # also removes unused weights
    return len(found)


def _packed(products: Sequence[Product]) -> Array:
    return np.concatenate([product.packed() for product in products])


_NATIVE = [kind for kind in CONVERSIONS if not WEIGHT_FORMATS[kind].not_native]
_PAIRS = [(kind, layer) for kind in _NATIVE for layer in LAYERS if layer != "Embedding"]
_PACKED = {"Int8MatMul": (INT8.name, "MatMul")}
_PACKED |= {WEIGHT_FORMATS[kind].function(layer): (kind, layer) for kind, layer in _PAIRS}
"""Format of the weights and kind of layer, by function."""


def _read(node: ir.Node, values: Sequence[ir.Value]) -> tuple[int, dict[str, int], list[Product]]:
    """Return, for a call, the number of inputs that are not weights, the attributes to add, and the weights."""
    kind, layer = _PACKED[plain_name(node.op_type)]
    stated = node.attributes
    settings = {name: stated[name].as_int() for name in ("block_size", "in", "bias") if name in stated}
    made, mixture = conversion(kind, settings.get("block_size", 0)), mixture_of(node)
    num_others = 2 if mixture or layer == "MatMul" else 1
    weights, joined = list(values[num_others:]), None
    if mixture and mixture.bias and made.joins_biases:
        joined, *weights = weights
    size = 1 + len(made.others)
    rows, columns = shape_of(values[1] if mixture else weights[0])[0], shape_of(weights[size - 1])[0]
    rows, has_bias = settings.get("in", rows), bool(settings.get("bias"))
    sizes, attributes = [(rows, columns)], {"in": rows, "out": columns}
    biases = [len(weights) > size]
    if mixture:
        sizes, attributes = [(rows, columns), (columns, rows)] * mixture.num_experts, {"hidden": columns}
        biases = [has_bias, has_bias and joined is None] * mixture.num_experts
    elif layer.endswith("FeedForward"):
        num_gates = int(layer.startswith("Gated"))
        sizes, attributes = [*[(rows, columns)] * (1 + num_gates), (columns, rows)], {"in": rows, "hidden": columns}
        biases = [*[False] * num_gates, has_bias, has_bias]
    rest, products = iter(weights), []
    for index, (shape, own) in enumerate(zip(sizes, biases, strict=True)):
        parts, is_joined = list(itertools.islice(rest, size)), joined is not None and index % 2
        bias, expert = (joined, index // 2) if is_joined else (next(rest) if own else None, None)
        products.append(Product(conversion=made, parts=parts, bias=bias, sizes=shape, expert=expert))
    return num_others, attributes, products


def stored_array(value: ir.Value) -> Array:
    """Return the values of an initializer, float16 as float32. If they were mapped from a file, unmap it."""
    tensor: Any = value.const_value
    array = np.array(tensor.numpy(), np.float32 if tensor.dtype == ir.DataType.FLOAT16 else None)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def save_mapped(model: ir.Model, file: Path, progress: Callable[[str], None] = lambda _: None) -> None:
    """Write a graph and a file with its weights. Large weights are aligned to pages, others to cache lines."""
    location = f"{file.name}.data"
    with (file.parent / location).open("wb") as data:
        for number, (name, value) in enumerate(model.graph.initializers.items()):
            if value.const_value is None or value.const_value.nbytes < _SMALLEST:
                continue
            if number % 100 == 0:
                progress(f"{file.name}: weight {number + 1} of {len(model.graph.initializers)}: {name}")
            content = value.const_value.numpy()
            data.write(bytes(-data.tell() % (ALIGNMENT if content.nbytes >= ALIGNMENT else _LINE)))
            offset = data.tell()
            data.write(np.ascontiguousarray(content).view(np.uint8).reshape(-1).data)
            dtype, shape = value.const_value.dtype, ir.Shape(content.shape)
            value.const_value = ir.ExternalTensor(
                location, offset, content.nbytes, dtype, shape=shape, name=name, base_dir=file.parent
            )
    ir.save(model, file)
