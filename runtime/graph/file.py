"""Reading weights of graphs, and saving graphs with their weights inside or beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.runtime import contract
from u2moe.runtime.errors import BundleError

EXTERNAL_DATA_LIMIT = 16_000_000
"""Bytes of weights from which they are saved beside the graph: onnxruntime maps that file and packs weight after weight
for its kernels, where it would read a graph with weights in it as a whole, and hold it beside what it packs from it."""


def save_graph(
    model: ir.Model, file: Path, *, limit: int | None = None, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Write a graph weight by weight.

    Args:
        model: the graph.
        file: to write; weights of more than `limit` bytes go into a file of the same name with ".data" behind it.
        limit: None: `EXTERNAL_DATA_LIMIT`.
        progress: called with a line for every hundredth weight that goes beside the graph.
    """

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if info.index % 100 == 0:
            progress(f"{file.name}: weight {info.index + 1} of {info.total}: {tensor.name}")

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{file.name}.data" if size > (EXTERNAL_DATA_LIMIT if limit is None else limit) else None
    if external is None:
        ir.external_data.load_to_model(model)  # weights of a graph that was read may lie beside that one
    ir.save(model, file, external_data=external, callback=report)


def group_of(value: ir.Value) -> str:
    """The group of an initializer; see `contract.weight_group`."""
    return contract.weight_group(value.name or "", value.metadata_props)


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Of an initializer."""
    return tuple(_tensor(value).shape.numpy())


def array_of(value: ir.Value) -> npt.NDArray[Any]:
    """The float32 values of an initializer; nothing of a mapped file stays in memory."""
    tensor = _tensor(value)
    if isinstance(tensor, ir.ExternalTensor):
        array = np.array(tensor.numpy(), np.float32)
        tensor.release()
        return array
    return np.asarray(tensor.numpy(), np.float32)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise BundleError(f"weight {value.name}: has no value")
    return value.const_value
