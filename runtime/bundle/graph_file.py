"""Check a graph file and its external weight files before onnxruntime opens them.

onnxruntime maps weight files into memory. Its kernels copy matrices into their own layout, but read vectors and
embeddings from the mapping as long as the session exists. Therefore, this module reads these weights and passes them to
the session. No file stays mapped after a session is created, so later changes to the files are harmless.
"""

import contextlib
import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.files import BundleFiles
from u2moe.runtime.bundle.manifest import ExternalTensor
from u2moe.runtime.errors import BundleError

_GRAPH_LIMIT = (1 << 31) - 1  # Bytes of the largest protobuf message. Larger weights are in a file of their own
_SMALL = 1 << 16  # Bytes of weights that are always passed to the session: a second copy costs little memory
_MATRIX = re.compile(r"\.weight(\.u?int\d+)?$")
"""Matches the names of matrices, quantized or not. Names of associated weights, such as scales, are longer."""
_READ_IN_PLACE = ("embeddings", "routers")  # Weight groups whose matrices are also read in place
_INTEGERS = (f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_TYPES = ("float16", "float32", "float64", "bool", *_INTEGERS)  # Element types of weights that numpy supports


class GraphFile:
    """A verified graph with its `content`. Raises BundleError if the manifest differs; see `BundleFiles.read`."""

    def __init__(self, path: Path, tensors: Sequence[ExternalTensor], files: BundleFiles) -> None:
        self.path = path
        self.has_external = bool(tensors)  # onnxruntime finds the other files by the path of the graph
        self._tensors = tensors
        self._files = files
        self.content = files.read(path.name, _GRAPH_LIMIT)
        _check_locations(path, self.content, [tensor.file for tensor in tensors])
        self._data = sorted({tensor.file for tensor in tensors})
        sizes = {name: files.look_at(name) for name in self._data}
        for name in self._data:
            files.verify(name)
        for tensor in tensors:
            if tensor.offset + tensor.length > sizes[tensor.file]:
                what = f"{tensor.length} bytes at offset {tensor.offset} exceed the file size {sizes[tensor.file]}"
                raise BundleError(f"{path}: weight {tensor.name!r:.200}: {what}")

    def weights(self, is_native: Callable[[str], bool]) -> dict[str, npt.NDArray[Any]]:
        """Read the weights to pass to a session, and return them by name. The arrays must live as long as the session.

        Weights that only native operators read are left out, because the operators copy or map them. `is_native` tells
        whether a native operator replaces a function.
        """
        found = {}
        with contextlib.ExitStack() as opened:
            streams = {name: opened.enter_context(self._files.opened(name)) for name in self._data}
            for tensor in self._tensors:
                # Kernels copy only large weights of matrix products.
                is_factor = len(tensor.shape) > 1 and _MATRIX.search(tensor.name) is not None
                is_copied = is_factor and tensor.length > _SMALL and tensor.group not in _READ_IN_PLACE
                only_native = tensor.read_by and all(map(is_native, tensor.read_by))
                if tensor.type in _TYPES and not is_copied and not only_native:
                    expected = np.dtype(tensor.type).itemsize * math.prod(tensor.shape)
                    if tensor.length != expected:
                        where = f"{self.path}: weight {tensor.name!r:.200}"
                        raise BundleError(f"{where}: length is {tensor.length} bytes, expected {expected}")
                    found[tensor.name] = np.empty(tensor.shape, tensor.type)
                    streams[tensor.file].seek(tensor.offset)
                    streams[tensor.file].readinto(found[tensor.name].reshape(-1).view(np.uint8).data)
        return found

    def check_unchanged(self) -> None:
        """Raise IntegrityError if a file changed between its verification and the creation of the session."""
        for name in (self.path.name, *self._data) if self.has_external else ():
            self._files.look_at(name)


def _check_locations(path: Path, content: bytes, files: Collection[str]) -> None:
    """Check that a graph has as many external tensors as the manifest lists, each in one of `files`.

    An external tensor names its file in a protobuf entry with the key "location". The entry consists of the field's tag
    and length, the key, and the value. Names in our graphs do not contain the word "location".
    """
    names = {name.encode("utf-8", "surrogatepass") for name in files}
    allowed = [b"j%c\n\x08location\x12%c%s" % (12 + len(name), len(name), name) for name in names if len(name) < 116]
    count = content.count(b"location")
    if count != len(files) or count != sum(content.count(entry) for entry in allowed):
        raise BundleError(f"{path}: its external weights differ from those that the manifest lists")
