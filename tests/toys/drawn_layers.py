"""Random layers of the native operators, with matching input shapes; `damaged_layers` damages them."""

import ctypes
import json

import numpy as np
import onnx
from damage import one_of
from layers import (
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

_PACKED_SHARE = 0.3
INT8 = Int8Conversion()


def draw_layer(library, random):
    """Return a layer of any operator as a graph of one node, and a function that draws matching shapes for its inputs,
    by name. Weights are packed for `library` if the operator supports it."""
    operator = one_of(NATIVE, random)
    if operator.endswith("Normalization"):
        content, shapes = _normalization(operator, random)
    elif operator in _OTHERS:
        content, shapes = _OTHERS[operator](random)
    else:
        dim, hidden = random.integers(1, (50, 80)).tolist()
        if operator == "Int8Rows":
            kind = one_of(("", *ACTIVATIONS), random)
            content = layer_model(INT8.rows(kind or None), {"x": np.float32}, {}, {"activation": kind})
        else:
            draw = _mixture if operator.endswith("Experts") else _products
            content = draw(library, operator, (dim, hidden), random)

        def shapes(random):
            rows = [one_of((0, 1, 2, 3, 17), random) for _ in range(random.integers(0, 3))]
            rows = [300] if random.random() < 0.05 else rows
            return {"x": [*rows, dim], "q": [*rows, dim], "row_scale": [*rows, 1]}

    return onnx.load_from_string(content), shapes


def _attention(random):
    kv_heads, group = random.integers(1, (4, 3)).tolist()
    heads = Heads(num_heads=kv_heads * group, num_kv_heads=kv_heads, size=one_of((1, 5, 16, 24), random))
    relative = random.random() < 0.5

    def shapes(random):
        sizes = (one_of((0, 1, 1, 2, 3), random), one_of((0, 1, 7, 16, 17, 40), random), int(random.integers(0, 33)))
        wide = random.random(3) < 0.5
        return {**attention_shapes(heads, *sizes, relative=relative, wide=wide), "block": [], "first_kept": [1]}

    return attention_model(heads, relative=relative), shapes


def _next_cache(random):
    num_blocks, others = int(random.integers(1, 4)), random.integers(0, 4, 3).tolist()

    def shapes(random):
        past, kept = (one_of((0, 1, 7, 16), random) for _ in range(2))
        own = {f"kept.{index}": [1, *others[:2], kept, others[2]] for index in range(num_blocks)}
        return {"cache": [num_blocks, *others[:2], past, others[2]], "first": [1], **own}

    return next_cache_model(num_blocks), shapes


def _convolutions(random):
    first, second = (Window(kernel=int(random.integers(1, 5)), stride=int(random.integers(1, 4))) for _ in range(2))
    bins = first.stride * (second.kernel - 1) + first.kernel + int(random.integers(0, 20))
    both = FirstConvolutions(bins=bins, channels=int(random.integers(1, 20)), first=first, second=second)

    def shapes(random):
        return {"x": [one_of((0, 1, 2), random), one_of((0, 1, 6, 17, 40), random), bins]}

    return convolutions_model(both, int(random.integers(1, 40)), random), shapes


def _streamed_convolution(random):
    channels = int(random.integers(1, 40))
    form = TimeConvolution(
        kernel=int(random.integers(2, 18)), activation=one_of(("", *ACTIVATIONS), random), bias=random.random() < 0.5,
        norm=random.random() < 0.5, epsilon=1e-5,
    )  # fmt: skip

    def shapes(random):
        batch, time = one_of((0, 1, 1, 2, 3), random), one_of((0, 1, 3, 4, 17), random)
        own = {key: [batch, time, channels] for key in ("linear", "gate")}
        return {**own, "cache": [int(random.integers(1, 4)), batch, form.kernel - 1, channels], "block": []}

    return streamed_convolution_model(form, channels, random), shapes


_OTHERS = {
    "CachedAttention": _attention, "NextCache": _next_cache, "Int8FirstConvolutions": _convolutions,
    "CachedConvolution": _streamed_convolution,
}  # fmt: skip


def _normalization(operator, random):
    size, names = int(random.integers(1, 50)), ["x", "branch"] if operator.startswith("Add") else ["x"]
    function = (add_normalization if len(names) > 1 else normalization)(1e-5)
    weights = {name: random.standard_normal(size).astype(np.float32) for name in ("weight", "bias")}

    def shapes(random):
        rows = [one_of((0, 1, 2, 3, 17, 40), random) for _ in range(random.integers(0, 3))]
        return {key: [*rows, size] for key in names}

    return layer_model(function, dict.fromkeys(names, np.float32), weights, {"epsilon": 1e-5}), shapes


def _mixture(library, operator, sizes, random):
    num_experts = int(random.integers(1, 6))
    is_int4 = operator.startswith("Int4")
    mixture = Mixture(
        num_experts=num_experts, top_k=int(random.integers(1, num_experts + 1)), bias=random.random() < 0.5,
        activation=one_of((*ACTIVATIONS,), random), weights="int4" if is_int4 else "int8",
        block_size=one_of((16, 32, 64, 128), random) if is_int4 else 0,
    )  # fmt: skip
    if random.random() >= _PACKED_SHARE:
        return mixture_model(mixture, mixture_weights(random, mixture, *sizes), *sizes)
    packed, layout = _packed(library, (sizes, sizes[::-1]) * num_experts, mixture.block_size, random)
    weights = {"gate": random_matrix(random, sizes[0], num_experts), **packed}
    attributes = {**mixture.attributes(), "hidden": sizes[1], "layout": layout}
    return packed_layer_model(operator, ["y"], {"x": np.float32}, weights, attributes)


def _products(library, operator, sizes, random):
    """Return a product, or a feed-forward layer of two products, or three with a gate."""
    kind, bias = one_of((*ACTIVATIONS,), random), random.random() < 0.5
    is_layer, is_gated, block_size = operator.endswith("FeedForward"), "Gated" in operator, 0
    fed = {"q": np.uint8, "row_scale": np.float32} if operator == "Int8MatMul" else {"x": np.float32}
    attributes = {} if operator == "Int8MatMul" else {"activation": kind}
    if operator.startswith("Int4"):
        block_size = one_of((16, 32, 64, 128), random)
        attributes |= {"block_size": block_size, "in": sizes[0]}
    if is_layer:
        attributes["bias"] = int(bias)
    shapes = {"w1": sizes, "w2": sizes[::-1]} if is_layer else {"weight": sizes}
    shapes = {"gate": sizes, **shapes} if is_gated else shapes
    if random.random() < _PACKED_SHARE:
        packed, layout = _packed(library, shapes.values(), block_size, random)
        attributes |= {"in": sizes[0], "hidden" if is_layer else "out": sizes[1], "layout": layout}
        return packed_layer_model(operator, ["y"], fed, packed, attributes)
    weights, made = {}, conversion("int4" if block_size else "int8", block_size)
    for name, shape in shapes.items():
        weights |= zip(made.names(name, bias=False), made.parts(random_matrix(random, *shape)), strict=True)
        if bias and name != "gate":
            weights[f"{name}_bias"] = random.standard_normal(shape[1]).astype(np.float32)
    if block_size:
        return packed_layer_model(operator, ["y"], fed, weights, attributes)
    if is_layer:
        return layer_model(made.feed_forward(*sizes, kind, bias=bias, gated=is_gated), fed, weights, attributes)
    linear = made.linear(*sizes, bias=bias, after=kind)
    product = linear if operator == "Int8Linear" else INT8.product_of_rows(bias=bias)
    return layer_model(product, fed, weights, attributes)


def _packed(library, shapes, block_size, random):
    """Return weights, scales and biases of the size of the library's layout, and its version. They are random bytes; as
    floats, some are NaN, infinite or near 0."""
    kernels, text = ctypes.CDLL(str(library)), ctypes.create_string_buffer(4096)
    kernels.u2moe_kernels_describe(text, ctypes.c_size_t(len(text)))
    pack = kernels[f"u2moe_kernels_pack_int{4 if block_size else 8}"]
    pack.restype, nothing, blocks = ctypes.c_size_t, [None] * (4 if block_size else 3), [block_size] * (block_size > 0)
    size = sum(pack(*nothing, *map(ctypes.c_size_t, (*shape, *blocks)), None) for shape in shapes)
    content = random.standard_normal(-(-size // 4)).astype(np.float32).view(np.uint8)[:size].copy()
    if random.random() < 0.5:
        content = np.frombuffer(random.bytes(size), np.uint8)
    return {"packed": content}, json.loads(text.value)["layout"]
