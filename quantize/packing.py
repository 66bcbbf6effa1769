"""Packs weights in the layout of the native kernels, which then map them from the file.

A packed graph calls native operators instead of our functions, which it no longer contains.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from u2moe.quantize.formats.conversion import WeightConversion
from u2moe.quantize.formats.table import CONVERSIONS, conversion
from u2moe.quantize.passes.half_storage import stored_value
from u2moe.quantize.weights import Array
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle.weight_formats import INT8, WEIGHT_FORMATS
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.file import group_of, shape_of
from u2moe.runtime.model.native import CPU, choose_kernels

if TYPE_CHECKING:
    from u2moe.runtime.bundle.mixture import Mixture

ALIGNMENT = 4096
"""Alignment of packed weights in bytes: onnxruntime maps pages."""
_LINE = 64
_SMALLEST = 1024
"""Smaller weights, in bytes, stay in the graph: shape inference needs some small constants."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """One weight in a format of `formats`, and its bias.

    Attributes:
        parts: what is stored of the weight.
        bias: None without one.
        sizes: rows and columns.
        conversion: to its format.
        expert: index of this expert's bias in `bias`; None: all of it.
    """

    parts: Sequence[ir.Value]
    bias: ir.Value | None
    sizes: tuple[int, int]
    conversion: WeightConversion
    expert: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self._call(*[None] * (len(self.parts) + 2))

    def packed(self) -> Array:
        """The packed weight, uint8 [bytes]."""
        bias = None if self.bias is None else _stored(self.bias)
        if bias is not None and self.expert is not None:
            bias = np.ascontiguousarray(bias[self.expert])
        to = np.empty(self.num_bytes, np.uint8)
        self._call(*map(_stored, self.parts), bias, to)
        return to

    def _call(self, *arrays: Array | None) -> int:
        *given, target = (None if array is None else array.ctypes.data for array in arrays)
        sizes = [*self.sizes, self.conversion.block_size] if self.conversion.block_size else self.sizes
        pack = _library()[f"u2moe_kernels_pack_{self.conversion.form.name}"]
        pack.restype = ctypes.c_size_t
        pointers = [*map(ctypes.c_void_p, given), *map(ctypes.c_size_t, sizes), ctypes.c_void_p(target)]
        return int(pack(*pointers))


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(choose_kernels("native", [CPU]).library))


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
        weights = _blob(f"{node.name}/packed", products, group_of(products[0].parts[0]))
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


def _products(
    node: ir.Node, values: Sequence[ir.Value], kind: str, sizes: Sequence[tuple[int, int]], biases: Sequence[bool]
) -> list[Product]:
    """Products of these sizes whose parts, and where there is one the bias, follow each other."""
    block_size = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    made, rest = conversion(kind, block_size), iter(values)
    size = 1 + len(made.others)
    return [
        Product(
            parts=list(itertools.islice(rest, size)),
            bias=next(rest) if has_bias else None,
            sizes=shape,
            conversion=made,
        )
        for shape, has_bias in zip(sizes, biases, strict=True)
    ]


def _linear(kind: str, node: ir.Node, values: list[ir.Value], num_others: int = 1) -> _Read:
    parts = values[num_others:]
    size = 1 + len(CONVERSIONS[kind].others)
    rows, columns = _rows(node, parts[0]), shape_of(parts[size - 1])[0]
    products = _products(node, parts, kind, [(rows, columns)], [len(parts) > size])
    return num_others, {"in": rows, "out": columns}, products


def _feed_forward(kind: str, node: ir.Node, values: list[ir.Value], num_gates: int = 0) -> _Read:
    dim, hidden = _rows(node, values[1]), shape_of(values[1 + len(CONVERSIONS[kind].others)])[0]
    sizes = [*[(dim, hidden)] * (num_gates + 1), (hidden, dim)]
    biases = [*[False] * num_gates, *[bool(node.attributes["bias"].as_int())] * 2]
    return 1, {"in": dim, "hidden": hidden}, _products(node, values[1:], kind, sizes, biases)


def _experts(kind: str, node: ir.Node, values: list[ir.Value]) -> _Read:
    mixture = cast("Mixture", mixture_of(node))
    dim, joined = shape_of(values[1])[0], mixture.bias and CONVERSIONS[kind].joins_biases
    parts = values[2 + joined :]
    hidden = shape_of(parts[len(CONVERSIONS[kind].others)])[0]
    sizes = [(dim, hidden), (hidden, dim)] * mixture.num_experts
    products = _products(node, parts, kind, sizes, [mixture.bias, mixture.bias and not joined] * mixture.num_experts)
    if joined:
        for expert in range(mixture.num_experts):
            second = 2 * expert + 1
            products[second] = dataclasses.replace(products[second], bias=values[2], expert=expert)
    return 2, {"hidden": hidden}, products


def _rows(node: ir.Node, weight: ir.Value) -> int:
    """Rows of the first weight of a layer."""
    return node.attributes["in"].as_int() if "in" in node.attributes else shape_of(weight)[0]


_LAYERS: dict[str, Callable[[str, ir.Node, list[ir.Value]], _Read]] = {
    "Linear": _linear,
    "FeedForward": _feed_forward,
    "GatedFeedForward": partial(_feed_forward, num_gates=1),
    "MixtureOfExperts": _experts,
}
_READERS: dict[str, Callable[[ir.Node, list[ir.Value]], _Read]] = {
    "Int8MatMul": partial(_linear, INT8.name, num_others=2),
    **{
        WEIGHT_FORMATS[kind].function(layer): partial(read, kind)
        for kind in CONVERSIONS
        if not WEIGHT_FORMATS[kind].not_native
        for layer, read in _LAYERS.items()
    },
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
