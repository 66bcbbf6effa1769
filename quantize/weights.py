"""Quantized weights of a graph, computed lazily, one at a time, when the graph is saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.quantize.formats.conversion import Parts, WeightConversion
from u2moe.runtime.bundle import contract
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.file import array_of, group_of, shape_of

Array = npt.NDArray[Any]
_EXPERT_NUMBER = re.compile(r"experts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One weight that was replaced.

    Attributes:
        group: group of the weight, see `contract.WEIGHT_GROUPS`.
        original: reads the float32 weight, in the layout of the new one.
        parts: last names of the initializers that belong to the integers.
        restored: the float32 weights that stored integers and these parts represent.
    """

    group: str
    original: Callable[[], Array]
    parts: Sequence[str]
    restored: Callable[..., Array]


class Weights:
    """The weights that replace those of one graph.

    Attributes:
        changes: the replaced weights, by the name of the new one.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.changes: dict[str, Change] = {}

    def add(
        self, name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], Array], group: str
    ) -> ir.Value:
        """A new initializer, or the existing one of that name."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]

        def load() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(read()), name=name)

        tensor = ir.LazyTensor(load, dtype, ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
        if group in contract.WEIGHT_GROUPS:
            value.metadata_props[contract.GROUP_METADATA] = group
        self.graph.register_initializer(value)
        return value

    def converted(
        self,
        weight: ir.Value,
        conversion: WeightConversion,
        *,
        read: Callable[[], Array] | None = None,
        made: Parts | None = None,
    ) -> list[ir.Value]:
        """A weight [in, out] in another format: its integers, and what belongs to them.

        Args:
            weight: the initializer.
            conversion: to the format.
            read: supplies it if it has another order or shape.
            made: its parts, if calibrated.
        """
        source, shape = read or (lambda: array_of(weight)), read().shape if read else shape_of(weight)
        if len(shape) != 2:
            raise BundleError(f"weight {weight.name}: has shape {shape}, expected [in, out]")
        name, group, names = weight.name, group_of(weight), (conversion.form.name, *conversion.others)
        self.changes[f"{name}.{names[0]}"] = Change(
            group=group,
            original=source,
            parts=names[1:],
            restored=lambda *parts: conversion.restored(parts, shape[0]),
        )
        readers = _readers(lambda: made or conversion.parts(source()), len(names))
        parts = zip(names, conversion.stored(*shape), readers, strict=True)
        return [self.add(f"{name}.{part}", dtype, sizes, reader, group) for part, (dtype, sizes), reader in parts]

    def stacked(
        self, values: Sequence[ir.Value], read: Callable[[Array], Array] = np.asarray, suffix: str = ""
    ) -> ir.Value:
        """One initializer that `read` makes from the weights of all experts, named without the expert's number."""
        first = read(array_of(values[0]))
        name = _EXPERT_NUMBER.sub("experts.", values[0].name or "", count=1) + suffix
        dtype, shape = ir.DataType.from_numpy(first.dtype), (len(values), *first.shape)
        return self.add(
            name, dtype, shape, lambda: np.stack([read(array_of(value)) for value in values]), group_of(values[0])
        )


def _readers(quantize: Callable[[], Sequence[Array]], count: int) -> list[Callable[[], Array]]:
    """Functions that return the integers and the other parts; called in this order, they quantize the weight once.

    The other parts, which are small, are kept until they are read.
    """
    waiting: dict[int, Array] = {}

    def read(index: int) -> Array:
        if index not in waiting:
            waiting.update(enumerate(quantize()))
        return waiting.pop(index)

    return [lambda index=index: read(index) for index in range(count)]  # type: ignore[misc]
