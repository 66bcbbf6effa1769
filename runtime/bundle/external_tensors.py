"""Finds the weights of a graph that are in external files, and the functions that it calls.

Reads the protobuf itself, because the runtime has no onnx.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from u2moe.runtime.bundle import contract
from u2moe.runtime.errors import BundleError

# Field numbers of onnx.proto: messages that may hold tensors, by the field that leads to them.
_GRAPH, _NODE, _FUNCTION, _ATTRIBUTE, _TRAINING = "graph", "node", "function", "attribute", "training"
_TENSOR, _SPARSE = "tensor", "sparse"
_INSIDE = {
    "model": {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 13, 14
_VALUE_INFO, _VALUE_NAME, _METADATA = 13, 1, 4
_KEY, _VALUE = 1, 2
_INPUT, _OP_TYPE, _DOMAIN = 1, 4, 7
_EXTERNAL = 1
"""`onnx.TensorProto.EXTERNAL`."""
_DEEPEST = 100
"""Limit on nested messages, as in protobuf itself."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, kw_only=True)
class ExternalTensor:
    """The location of a weight whose values are not in the graph file.

    Attributes:
        name: name of the weight.
        location: path of the file, relative to the graph.
        offset: offset of its first byte.
        length: number of bytes; None: as required by shape and type.
        data_type: number of its element type in `onnx.TensorProto.DataType`.
        shape: shape of the weight.
        is_initializer: whether it belongs to the graph itself, not to a node, a function or a subgraph.
        metadata: its metadata in the graph, such as its group.
    """

    name: str
    location: str
    offset: int
    length: int | None
    data_type: int
    shape: tuple[int, ...]
    is_initializer: bool
    metadata: Mapping[str, str] = field(default_factory=dict)


def external_tensors(path: Path, content: bytes) -> list[ExternalTensor]:
    """All tensors of a graph file, at any depth, whose values are in other files.

    Args:
        path: path of the graph, for messages.
        content: content of the graph file.

    Raises:
        BundleError: not a graph, or it does not say where its weights are.
    """
    if b"location" not in content:  # a key of every such tensor, so there are none
        return []
    try:
        tensors = list(_tensors("model", memoryview(content), ()))
        external = [
            found for tensor, is_initializer in tensors if (found := _external(tensor, is_initializer)) is not None
        ]
        metadata = dict(_metadata(memoryview(content)))
        return [replace(tensor, metadata=metadata.get(tensor.name, {})) for tensor in external]
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: is not a graph: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Call:
    """A node of the main graph that calls a function of ours; `function` is "" for all other nodes."""

    function: str
    inputs: tuple[str, ...]


def calls(path: Path, content: bytes) -> list[Call]:
    """The nodes of the main graph, in order.

    Args:
        path: path of the graph, for messages.
        content: content of the graph file.

    Raises:
        BundleError: not a graph.
    """
    try:
        graphs = _inside(memoryview(content), _GRAPH, "model")
        return [_call(node) for graph in graphs for node in _inside(graph, _NODE, _GRAPH)]
    except ValueError as error:
        raise BundleError(f"{path}: is not a graph: {error}") from error


def _inside(message: memoryview, kind: str, outside: str) -> Iterator[memoryview]:
    """The messages of one kind directly in another."""
    for number, _, value in _fields(message):
        if _INSIDE[outside].get(number) == kind and isinstance(value, memoryview):
            yield value


def _call(node: memoryview) -> Call:
    texts: dict[int, list[str]] = {_INPUT: [], _OP_TYPE: [""], _DOMAIN: [""]}
    for number, _, value in _fields(node):
        if number in texts and isinstance(value, memoryview):
            texts[number].append(str(value, "utf-8"))
    is_ours = texts[_DOMAIN][-1] == contract.MOE_DOMAIN
    return Call(function=texts[_OP_TYPE][-1] if is_ours else "", inputs=tuple(texts[_INPUT]))


def _tensors(kind: str, message: memoryview, way: tuple[str, ...]) -> Iterator[tuple[memoryview, bool]]:
    """The tensors in a message, and whether they are initializers of the graph itself."""
    if kind == _TENSOR:
        yield message, way == ("model", _GRAPH)
        return
    if len(way) > _DEEPEST:
        raise ValueError(f"it has nested messages, more than {_DEEPEST} deep")
    inside = _INSIDE[kind]
    for number, wire_type, value in _fields(message):
        if number in inside and wire_type == _BYTES and isinstance(value, memoryview):
            yield from _tensors(inside[number], value, (*way, kind))


def _metadata(model: memoryview) -> Iterator[tuple[str, dict[str, str]]]:
    """Names and metadata of the values in the main graph."""
    graphs = [value for number, _, value in _fields(model) if _INSIDE["model"].get(number) == _GRAPH]
    for graph in graphs:
        for number, _, value in _fields(graph) if isinstance(graph, memoryview) else ():
            if number == _VALUE_INFO and isinstance(value, memoryview):
                yield _value_info(value)


def _value_info(message: memoryview) -> tuple[str, dict[str, str]]:
    name, entries = "", {}
    for number, _, value in _fields(message):
        if number == _VALUE_NAME and isinstance(value, memoryview):
            name = str(value, "utf-8")
        elif number == _METADATA and isinstance(value, memoryview):
            texts = {key: str(text, "utf-8") for key, _, text in _fields(value) if isinstance(text, memoryview)}
            entries[texts.get(_KEY, "")] = texts.get(_VALUE, "")
    return name, entries


def _external(tensor: memoryview, is_initializer: bool) -> ExternalTensor | None:
    """The location of a tensor's values; None: in the tensor itself."""
    name, data_type, data_location = "", 0, 0
    shape: list[int] = []
    entries: dict[str, str] = {}
    for number, _, value in _fields(tensor):
        if isinstance(value, int):
            if number == _DIMS:
                shape.append(value)
            elif number == _DATA_TYPE:
                data_type = value
            elif number == _DATA_LOCATION:
                data_location = value
        elif number == _DIMS:
            shape += _varints(value)
        elif number == _NAME:
            name = str(value, "utf-8")
        elif number == _EXTERNAL_DATA:
            texts = {key: str(text, "utf-8") for key, _, text in _fields(value) if isinstance(text, memoryview)}
            entries[texts.get(_KEY, "")] = texts.get(_VALUE, "")
    if data_location != _EXTERNAL:
        return None
    if "location" not in entries:
        raise ValueError(f"weight {name!r:.200} does not say which file it is in")
    return ExternalTensor(
        name=name,
        location=entries["location"],
        offset=int(entries.get("offset") or 0),
        length=int(entries["length"]) if entries.get("length") else None,
        data_type=data_type,
        shape=tuple(shape),
        is_initializer=is_initializer,
    )


def _fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Number, wire type and value of each field; numbers of fixed length are skipped."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield number, wire_type, value
        elif wire_type == _BYTES:
            length, position = _varint(message, position)
            if not 0 <= length <= len(message) - position:
                raise ValueError("it ends within a field")
            yield number, wire_type, message[position : position + length]
            position += length
        elif wire_type in (_FIXED64, _FIXED32):
            position += 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"it has a field of wire type {wire_type}")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A signed 64-bit number, and the position after it."""
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it ends within a number")
        byte = message[position]
        position += 1
        result |= (byte & 127) << shift
        if byte < 128:
            result &= (1 << 64) - 1
            return (result - (1 << 64) if result >> 63 else result), position
    raise ValueError("it has a number of more than 64 bits")


def _varints(message: memoryview) -> Iterator[int]:
    position = 0
    while position < len(message):
        value, position = _varint(message, position)
        yield value
