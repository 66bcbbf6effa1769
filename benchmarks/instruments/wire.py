"""Protobuf on the wire, as much of it as ONNX files need: a device is measured with what the runtime needs alone."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {FIXED64: 8, FIXED32: 4}

Value = int | memoryview


def fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message, in order: integers, or bytes that are not copied.

    Raises:
        ValueError: bytes that are no message.
    """
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _read_varint(message, position)
            yield number, value
            continue
        if kind == BYTES:
            size, position = _read_varint(message, position)
        elif kind in _FIXED_SIZES:
            size = _FIXED_SIZES[kind]
        else:
            raise ValueError(f"wire type {kind} at byte {position} is none of protobuf")
        if position + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {position} reaches beyond the end")
        yield number, message[position : position + size]
        position += size


def integers(value: Value) -> list[int]:
    """A repeated integer field, packed or one by one."""
    if isinstance(value, int):
        return [value]
    result, position = [], 0
    while position < len(value):
        item, position = _read_varint(value, position)
        result.append(item)
    return result


def text(value: Value) -> str:
    """A string field."""
    return bytes(value).decode() if isinstance(value, memoryview) else str(value)


def field(number: int, value: bytes | str | int) -> bytes:
    """A field as it is written: an integer that is not negative, text, or bytes such as another message."""
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError(f"an integer at byte {position} does not end")
