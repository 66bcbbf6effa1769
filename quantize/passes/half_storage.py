"""Weights as float16 in files, with which sessions compute in float32: onnxruntime converts them when it loads a graph.

These are scales and biases of layers in 4 bits, and what a layer that is kept from quantization would have quantized.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from u2moe.quantize.names import layer_of
from u2moe.quantize.recipes import FORMATS, HALF, Recipe
from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.graph.file import array_of, group_of, shape_of

_LARGEST = float(np.finfo(np.float16).max)


def store_halves(model: ir.Model, recipe: Recipe) -> None:
    """Put a Cast behind each of these weights."""
    for node in [node for node in model.graph if node.domain == MOE_DOMAIN]:
        is_kept, is_int4 = recipe.exceptions.get(layer_of(node)) == HALF, node.op_type.startswith("Int4")
        for value in node.inputs:
            if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
                continue
            if (is_kept and group_of(value) in FORMATS) or (is_int4 and len(shape_of(value)) == 1):
                half = _converted(value, f"{value.name}.half", ir.DataType.FLOAT16)
                cast = ir.node("Cast", [half], {"to": ir.DataType.FLOAT}, name=f"{value.name}/Cast")
                del model.graph.initializers[str(value.name)]
                cast.outputs[0].name = value.name
                value.replace_all_uses_with(cast.outputs[0])
                model.graph.register_initializer(half)
                model.graph.insert_before(node, cast)


def in_single(model: ir.Model) -> ir.Model:
    """A graph that has been read, which is changed, with these weights in float32 again."""
    for node in list(model.graph):
        half = node.inputs[0] if node.op_type == "Cast" else None
        if half is not None and half.const_value is not None and half.const_value.dtype == ir.DataType.FLOAT16:
            value = _converted(half, str(node.outputs[0].name), ir.DataType.FLOAT)
            node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(node, safe=True)
            model.graph.register_initializer(value)
    return model


def _converted(value: ir.Value, name: str, dtype: ir.DataType) -> ir.Value:
    """An initializer that is read and converted when the graph is saved."""

    def load() -> ir.TensorProtocol:
        return ir.tensor(np.clip(array_of(value), -_LARGEST, _LARGEST).astype(dtype.numpy()), name=name)

    shape = ir.Shape(shape_of(value))
    tensor = ir.LazyTensor(load, dtype, shape, name=name)
    made = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
    made.metadata_props.update(value.metadata_props)
    return made
