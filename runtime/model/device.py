"""Values that stay in device memory from one graph to the next, and are sliced and joined there."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.runtime.errors import ProviderError
from u2moe.runtime.model.calls import NATIVE_CALLS
from u2moe.runtime.model.native import CPU, ONNXRUNTIME_ERRORS

_CUDA = "CUDAExecutionProvider"
_MEMORIES = {
    _CUDA: ("cuda", _CUDA),
    "TensorrtExecutionProvider": ("cuda", _CUDA),
    "NvTensorRTRTXExecutionProvider": ("cuda", _CUDA),
    "DmlExecutionProvider": ("dml", "DmlExecutionProvider"),
}
"""For each provider with device memory: the memory's name in onnxruntime, and the provider that slices and joins values
there. All other providers take values in CPU memory."""
_FAN_IN = 8  # Maximum number of values that one call joins

Index = int | slice | None


class DeviceArray:
    """An immutable float32 tensor on a device, or a part of one. `np.asarray` copies the values to the host.

    It can be indexed like an array, with integers, slices without steps, and None; at least one axis must remain.
    Indexing returns a part without copying; the part is copied only when a graph reads it.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        tensor: onnxruntime.OrtValue,
        ranges: Sequence[tuple[int, int]] | None = None,
        axes: Sequence[int | None] | None = None,
    ) -> None:
        """Create a view of a tensor. `ranges` limits the axes. `axes` lists those to keep, with None for a new axis."""
        self.memory = memory
        self.tensor = tensor
        self._sizes = tuple(tensor.shape())
        self._ranges = tuple((0, size) for size in self._sizes) if ranges is None else tuple(ranges)
        self._axes = tuple(range(len(self._sizes))) if axes is None else tuple(axes)
        self.shape = tuple(1 if axis is None else self._ranges[axis][1] - self._ranges[axis][0] for axis in self._axes)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index | tuple[Index, ...]) -> DeviceArray:
        ranges, axes, left = list(self._ranges), list[int | None](), list(self._axes)
        for item in index if isinstance(index, tuple) else (index,):
            axis = None if item is None else left.pop(0)
            if not isinstance(item, int):
                axes.append(axis)
            if axis is None and item not in (None, 0, slice(None)):
                raise IndexError("a new axis cannot be sliced")
            if item is not None and axis is not None:
                start, end = ranges[axis]
                own = range(start, end)
                part = own[item : item + 1] if isinstance(item, int) else own[item]
                if isinstance(item, int) and not part:
                    raise IndexError(f"index {item} is out of range for an axis of size {len(own)}")
                ranges[axis] = (part.start, max(part.start, part.stop))
        return DeviceArray(self.memory, self.tensor, ranges, axes + left)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.whole().tensor.numpy(), dtype)

    def whole(self) -> DeviceArray:
        """Return these values as a tensor of their own. Part of a larger tensor is copied, so the rest can be freed."""
        return self if self.shape == self._sizes else self.memory.join([self], 0, self.shape)

    copy = whole

    def cut(
        self, shape: Sequence[int], axis: int, *, at_front: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the part's starts and ends on the tensor's axes, and padding to `shape` on all axes except `axis`."""
        pads = np.zeros((2, len(self._sizes)), np.int64)
        for of_tensor, size, wanted, number in zip(self._axes, self.shape, shape, range(len(shape)), strict=True):
            if of_tensor is not None and number != axis:
                pads[0 if at_front else 1, of_tensor] = wanted - size
        starts, ends = np.array(self._ranges, np.int64).T.copy()
        return starts, ends, pads.ravel()


Value = npt.NDArray[np.float32] | DeviceArray  # Float input or output of a graph, on the host or on the device


class DeviceMemory:
    """Memory of the device on which a session runs. Every `DeviceArray` in this memory keeps the session alive."""

    def __init__(self, session: onnxruntime.InferenceSession, provider: str, device_id: int = 0) -> None:
        """Use the memory of device `device_id` of a session's first execution provider."""
        self._session = session
        self._kind, self._joiner = _MEMORIES.get(provider, ("cpu", CPU))
        self._id = device_id

    def run(
        self, feeds: Mapping[str, npt.NDArray[Any] | DeviceArray], outputs: Sequence[str], stay: Collection[str]
    ) -> dict[str, Any]:
        """Run the session. Arrays are copied to the device; `outputs` that are not in `stay` are copied to the host."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if isinstance(value, DeviceArray):
                binding.bind_ortvalue_input(name, value.whole().tensor)
            else:
                binding.bind_cpu_input(name, np.asarray(value, order="C"))
        for name in outputs:
            binding.bind_output(name, *((self._kind, self._id) if name in stay else ("cpu", 0)))
        binding.synchronize_inputs()
        with NATIVE_CALLS:
            self._session.run_with_iobinding(binding)
        found = zip(outputs, binding.get_outputs(), strict=True)
        return {name: DeviceArray(self, value) if name in stay else value.numpy() for name, value in found}

    def join(self, parts: Sequence[Value], axis: int, shape: Sequence[int], *, at_front: bool = False) -> DeviceArray:
        """Join parts along an axis, after padding others to `shape` with zeros, or `at_front`. Raises ProviderError."""
        place = onnxruntime.OrtValue.ortvalue_from_numpy
        left = [
            part if isinstance(part, DeviceArray) else DeviceArray(self, place(np.ascontiguousarray(part)))
            for part in parts
        ]
        try:
            while True:
                groups = [left[start : start + _FAN_IN] for start in range(0, len(left), _FAN_IN)]
                left = [self._join(group, axis, shape, at_front) for group in groups]
                if len(left) == 1:
                    return left[0]
        except ONNXRUNTIME_ERRORS as error:
            raise ProviderError(f"{self._joiner} failed to join values: {error}") from error

    def _join(self, parts: Sequence[DeviceArray], axis: int, shape: Sequence[int], at_front: bool) -> DeviceArray:
        before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        feeds: dict[str, npt.NDArray[Any] | DeviceArray] = {}
        for number in range(_FAN_IN):
            operands: list[npt.NDArray[Any] | DeviceArray] = [*_NOTHING, np.array([before, 0, after])]
            if number < len(parts):
                bounds = parts[number].cut(shape, axis, at_front=at_front)
                flat = np.array([before, parts[number].shape[axis], after])
                operands = [DeviceArray(self, parts[number].tensor), *bounds, flat]
            feeds |= {f"{name}{number}": operand for name, operand in zip(_OPERANDS, operands, strict=True)}
        feeds["shape"] = np.array([*shape[:axis], sum(part.shape[axis] for part in parts), *shape[axis + 1 :]])
        result: DeviceArray = _joining(self._joiner, self._id).run(feeds, ["joined"], ["joined"])["joined"]
        return result


def joined(parts: Sequence[Value], axis: int, *, padded: int | None = None, at_front: bool = False) -> Value:
    """Concatenate parts along an axis. Shorter parts get zeros along the axis `padded`, at the end or `at_front`."""
    filled = [part for part in parts if part.shape[axis]] or parts[:1]
    shape = list(filled[0].shape)
    if padded is not None:
        shape[padded] = max(part.shape[padded] for part in filled)
    memory = next((part.memory for part in filled if isinstance(part, DeviceArray)), None)
    if memory is not None:
        return filled[0] if len(filled) == 1 else memory.join(filled, axis, shape, at_front=at_front)
    shape[axis] = sum(part.shape[axis] for part in filled)
    result, end = np.zeros(shape, np.float32), 0
    for array in map(np.asarray, filled):
        begin, end = end, end + array.shape[axis]
        place = [slice(None)] * len(shape)
        place[axis] = slice(begin, end)
        if padded is not None:
            place[padded] = slice(shape[padded] - array.shape[padded], None) if at_front else slice(array.shape[padded])
        result[tuple(place)] = array
    return result


_OPERANDS = ("tensor", "starts", "ends", "pads", "flat")
_NOTHING: tuple[npt.NDArray[Any], ...] = (np.zeros(0, np.float32), *(np.zeros(size, np.int64) for size in (1, 1, 2)))


@functools.cache
def _joining(provider: str, device_id: int) -> DeviceMemory:
    """Create a session that slices and pads `_FAN_IN` tensors, and concatenates them along the second of three axes."""
    nodes = []
    for number in range(_FAN_IN):
        tensor, starts, ends, pads, flat = (f"{name}{number}" for name in _OPERANDS)
        nodes.append(_node("Slice", (tensor, starts, ends), f"cut{number}"))
        nodes.append(_node("Pad", (f"cut{number}", pads), f"padded{number}"))
        nodes.append(_node("Reshape", (f"padded{number}", flat), f"part{number}", allowzero=1))
    nodes.append(_node("Concat", [f"part{number}" for number in range(_FAN_IN)], "all", axis=1))
    nodes.append(_node("Reshape", ("all", "shape"), "joined", allowzero=1))
    names = [f"{name}{number}" for number in range(_FAN_IN) for name in _OPERANDS]
    inputs = [_field(11, _value(name, is_float=name.startswith("tensor"))) for name in [*names, "shape"]]
    graph = b"".join((*nodes, _field(2, "join"), *inputs, _field(12, _value("joined", is_float=True))))
    model = _field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 18))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    own = {_CUDA: {"device_id": str(device_id), "arena_extend_strategy": "kSameAsRequested"}}.get(provider, {})
    session = onnxruntime.InferenceSession(model, options, providers=[provider], provider_options=[own])
    return DeviceMemory(session, provider, device_id)


# The model is encoded in protobuf's wire format, because the runtime does not depend on the package onnx. Field numbers
# are those of onnx.proto.


def _field(number: int, content: bytes | str | int) -> bytes:
    if isinstance(content, int):
        return _varint(number << 3) + _varint(content)
    data = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    low, high = number & 127, number >> 7
    return bytes([low | 128]) + _varint(high) if high else bytes([low])


def _node(op_type: str, inputs: Sequence[str], output: str, **attributes: int) -> bytes:
    own = [_field(1, name) + _field(3, value) + _field(20, 2) for name, value in attributes.items()]
    names = b"".join(_field(1, name) for name in inputs)
    return _field(1, names + _field(2, output) + _field(4, op_type) + b"".join(_field(5, each) for each in own))


def _value(name: str, *, is_float: bool) -> bytes:
    return _field(1, name) + _field(2, _field(1, _field(1, 1 if is_float else 7)))  # of any rank
