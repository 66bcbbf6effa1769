"""Weights as float16 in files, with which sessions compute in float32: onnxruntime converts them when it loads a graph.

These are scales and biases of layers in 4 bits, and what a layer that is kept from quantization would have quantized.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx_ir as ir

from u2moe.quantize.calls import layer_of
from u2moe.quantize.passes.half_precision import half_of
from u2moe.quantize.recipes import FORMATS, Recipe
from u2moe.quantize.weights import Weights
from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle.weight_formats import HALF, format_of
from u2moe.runtime.graph.file import array_of, group_of, shape_of


def store_halves(model: ir.Model, weights: Weights, recipe: Recipe) -> None:
    """Put a Cast behind each of these weights."""
    for node in [node for node in model.graph if node.domain == MOE_DOMAIN]:
        is_kept = recipe.exceptions.get(layer_of(node)) == HALF.name
        kind = format_of(plain_name(node.op_type))
        for value in node.inputs:
            if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
                continue
            shape, group, name = shape_of(value), group_of(value), str(value.name)
            if (is_kept and group in FORMATS) or (kind is not None and kind.halves and len(shape) == 1):
                half = weights.add(f"{name}.half", ir.DataType.FLOAT16, shape, partial(half_of, value), group)
                cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
                del model.graph.initializers[name]
                cast.outputs[0].name = name
                value.replace_all_uses_with(cast.outputs[0])
                model.graph.insert_before(node, cast)


def stored_value(value: ir.Value) -> ir.Value:
    """The initializer in halves that a Cast makes this value of; of others, the value itself."""
    maker = value.producer()
    half = maker.inputs[0] if maker is not None and maker.op_type == "Cast" else None
    is_half = half is not None and half.const_value is not None and half.const_value.dtype == ir.DataType.FLOAT16
    return half if half is not None and is_half else value


def read_single(file: Path) -> ir.Model:
    """Read a graph with these weights in float32 again."""
    model = ir.load(file)
    weights = Weights(model)
    for node in list(model.graph):
        half = stored_value(node.outputs[0])
        if half is not node.outputs[0]:
            name, read = str(node.outputs[0].name), partial(array_of, half)
            value = weights.add(name, ir.DataType.FLOAT, shape_of(half), read, group_of(half))
            node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(node, safe=True)
    return model
