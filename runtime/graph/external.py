"""Lists the weights beside the graphs of a bundle for its manifest, so that the runtime need not look for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.bundle.manifest import ExternalTensor, Manifest
from u2moe.runtime.graph.file import group_of


def with_external(manifest: Manifest, folder: Path) -> Manifest:
    """The manifest with the external weights of the graphs in `folder`, as `BundleWriter` needs it."""
    found = {file.name: external_of(ir.load(file)) for file in sorted(folder.glob("*.onnx"))}
    return dataclasses.replace(manifest, external={file: tensors for file, tensors in found.items() if tensors})


def external_of(model: ir.Model) -> tuple[ExternalTensor, ...]:
    """The weights in other files, of a graph that has been read from a file."""
    return tuple(
        ExternalTensor(
            name=name,
            file=str(tensor.location),
            offset=tensor.offset or 0,
            length=tensor.length or tensor.nbytes,
            type=tensor.dtype.numpy().name,
            shape=tuple(tensor.shape.numpy()),
            group=group_of(value),
            read_by=tuple(sorted({node.op_type if node.domain == MOE_DOMAIN else "" for node in value.consumers()})),
        )
        for name, value in model.graph.initializers.items()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    )
