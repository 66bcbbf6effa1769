"""A graph file and its external weight files, checked before onnxruntime opens them.

onnxruntime maps weight files into memory. Its kernels copy matrices into their own layout, but vectors and embeddings
are read from the mapping as long as the session exists. These are therefore read here and handed over, so that no file
remains mapped once a session has been created, whatever happens to the file.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.runtime.bundle.contract import GROUP_METADATA, is_replaced
from u2moe.runtime.bundle.external_tensors import Call, ExternalTensor, calls, external_tensors
from u2moe.runtime.bundle.files import BundleFile, plain_name
from u2moe.runtime.errors import BundleError

if TYPE_CHECKING:
    from u2moe.runtime.bundle.manifest import FileDigest

_GRAPH_LIMIT = (1 << 31) - 1
"""Largest protobuf message in bytes; a graph with larger weights has them in a separate file."""
_SMALL = 1 << 16
"""Weights up to this many bytes are always handed over: a second copy in memory costs little."""
_MATRIX = re.compile(r"\.weight(\.u?int\d+)?$")
"""Names of matrices, quantized or not; associated weights, such as scales, have longer names."""
_READ_IN_PLACE = ("embeddings", "routers")
"""Groups of weights whose matrices are also read in place."""
_NUMPY_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip
"""The numpy types of `onnx.TensorProto.DataType`."""


class GraphFile:
    """The files of one graph, open and compared with their digests; close it when the session has been created.

    Attributes:
        path: the graph.
        weights: weights to hand over to onnxruntime, by name; they must live as long as the session.
        functions: names of the functions of ours that the graph calls; unknown, and empty, without `operators`.

    Args:
        path: the graph.
        digests: expected size and sha256 of the files in its folder, by name; None: do not compare.
        operators: native operators; they copy all their weights, which are therefore not handed over.

    Raises:
        BundleError: a file is missing, unreadable, not listed in `digests`, outside the folder, or not a graph.
        IntegrityError: a file differs from its digest.
    """

    def __init__(
        self,
        path: Path,
        digests: Mapping[str, FileDigest] | None = None,
        operators: Collection[str] = (),
    ) -> None:
        self.path = path
        self.weights: dict[str, npt.NDArray[Any]] = {}
        self._digests = digests
        self._files: list[BundleFile] = []
        with contextlib.ExitStack() as stack:
            self._stack = stack
            content = self._open(path.name).read(_GRAPH_LIMIT)
            tensors = external_tensors(path, content)
            nodes = calls(path, content) if operators else []
            del content
            self.functions = {node.function for node in nodes} - {""}
            copied = _read_by_none_but(operators, nodes)
            self._copied = [tensor for tensor in tensors if tensor.name in copied]
            for location in _locations(path, tensors, digests):
                self._read_weights(location, [tensor for tensor in tensors if tensor.location == location], copied)
            self._stack = stack.pop_all()

    def hand_over(self, options: onnxruntime.SessionOptions) -> None:
        """Make sessions with these options use `weights` instead of the files."""
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self.weights.values()]
        options.add_external_initializers(list(self.weights), values)

    def keep_for_onnxruntime(self) -> None:
        """Read what was left to native operators, too, because onnxruntime runs the functions instead."""
        for location in sorted({tensor.location for tensor in self._copied}):
            self._read_weights(location, [tensor for tensor in self._copied if tensor.location == location])
        self._copied = []

    def check_unchanged(self) -> None:
        """Check that no file was replaced or modified since it was read: the session might have read something else.

        Raises:
            IntegrityError: a file was replaced or modified.
        """
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def _open(self, name: str) -> BundleFile:
        digest = None if self._digests is None else self._digests.get(name)
        file = self._stack.enter_context(BundleFile(self.path.parent, name, digest))
        self._files.append(file)
        return file

    def _read_weights(self, location: str, tensors: list[ExternalTensor], without: Collection[str] = ()) -> None:
        """Keep the weights to hand over; to compare a file with its digest, it is read from start to end."""
        file = self._open(location)
        kept = []
        for tensor in tensors:
            place = _place(file, tensor)
            if tensor.is_initializer and tensor.name not in without and _is_read_in_place(tensor, place):
                array = np.empty(tensor.shape, place.kind)
                self.weights[tensor.name] = array
                kept.append((place, array.reshape(-1).view(np.uint8).data))
        kept.sort(key=lambda item: item[0].begin)
        if self._digests is None:
            for place, target in kept:
                file.read_into(target, place.begin)
            return
        first, position = 0, 0
        for portion in file.portions():
            end = position + len(portion)
            while first < len(kept) and kept[first][0].end <= position:
                first += 1
            for place, target in kept[first:]:
                if place.begin >= end:
                    break
                start, stop = max(place.begin, position), min(place.end, end)
                target[start - place.begin : stop - place.begin] = portion[start - position : stop - position]
            position = end


def check_locations(file: BundleFile, digests: Mapping[str, FileDigest]) -> None:
    """Read a graph file, and check that its weights are inside its folder and in listed files.

    Args:
        file: the graph.
        digests: size and sha256 of the listed files, by name.

    Raises:
        BundleError: they are not, or this is not a graph.
        IntegrityError: the graph differs from its digest.
    """
    _locations(file.path, external_tensors(file.path, file.read(_GRAPH_LIMIT)), digests)


def _locations(path: Path, tensors: list[ExternalTensor], digests: Mapping[str, FileDigest] | None) -> list[str]:
    """Names of a graph's weight files, which must be in its folder and in `digests`."""
    locations = sorted({tensor.location for tensor in tensors})
    for location in locations:
        name = plain_name(location, f"{path}: external data")
        if digests is not None and name not in digests:
            raise BundleError(f"{path}: weights are in {name!r:.200}, which the manifest does not list")
    return locations


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A range of bytes in a file, and its numpy element type; None: numpy has no such type."""

    begin: int
    end: int
    kind: str | None


def _place(file: BundleFile, tensor: ExternalTensor) -> _Place:
    where = f"{file.path}: weight {tensor.name!r:.200}"
    kind = _NUMPY_TYPES.get(tensor.data_type)
    length = tensor.length
    if kind is not None:
        expected = np.dtype(kind).itemsize * math.prod(tensor.shape)
        if min(tensor.shape, default=0) < 0 or length not in (None, expected):
            raise BundleError(f"{where}: length is {length} bytes, expected {expected} for shape {tensor.shape}")
        length = expected
    if length is None or length < 0 or not 0 <= tensor.offset <= file.size - length:
        raise BundleError(f"{where}: found {length} bytes at offset {tensor.offset}, expected them within {file.size}")
    return _Place(begin=tensor.offset, end=tensor.offset + length, kind=kind)


def _read_by_none_but(operators: Collection[str], nodes: Sequence[Call]) -> set[str]:
    """Names of the inputs that only calls of functions read that these native operators replace."""
    native = [node for node in nodes if is_replaced(node.function, operators)]
    others = {name for node in nodes if not is_replaced(node.function, operators) for name in node.inputs}
    return {name for node in native for name in node.inputs} - others


def _is_read_in_place(tensor: ExternalTensor, place: _Place) -> bool:
    """Whether kernels may use a weight in place: all except the matrices of products, which they copy."""
    if place.kind is None:
        return False
    is_factor = len(tensor.shape) > 1 and _MATRIX.search(tensor.name) is not None
    small = place.end - place.begin <= _SMALL
    return small or not is_factor or tensor.metadata.get(GROUP_METADATA) in _READ_IN_PLACE
