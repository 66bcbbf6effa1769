"""Receives an upload to disk: the fields of a form, and its file, which is never held in memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from u2moe.runtime.server.errors import ClientGoneError, IdleError, RequestError, TooLargeError
from u2moe.runtime.server.patience import LEAST_BYTES_PER_S, Patience

if TYPE_CHECKING:
    from u2moe.runtime.server.options import Limits

_MAX_FIELD_BYTES = 64 << 10
_MAX_FIELDS = 50
_LINGER_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A form that was received.

    Attributes:
        file: where the file lies, until the upload is left.
        name: what the client calls it.
        fields: all values of each field, in order.
    """

    file: Path
    name: str
    fields: dict[str, list[str]]

    def value(self, name: str, default: str = "") -> str:
        """The last value of a field."""
        return self.fields.get(name, [default])[-1]


class Body:
    """The body of a request as it arrives, with limits on time and size.

    Raises:
        TooLargeError: it is too large; raised before reading if its size is declared.
        IdleError: too little arrived for too long.
        ClientGoneError: the client has disconnected.
    """

    def __init__(self, request: Request, limits: Limits) -> None:
        self._limits = limits
        self._chunks = request.stream()
        self._length = request.headers.get("content-length", "")
        self._can_go_on = True
        self._size = 0
        least = LEAST_BYTES_PER_S * limits.idle_s
        self._patience = Patience(limits.idle_s, least, "bytes", lambda: self._size)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = int(self._length) if self._length.isdecimal() else 0
        if size > self._limits.upload_bytes:
            raise self._too_large()
        try:
            async for chunk in self._timely():
                if self._size > self._limits.upload_bytes:
                    raise self._too_large()
                yield chunk
        except ClientDisconnect as error:
            raise ClientGoneError from error

    async def discard(self) -> None:
        """Read the rest for a short time: a response to a client that is still sending would be lost."""
        with contextlib.suppress(TimeoutError, IdleError, ClientDisconnect):
            async with asyncio.timeout(_LINGER_S):
                async for _ in self._timely():
                    pass

    async def _timely(self) -> AsyncIterator[bytes]:
        while self._can_go_on:
            self._can_go_on = False  # unless the next comes
            chunk = await self._patience.wait_for(lambda: anext(self._chunks, None))
            if chunk is not None:
                self._can_go_on = True
                self._size += len(chunk)
                yield chunk

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"an upload may have {self._limits.upload_bytes} bytes", "file")


@contextlib.asynccontextmanager
async def receive_upload(content_type: str, body: Body) -> AsyncIterator[Upload]:
    """A form with a file named "file", streamed to a temporary file that is removed at the end.

    Raises:
        RequestError: not a form, damaged, without a file, or an error in the body.
        ClientGoneError: the client has disconnected.
    """
    kind, parameters = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not parameters.get(b"boundary"):
        raise RequestError("expected a form (multipart/form-data) with a file named 'file'", "file")
    handle, name = tempfile.mkstemp(prefix="u2moe-")
    try:
        with os.fdopen(handle, "wb") as target:
            form = _Form(parameters[b"boundary"], target)
            try:
                async for chunk in body:
                    await asyncio.to_thread(form.write, chunk)  # a disk may be slow
                form.finish()
            except FormParserError as error:
                raise RequestError(f"the form is damaged: {error}") from error
        if not form.has_file:
            raise RequestError("the form has no file named 'file'", "file")
        yield Upload(file=Path(name), name=form.file_name or "file", fields=form.fields)
    finally:
        with contextlib.suppress(OSError):  # where files in use cannot be removed, and an abandoned one is in use
            Path(name).unlink()  # noqa: ASYNC240 - quick


@dataclass
class _Part:
    name: str = ""
    is_file: bool = False
    headers: dict[bytes, bytes] = field(default_factory=dict)
    value: bytearray = field(default_factory=bytearray)


class _Form:
    """Sorts the parts of a form as they arrive."""

    def __init__(self, boundary: bytes, target: IO[bytes]) -> None:
        self.fields: dict[str, list[str]] = {}
        self.has_file = False
        self.file_name = ""
        self._target = target
        self._part = _Part()
        self._num_fields = 0
        self._is_complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._open,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_end": self._complete,
            },
        )
        self._name, self._value = b"", b""

    def write(self, data: bytes) -> None:
        """Process data."""
        self._parser.write(data)

    def finish(self) -> None:
        """End the form.

        Raises:
            RequestError: it is incomplete.
        """
        self._parser.finalize()
        if not self._is_complete:
            raise RequestError("the form ends too early")
        self._target.flush()

    def _begin(self) -> None:
        self._part = _Part()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._part.headers[self._name.lower()] = self._value
        self._name, self._value = b"", b""

    def _open(self) -> None:
        _, parameters = parse_options_header(self._part.headers.get(b"content-disposition", b""))
        if b"name" not in parameters:
            raise RequestError("a part of the form has no name")
        self._part.name = parameters[b"name"].decode(errors="replace")
        self._part.is_file = b"filename" in parameters
        self._num_fields += 1
        if self._num_fields > _MAX_FIELDS:
            raise RequestError(f"the form has more than {_MAX_FIELDS} fields")
        if self._part.is_file:
            if self.has_file or self._part.name != "file":
                raise RequestError("the form may have one file, named 'file'", "file")
            self.has_file = True
            self.file_name = parameters[b"filename"].decode(errors="replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self._target.write(data[start:end])
        elif len(self._part.value) + end - start > _MAX_FIELD_BYTES:
            raise RequestError(f"a field may have {_MAX_FIELD_BYTES} bytes", self._part.name)
        else:
            self._part.value += data[start:end]

    def _end(self) -> None:
        if not self._part.is_file:
            self.fields.setdefault(self._part.name, []).append(self._part.value.decode(errors="replace"))

    def _complete(self) -> None:
        self._is_complete = True
