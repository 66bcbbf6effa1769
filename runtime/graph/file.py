"""Read the weights of graphs, save graphs with internal or external weights, and list external weights."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import ExternalTensor, Manifest
from u2moe.runtime.errors import BundleError

EXTERNAL_DATA_LIMIT = 16_000_000
"""If the weights of a graph exceed this number of bytes, they are saved in a separate file. onnxruntime maps that file
and packs the weights one at a time. It reads a graph with internal weights as a whole, and keeps that graph in memory
alongside the packed weights."""


def save_graph(
    model: ir.Model, file: Path, *, limit: int | None = None, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Write a graph. Weights above `limit` bytes (None: `EXTERNAL_DATA_LIMIT`) go into `file` with ".data" appended."""

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        if info.index % 100 == 0:
            progress(f"{file.name}: weight {info.index + 1} of {info.total}: {tensor.name}")

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{file.name}.data" if size > (EXTERNAL_DATA_LIMIT if limit is None else limit) else None
    if external is None:
        ir.external_data.load_to_model(model)  # a graph that was read may have external weights
    ir.save(model, file, external_data=external, callback=report)


def group_of(value: ir.Value) -> str:
    """Return the weight group of an initializer, one of `contract.WEIGHT_GROUPS`, or "other" for constants."""
    return value.metadata_props.get(contract.GROUP_METADATA, "other")


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of an initializer."""
    return tuple(_tensor(value).shape.numpy())


def array_of(value: ir.Value) -> npt.NDArray[Any]:
    """Return the values of an initializer as float32. If they are in a memory-mapped file, unmap it."""
    tensor = _tensor(value)
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy(), np.float32)
    array = np.array(tensor.numpy(), np.float32)
    tensor.release()
    return array


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise BundleError(f"weight {value.name}: has no value")
    return value.const_value


def with_external(manifest: Manifest, folder: Path) -> Manifest:
    """Return the manifest with `external` set to the external weights of the graphs in `folder`, for `BundleWriter`."""
    found = {file.name: external_of(ir.load(file)) for file in sorted(folder.glob("*.onnx"))}
    return dataclasses.replace(manifest, external={file: tensors for file, tensors in found.items() if tensors})


def external_of(model: ir.Model) -> tuple[ExternalTensor, ...]:
    """List the external weights of a graph that was read from a file."""
    found = []
    for name, value in model.graph.initializers.items():
        if isinstance(tensor := value.const_value, ir.ExternalTensor):
            readers = {node.op_type if node.domain == contract.MOE_DOMAIN else "" for node in value.consumers()}
            found.append(
                ExternalTensor(
                    name=name,
                    file=str(tensor.location),
                    offset=tensor.offset or 0,
                    length=tensor.length or tensor.nbytes,
                    type=tensor.dtype.numpy().name,
                    shape=tuple(tensor.shape.numpy()),
                    group=group_of(value),
                    read_by=tuple(sorted(readers)),
                )
            )
    return tuple(found)
