"""Packs weights in the layout of the native kernels, which then map them from the file.

A packed graph calls native operators instead of our functions, which it no longer contains.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from u2moe.quantize.passes.half_storage import stored_value
from u2moe.quantize.weights import Array
from u2moe.runtime.bundle import contract
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.file import group_of, shape_of
from u2moe.runtime.model.native import CPU, choose_kernels, plain_name

if TYPE_CHECKING:
    from u2moe.runtime.bundle.mixture import Mixture

ALIGNMENT = 4096
"""Alignment of packed weights in bytes: onnxruntime maps pages."""
_LINE = 64
_SMALLEST = 1024
"""Smaller weights, in bytes, stay in the graph: shape inference needs some small constants."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """One weight, its scale and its bias, in int8 [in, out] or in 4 bits as `arithmetic.Int4`.

    Attributes:
        weight: the integers; `scale`: one per column; `bias`: None without one; `steps`: in 4 bits.
        sizes: rows and columns.
        block_size: rows that share a scale in 4 bits; 0: int8.
        expert: index of this expert's bias in `bias`; None: all of it.
    """

    weight: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    sizes: tuple[int, int]
    steps: ir.Value | None = None
    block_size: int = 0
    expert: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self._call(*[None] * (5 if self.steps else 4))

    def packed(self) -> Array:
        """The packed weight, uint8 [bytes]."""
        weight, *others = [_stored(value) for value in (self.weight, self.steps, self.scale) if value is not None]
        bias = None if self.bias is None else _stored(self.bias)
        if bias is not None and self.expert is not None:
            bias = np.ascontiguousarray(bias[self.expert])
        to = np.empty(self.num_bytes, np.uint8)
        self._call(weight, *others, bias, to)
        return to

    def _call(self, *arrays: Array | None) -> int:
        pointers = [None if array is None else array.ctypes.data for array in arrays]
        *given, target = pointers
        if self.block_size:
            found = _library().u2moe_kernels_pack_int4(*given, *self.sizes, self.block_size, target)
        else:
            found = _library().u2moe_kernels_pack_int8(*given, *self.sizes, target)
        return int(found)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(choose_kernels("native", [CPU]).library))
    sizes, pointer = [ctypes.c_size_t] * 2, ctypes.c_void_p
    for function, num_inputs, further in (
        (library.u2moe_kernels_pack_int8, 3, []),
        (library.u2moe_kernels_pack_int4, 4, [ctypes.c_size_t]),
    ):
        function.argtypes, function.restype = [pointer] * num_inputs + sizes + further + [pointer], ctypes.c_size_t
    return library


def pack_graph(model: ir.Model, layout: int) -> int:
    """Pack the weights of all calls that native kernels compute, in place; returns the number of calls.

    Args:
        model: a quantized graph; its weights are read and packed one at a time when it is saved.
        layout: version of the layout.
    """
    calls = [
        node for node in model.graph if node.domain == contract.MOE_DOMAIN and plain_name(node.op_type) in _READERS
    ]
    for node in calls:
        name = plain_name(node.op_type)
        values = [value for value in node.inputs if value is not None]
        num_others, attributes, products = _READERS[name](node, list(map(stored_value, values)))
        weights = _blob(f"{node.name}/packed", products, group_of(products[0].weight))
        model.graph.register_initializer(weights)
        kept = {key: attribute.value for key, attribute in node.attributes.items()}
        packed = ir.node(
            name, [*values[:num_others], weights], {**kept, **attributes, "layout": layout},
            domain=node.domain, name=node.name,
        )  # fmt: skip
        before, after = node.outputs[0], packed.outputs[0]
        after.name, after.type, after.shape = before.name, before.type, before.shape
        model.graph.insert_before(node, packed)
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        model.functions.pop(node.op_identifier(), None)
    RemoveUnusedNodesPass()(model)  # with their weights
    return len(calls)


def _blob(name: str, products: Sequence[Product], group: str) -> ir.Value:
    """An initializer with all these weights, one after the other."""
    shape = ir.Shape([sum(product.num_bytes for product in products)])

    def load() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([product.packed() for product in products]), name=name)

    tensor = ir.LazyTensor(load, ir.DataType.UINT8, shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.UINT8), shape=shape, const_value=tensor)
    if group in contract.WEIGHT_GROUPS:
        value.metadata_props[contract.GROUP_METADATA] = group
    return value


_Read = tuple[int, dict[str, int], list[Product]]
"""Inputs before the weights, further attributes, and the weights."""


def _linear(num_others: int) -> Callable[[ir.Node, list[ir.Value]], _Read]:
    def read(node: ir.Node, values: list[ir.Value]) -> _Read:
        parts = values[num_others:]
        rows, columns = _sizes(node, parts[0])
        has_bias = len(parts) == (4 if _block_size(node) else 3)
        return num_others, {"in": rows, "out": columns}, _products(node, parts, [(rows, columns)], has_bias)

    return read


def _feed_forward(num_gates: int) -> Callable[[ir.Node, list[ir.Value]], _Read]:
    def read(node: ir.Node, values: list[ir.Value]) -> _Read:
        dim, hidden = _sizes(node, values[1])
        sizes = [*[(dim, hidden)] * (num_gates + 1), (hidden, dim)]
        products = _products(node, values[1:], sizes, bool(node.attributes["bias"].as_int()), num_gates)
        return 1, {"in": dim, "hidden": hidden}, products

    return read


def _products(
    node: ir.Node, values: Sequence[ir.Value], sizes: Sequence[tuple[int, int]], has_bias: bool, num_gates: int = 0
) -> list[Product]:
    """Products of these sizes whose weight, steps in 4 bits, scale, and bias but for gates follow each other."""
    parts, block_size = iter(values), _block_size(node)
    return [
        Product(
            weight=next(parts),
            steps=next(parts) if block_size else None,
            scale=next(parts),
            bias=next(parts) if has_bias and index >= num_gates else None,
            sizes=size,
            block_size=block_size,
        )
        for index, size in enumerate(sizes)
    ]


def _block_size(node: ir.Node) -> int:
    """Rows that share a step in 4 bits; 0: int8."""
    return node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0


def _int8_experts(node: ir.Node, values: list[ir.Value]) -> _Read:
    mixture = cast("Mixture", mixture_of(node))
    second_biases = values[2] if mixture.bias else None
    parts = iter(values[2 + mixture.bias :])
    products: list[Product] = []
    for expert in range(mixture.num_experts):
        first, first_scale = next(parts), next(parts)
        bias = next(parts) if mixture.bias else None
        second, second_scale = next(parts), next(parts)
        products += [
            Product(weight=first, scale=first_scale, bias=bias, sizes=_sizes(node, first)),
            Product(weight=second, scale=second_scale, bias=second_biases, sizes=_sizes(node, second), expert=expert),
        ]
    return 2, {"hidden": products[0].sizes[1]}, products


def _int4_experts(node: ir.Node, values: list[ir.Value]) -> _Read:
    mixture = cast("Mixture", mixture_of(node))
    hidden, dim = shape_of(values[2])[0], shape_of(values[1])[0]
    sizes = [(dim, hidden), (hidden, dim)] * mixture.num_experts
    return 2, {"hidden": hidden}, _products(node, values[2:], sizes, mixture.bias)


def _sizes(node: ir.Node, weight: ir.Value) -> tuple[int, int]:
    """Rows and columns of the first weight of a layer."""
    shape = shape_of(weight)
    return (node.attributes["in"].as_int(), shape[0]) if _block_size(node) else (shape[0], shape[1])


_READERS: dict[str, Callable[[ir.Node, list[ir.Value]], _Read]] = {
    "Int8MatMul": _linear(2),
    "Int8Linear": _linear(1),
    "Int8FeedForward": _feed_forward(0),
    "Int8GatedFeedForward": _feed_forward(1),
    "Int8MixtureOfExperts": _int8_experts,
    "Int4Linear": _linear(1),
    "Int4FeedForward": _feed_forward(0),
    "Int4GatedFeedForward": _feed_forward(1),
    "Int4MixtureOfExperts": _int4_experts,
}


def _stored(value: ir.Value) -> Array:
    """The values of an initializer, of halves in float32; a mapped file does not stay in memory."""
    tensor: Any = value.const_value
    array = np.array(tensor.numpy(), np.float32 if tensor.dtype == ir.DataType.FLOAT16 else None)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array


def save_mapped(model: ir.Model, file: Path, progress: Callable[[str], None] = lambda _: None) -> None:
    """Write a graph and, beside it, its weights: large ones begin with a page, others with a cache line."""
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
            value.const_value = ir.ExternalTensor(
                location, offset, content.nbytes, value.const_value.dtype,
                shape=ir.Shape(content.shape), name=name, base_dir=file.parent,
            )  # fmt: skip
    ir.save(model, file)
