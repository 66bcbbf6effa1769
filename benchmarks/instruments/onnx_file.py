"""What is in an ONNX file: nodes, functions, weights with sizes; and small files of one operator. No more than that."""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.benchmarks.instruments.wire import Value, field, fields, integers, text
from u2moe.runtime import contract
from u2moe.runtime.errors import BundleError

_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
"""Bits of an element by ONNX's number of its type."""
_NUMPY_TYPES = {1: np.float32, 2: np.uint8, 3: np.int8, 6: np.int32, 7: np.int64, 10: np.float16}
_NUMBERS = {np.dtype(kind): number for number, kind in _NUMPY_TYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node: "" for what it lacks."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    attributes: dict[str, int | float | str] = dataclasses.field(default_factory=dict)
    """Numbers and strings; others are left out."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """An initializer; its values are read only when asked for."""

    name: str
    shape: tuple[int, ...]
    kind: int
    file: Path
    raw: memoryview | None
    external: dict[str, str]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def group(self) -> str:
        """See `contract.weight_group`."""
        return contract.weight_group(self.name, self.metadata)

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return -(-math.prod(self.shape) * _BITS.get(self.kind, 0) // 8)

    def array(self) -> npt.NDArray[Any]:
        """The values; of the kinds that a router has.

        Raises:
            BundleError: values of another type, or stored in a way that no graph of ours uses.
        """
        dtype = _NUMPY_TYPES.get(self.kind)
        if dtype is None or (self.raw is None and "location" not in self.external):
            raise BundleError(f"{self.file}: weight {self.name} has no values that can be read here")
        if self.raw is not None:
            return np.frombuffer(self.raw, dtype).reshape(self.shape).copy()
        offset, count = int(self.external.get("offset", 0)), math.prod(self.shape)
        path = self.file.parent / self.external["location"]
        return np.fromfile(path, dtype, count, offset=offset).reshape(self.shape)


class OnnxFile:
    """Nodes and weights of the main graph of a file, and its functions.

    Attributes:
        nodes: in the order of the file.
        weights: by name.
        functions: nodes of each, by domain and name.

    Raises:
        BundleError: a file that is none of ONNX.
    """

    def __init__(self, file: Path) -> None:
        self.nodes: list[Node] = []
        self.weights: dict[str, Weight] = {}
        self.functions: dict[tuple[str, str], list[Node]] = {}
        metadata: dict[str, dict[str, str]] = {}
        with file.open("rb") as stream:
            content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            for graph in _messages(content, 7):
                for number, value in fields(graph):
                    if number == 1 and isinstance(value, memoryview):
                        self.nodes.append(_node(value))
                    elif number == 5 and isinstance(value, memoryview):
                        weight = _weight(value, file)
                        self.weights[weight.name] = weight
                    elif number == 13 and isinstance(value, memoryview):
                        name, entries = _metadata(value)
                        metadata[name] = entries
            for name in self.weights.keys() & metadata.keys():
                self.weights[name].metadata.update(metadata[name])
            for function in _messages(content, 25):
                names = {number: text(value) for number, value in fields(function) if number in (1, 10)}
                self.functions[names.get(10, ""), names[1]] = [_node(node) for node in _messages(function, 7)]
        except (ValueError, KeyError) as error:
            raise BundleError(f"{file}: is no ONNX file: {error}") from error


def with_outputs(content: bytes, names: Sequence[str]) -> bytes:
    """An ONNX file whose graph has these values as further outputs.

    Protobuf joins messages that follow each other: what is added is a graph with nothing but outputs.
    """
    return content + field(7, b"".join(field(12, field(1, name)) for name in names))


def product_model(op_type: str, weights: Sequence[npt.NDArray[Any]]) -> bytes:
    """An ONNX file with inputs "x" [rows, in] and output "y" [rows, out]: the sum of the products of x and each weight.

    Args:
        op_type: "MatMul"; or "MatMulIntegerToFloat" with uint8 x, zero point 128, and one scale per column, as
            quantized bundles have it.
        weights: float32 or int8, all [in, out].
    """
    integer = op_type == "MatMulIntegerToFloat"
    names = [f"w{index}" for index in range(len(weights))]
    initializers = [_tensor(name, weight) for name, weight in zip(names, weights, strict=True)]
    extra: list[str] = []
    if integer:
        extra = ["step", "scale", "middle"]
        constants = (np.float32(1 / 127), np.full(weights[0].shape[1], 1e-4, np.float32), np.uint8(128))
        initializers += [_tensor(name, np.asarray(value)) for name, value in zip(extra, constants, strict=True)]
    domain = "com.microsoft" if integer else ""
    nodes = [_node_message(op_type, ["x", name, *extra], f"y{name}", domain) for name in names]
    nodes.append(_node_message("Sum", [f"y{name}" for name in names], "y"))
    x_kind = _NUMBERS[np.dtype(np.uint8 if integer else np.float32)]
    graph = [field(1, node) for node in nodes] + [field(2, "product")]
    graph += [field(5, tensor) for tensor in initializers]
    graph += [
        field(11, _value_info("x", x_kind, ("rows", weights[0].shape[0]))),
        field(12, _value_info("y", 1, ("rows", weights[0].shape[1]))),
    ]
    opsets = [field(8, field(1, name) + field(2, version)) for name, version in (("", 18), ("com.microsoft", 1))]
    return field(1, 8) + field(7, b"".join(graph)) + b"".join(opsets)


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in fields(message) if number == wanted and isinstance(value, memoryview))


def _node(message: memoryview) -> Node:
    parts: dict[int, list[Value]] = {}
    for number, value in fields(message):
        parts.setdefault(number, []).append(value)
    one = {number: text(values[-1]) for number, values in parts.items() if number in (3, 4, 7)}
    return Node(
        name=one.get(3, ""),
        op_type=one.get(4, ""),
        domain=one.get(7, ""),
        inputs=tuple(text(value) for value in parts.get(1, [])),
        attributes=dict(
            pair for value in parts.get(5, []) if isinstance(value, memoryview) for pair in _attribute(value)
        ),
    )


def _attribute(message: Value) -> Iterator[tuple[str, int | float | str]]:
    """Name and value of an attribute, if it is a number or a string; protobuf leaves out what is 0 or empty."""
    found = dict(fields(message)) if isinstance(message, memoryview) else {}
    number, content = found.get(3, 0), found.get(2)
    if found.get(20) == 1:
        yield text(found[1]), struct.unpack("<f", content)[0] if isinstance(content, memoryview) else 0.0
    elif found.get(20) == 2 and isinstance(number, int):
        yield text(found[1]), number - (1 << 64) * (number >> 63)  # two's complement of 64 bits
    elif found.get(20) == 3:
        yield text(found[1]), text(found[4]) if 4 in found else ""


def _metadata(message: memoryview) -> tuple[str, dict[str, str]]:
    """Name and metadata of a value."""
    name, entries = "", {}
    for number, value in fields(message):
        if number == 1:
            name = text(value)
        elif number == 4 and isinstance(value, memoryview):
            entry = dict(fields(value))
            entries[text(entry[1])] = text(entry[2])
    return name, entries


def _weight(message: memoryview, file: Path) -> Weight:
    shape: list[int] = []
    name, kind, raw, external = "", 0, None, {}
    for number, value in fields(message):
        if number == 1:
            shape += integers(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = text(value)
        elif number == 9 and isinstance(value, memoryview):
            raw = value
        elif number == 13 and isinstance(value, memoryview):
            entry = dict(fields(value))
            external[text(entry[1])] = text(entry[2])
    return Weight(name=name, shape=tuple(shape), kind=kind, file=file, raw=raw, external=external)


def _tensor(name: str, array: npt.NDArray[Any]) -> bytes:
    dims = b"".join(field(1, size) for size in array.shape)
    return dims + field(2, _NUMBERS[array.dtype]) + field(8, name) + field(9, array.tobytes())


def _node_message(op_type: str, inputs: Sequence[str], output: str, domain: str = "") -> bytes:
    names = b"".join(field(1, name) for name in inputs)
    return names + field(2, output) + field(3, output) + field(4, op_type) + field(7, domain)


def _value_info(name: str, kind: int, shape: Sequence[str | int]) -> bytes:
    dims = b"".join(field(1, field(2 if isinstance(size, str) else 1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, kind) + field(2, dims)))
