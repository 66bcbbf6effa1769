"""Random layers of the native operators, with matching input shapes; `damaged_layers` damages them."""

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from damage import one_of
from layers import (
    Array,
    Attributes,
    attention_model,
    attention_shapes,
    convolutions_model,
    layer_model,
    mixture_model,
    mixture_weights,
    next_cache_model,
    packed_layer_model,
    random_matrix,
    streamed_convolution_model,
)

from u2moe.quantize.formats import conversion
from u2moe.quantize.formats.int8 import Int8Conversion
from u2moe.quantize.passes.front_end import FirstConvolutions, Window
from u2moe.runtime.bundle.functions import NATIVE
from u2moe.runtime.bundle.mixture import Mixture
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.graph.attention import Heads
from u2moe.runtime.graph.convolution import TimeConvolution
from u2moe.runtime.graph.layers import add_normalization, normalization

Random = np.random.Generator
Shapes = Mapping[str, Sequence[int]]
_PACKED_SHARE = 0.3
INT8 = Int8Conversion()


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer as a graph of one node.

    Attributes:
        model: the graph.
        shapes: draws matching shapes for its inputs, by name.
    """

    model: onnx.ModelProto
    shapes: Callable[[Random], Shapes]


def draw_layer(library: Path, random: Random) -> Layer:
    """Return a layer of any operator; weights are packed for `library` if the operator supports it."""
    operator = one_of(NATIVE, random)
    if operator == "CachedAttention":
        return _attention(random)
    if operator == "NextCache":
        return _next_cache(random)
    if operator == "Int8FirstConvolutions":
        return _convolutions(random)
    if operator == "CachedConvolution":
        return _streamed_convolution(random)
    if operator.endswith("Normalization"):
        return _normalization(operator, random)
    dim, hidden = int(random.integers(1, 50)), int(random.integers(1, 80))
    if operator == "Int8Rows":
        kind = one_of(("", *ACTIVATIONS), random)
        return _of_rows(layer_model(INT8.rows(kind or None), {"x": np.float32}, {}, {"activation": kind}), dim)
    draw = _mixture if operator.endswith("Experts") else _products
    return _of_rows(draw(library, operator, (dim, hidden), random), dim)


def _of_rows(content: bytes, dim: int) -> Layer:
    """Return a layer for rows of size `dim`."""

    def shapes(random: Random) -> Shapes:
        rows = [one_of((0, 1, 2, 3, 17), random) for _ in range(int(random.integers(0, 3)))]
        if random.random() < 0.05:
            rows = [300]
        return {"x": [*rows, dim], "q": [*rows, dim], "row_scale": [*rows, 1]}

    return Layer(model=onnx.load_from_string(content), shapes=shapes)


def _attention(random: Random) -> Layer:
    kv_heads, group = int(random.integers(1, 4)), int(random.integers(1, 3))
    heads = Heads(num_heads=kv_heads * group, num_kv_heads=kv_heads, size=one_of((1, 5, 16, 24), random))
    relative = random.random() < 0.5

    def shapes(random: Random) -> Shapes:
        sizes = (one_of((0, 1, 1, 2, 3), random), one_of((0, 1, 7, 16, 17, 40), random), int(random.integers(0, 33)))
        wide = (random.random() < 0.5, random.random() < 0.5, random.random() < 0.5)
        return {**attention_shapes(heads, *sizes, relative=relative, wide=wide), "block": [], "first_kept": [1]}

    return Layer(model=onnx.load_from_string(attention_model(heads, relative=relative)), shapes=shapes)


def _next_cache(random: Random) -> Layer:
    num_blocks, others = int(random.integers(1, 4)), [int(size) for size in random.integers(0, 4, 3)]

    def shapes(random: Random) -> Shapes:
        past, kept = (one_of((0, 1, 7, 16), random) for _ in range(2))
        own = {f"kept.{index}": [1, *others[:2], kept, others[2]] for index in range(num_blocks)}
        return {"cache": [num_blocks, *others[:2], past, others[2]], "first": [1], **own}

    return Layer(model=onnx.load_from_string(next_cache_model(num_blocks)), shapes=shapes)


def _convolutions(random: Random) -> Layer:
    first, second = (Window(kernel=int(random.integers(1, 5)), stride=int(random.integers(1, 4))) for _ in range(2))
    least = first.stride * (second.kernel - 1) + first.kernel
    both = FirstConvolutions(
        bins=least + int(random.integers(0, 20)), channels=int(random.integers(1, 20)), first=first, second=second
    )
    content = convolutions_model(both, int(random.integers(1, 40)), random)

    def shapes(random: Random) -> Shapes:
        return {"x": [one_of((0, 1, 2), random), one_of((0, 1, 6, 17, 40), random), both.bins]}

    return Layer(model=onnx.load_from_string(content), shapes=shapes)


def _streamed_convolution(random: Random) -> Layer:
    channels = int(random.integers(1, 40))
    form = TimeConvolution(
        kernel=int(random.integers(2, 18)), activation=one_of(("", *ACTIVATIONS), random), bias=random.random() < 0.5,
        norm=random.random() < 0.5, epsilon=1e-5,
    )  # fmt: skip

    def shapes(random: Random) -> Shapes:
        batch, time = one_of((0, 1, 1, 2, 3), random), one_of((0, 1, 3, 4, 17), random)
        own = {key: [batch, time, channels] for key in ("linear", "gate")}
        return {**own, "cache": [int(random.integers(1, 4)), batch, form.kernel - 1, channels], "block": []}

    return Layer(model=onnx.load_from_string(streamed_convolution_model(form, channels, random)), shapes=shapes)


def _normalization(operator: str, random: Random) -> Layer:
    size, names = int(random.integers(1, 50)), ["x", "branch"] if operator.startswith("Add") else ["x"]
    function = (add_normalization if len(names) > 1 else normalization)(1e-5)
    weights = {name: random.standard_normal(size).astype(np.float32) for name in ("weight", "bias")}
    content = layer_model(function, dict.fromkeys(names, np.float32), weights, {"epsilon": 1e-5})

    def shapes(random: Random) -> Shapes:
        rows = [one_of((0, 1, 2, 3, 17, 40), random) for _ in range(int(random.integers(0, 3)))]
        return {key: [*rows, size] for key in names}

    return Layer(model=onnx.load_from_string(content), shapes=shapes)


def _mixture(library: Path, operator: str, sizes: tuple[int, int], random: Random) -> bytes:
    num_experts = int(random.integers(1, 6))
    top_k = int(random.integers(1, num_experts + 1))
    mixture = Mixture(
        num_experts=num_experts, top_k=top_k, activation=one_of((*ACTIVATIONS,), random), bias=random.random() < 0.5,
        weights="int4" if operator.startswith("Int4") else "int8",
        block_size=one_of((16, 32, 64, 128), random) if operator.startswith("Int4") else 0,
    )  # fmt: skip
    attributes = mixture.attributes()
    if random.random() < _PACKED_SHARE:
        size = sum(_packed_bytes(library, *shape, mixture.block_size) for shape in (sizes, sizes[::-1])) * num_experts
        weights = {"gate": random_matrix(random, sizes[0], num_experts), "packed": _any_bytes(size, random)}
        own: Attributes = {**attributes, "hidden": sizes[1], "layout": _layout(library)}
        return packed_layer_model(operator, ["y"], {"x": np.float32}, weights, own)
    return mixture_model(mixture, mixture_weights(random, mixture, *sizes), *sizes)


def _products(library: Path, operator: str, sizes: tuple[int, int], random: Random) -> bytes:
    """Return a product, or a feed-forward layer of two products, or three with a gate."""
    kind, bias = one_of((*ACTIVATIONS,), random), random.random() < 0.5
    is_layer, block_size = operator.endswith("FeedForward"), 0
    fed = {"q": np.uint8, "row_scale": np.float32} if operator == "Int8MatMul" else {"x": np.float32}
    attributes: dict[str, int | float | str] = {} if operator == "Int8MatMul" else {"activation": kind}
    if operator.startswith("Int4"):
        block_size = one_of((16, 32, 64, 128), random)
        attributes |= {"block_size": block_size, "in": sizes[0]}
    if is_layer:
        attributes["bias"] = int(bias)
    shapes = {"w1": sizes, "w2": sizes[::-1]} if is_layer else {"weight": sizes}
    if "Gated" in operator:
        shapes = {"gate": sizes, **shapes}
    if random.random() < _PACKED_SHARE:
        size = sum(_packed_bytes(library, *shape, block_size) for shape in shapes.values())
        attributes |= {"in": sizes[0], "hidden" if is_layer else "out": sizes[1], "layout": _layout(library)}
        return packed_layer_model(operator, ["y"], fed, {"packed": _any_bytes(size, random)}, attributes)
    weights: dict[str, Array] = {}
    made = conversion("int4" if block_size else "int8", block_size)
    for name, shape in shapes.items():
        weights |= zip(made.names(name, bias=False), made.parts(random_matrix(random, *shape)), strict=True)
        if bias and name != "gate":
            weights[f"{name}_bias"] = random.standard_normal(shape[1]).astype(np.float32)
    if block_size:
        return packed_layer_model(operator, ["y"], fed, weights, attributes)
    if is_layer:
        layer = made.feed_forward(*sizes, kind, bias=bias, gated="Gated" in operator)
        return layer_model(layer, fed, weights, attributes)
    linear = made.linear(*sizes, bias=bias, after=kind)
    product = linear if operator == "Int8Linear" else INT8.product_of_rows(bias=bias)
    return layer_model(product, fed, weights, attributes)


def _packed_bytes(library: Path, rows: int, columns: int, block_size: int = 0) -> int:
    """Return the number of bytes of a packed weight according to the library."""
    pack = ctypes.CDLL(str(library))[f"u2moe_kernels_pack_int{4 if block_size else 8}"]
    pack.restype = ctypes.c_size_t
    sizes = [ctypes.c_size_t(size) for size in (rows, columns, *([block_size] if block_size else []))]
    return int(pack(*[None] * (4 if block_size else 3), *sizes, None))


@cache
def _layout(library: Path) -> int:
    """Return the version of the layout of packed weights that the library reads."""
    text = ctypes.create_string_buffer(4096)
    ctypes.CDLL(str(library)).u2moe_kernels_describe(text, ctypes.c_size_t(len(text)))
    return int(json.loads(text.value)["layout"])


def _any_bytes(size: int, random: Random) -> Array:
    """Return packed weights, scales and biases: random bytes; as floats, some are NaN, infinite or near 0."""
    if random.random() < 0.5:
        return np.frombuffer(random.bytes(size), np.uint8)
    return random.standard_normal(-(-size // 4)).astype(np.float32).view(np.uint8)[:size].copy()
