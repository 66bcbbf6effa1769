"""A graph file and the files that hold weights of it: what must be true of them before onnxruntime opens them.

onnxruntime maps files of weights into memory. Its kernels keep copies of matrices in a layout of their own; vectors and
embeddings it reads where they are mapped, for as long as there is a session. These are therefore read here and handed
over, so that nothing of a file is mapped any more once a session is made, whatever becomes of the file.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.runtime.bundle_files import BundleFile, plain_name
from u2moe.runtime.contract import weight_group
from u2moe.runtime.errors import BundleError
from u2moe.runtime.external_tensors import ExternalTensor, external_tensors

if TYPE_CHECKING:
    from u2moe.runtime.manifest import FileDigest

_GRAPH_LIMIT = (1 << 31) - 1
"""Bytes of a protobuf message; a graph with larger weights has them beside it."""
_SMALL = 1 << 16
"""Bytes of a weight that is handed over whatever it is: twice in memory it takes little."""
_MATRIX = re.compile(r"\.weight(\.u?int\d+)?$")
"""Names of matrices, quantized or not; what belongs to one, such as its scales, has a longer name."""
_READ_IN_PLACE = ("embeddings", "routers")
"""Groups of weights whose matrices are read in place too."""
_NUMPY_TYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip
"""Of `onnx.TensorProto.DataType`, those that numpy has."""


class GraphFile:
    """The files of one graph, open and compared with their digests; close it when the session is made.

    Attributes:
        path: the graph.
        weights: those to hand over to onnxruntime, by name. Who makes a session of them keeps them as long as it.

    Args:
        path: the graph.
        digests: size and sha256 that files of its folder must have, by name; None: they are not compared.

    Raises:
        BundleError: a file that is missing, unreadable, not listed in `digests`, outside the folder, or no graph.
        IntegrityError: a file that differs from its digest.
    """

    def __init__(self, path: Path, digests: Mapping[str, FileDigest] | None = None) -> None:
        self.path = path
        self.weights: dict[str, npt.NDArray[Any]] = {}
        self._digests = digests
        self._files: list[BundleFile] = []
        with contextlib.ExitStack() as stack:
            self._stack = stack
            content = self._open(path.name).read(_GRAPH_LIMIT)
            tensors = external_tensors(path, content)
            del content
            for location in _locations(path, tensors, digests):
                self._read_weights(location, [tensor for tensor in tensors if tensor.location == location])
            self._stack = stack.pop_all()

    def hand_over(self, options: onnxruntime.SessionOptions) -> None:
        """Have a session with these options use `weights` instead of the files."""
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self.weights.values()]
        options.add_external_initializers(list(self.weights), values)

    def check_unchanged(self) -> None:
        """Refuse what was replaced or written to since it was read: a session may be made of something else.

        Raises:
            IntegrityError: it was.
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

    def _read_weights(self, location: str, tensors: list[ExternalTensor]) -> None:
        """Read a file of weights from its begin to its end, and keep those to hand over."""
        file = self._open(location)
        kept = []
        for tensor in tensors:
            place = _place(file, tensor)
            if tensor.is_initializer and _is_read_in_place(tensor, place):
                array = np.empty(tensor.shape, place.kind)
                self.weights[tensor.name] = array
                kept.append((place, array.reshape(-1).view(np.uint8).data))
        kept.sort(key=lambda item: item[0].begin)
        first, position = 0, 0
        for portion in file.portions() if self._digests is not None or kept else ():
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
    """Read a graph file, and refuse it if weights of it lie outside its folder or in a file that is not listed.

    Args:
        file: the graph.
        digests: size and sha256 of the files that are listed, by name.

    Raises:
        BundleError: they do, or this is no graph.
        IntegrityError: the graph differs from its digest.
    """
    _locations(file.path, external_tensors(file.path, file.read(_GRAPH_LIMIT)), digests)


def _locations(path: Path, tensors: list[ExternalTensor], digests: Mapping[str, FileDigest] | None) -> list[str]:
    """Names of the files that hold weights of a graph, which must be in its folder, and among `digests`."""
    locations = sorted({tensor.location for tensor in tensors})
    for location in locations:
        name = plain_name(location, f"{path}: external data")
        if digests is not None and name not in digests:
            raise BundleError(f"{path}: weights lie in {name!r:.200}, which the manifest does not list")
    return locations


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Bytes of a file, and the element type that they have for numpy; None: it has none."""

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


def _is_read_in_place(tensor: ExternalTensor, place: _Place) -> bool:
    """Whether kernels may use a weight as it is: all but the matrices of products, which they copy."""
    if place.kind is None:
        return False
    is_factor = len(tensor.shape) > 1 and _MATRIX.search(tensor.name) is not None
    small = place.end - place.begin <= _SMALL
    return small or not is_factor or weight_group(tensor.name, tensor.metadata) in _READ_IN_PLACE
