"""Receives an upload: Starlette parses the form and puts its file on disk; size and time are limited here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from u2moe.runtime.server.errors import (
    ClientGoneError,
    RequestError,
    StorageError,
    TooLargeError,
)
from u2moe.runtime.server.files import FilePlace
from u2moe.runtime.server.options import Limits
from u2moe.runtime.server.patience import Patience
from u2moe.runtime.server.transport import LEAST_BYTES_PER_S, earn

_MAX_FIELD_BYTES = 64 << 10
_MAX_FIELDS = 50
_BYTES_PER_AUDIO_S = 1e6
"""Of an upload, that earn as much as a second of audio."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A form that was received."""

    file: IO[bytes]  # open; whoever takes the upload closes it, and it is gone
    name: str  # the client's name for it
    form: FormData

    def values(self, name: str) -> list[str]:
        """All values of a field, in order."""
        return [value for value in self.form.getlist(name) if isinstance(value, str)]

    def value(self, name: str) -> str:
        """The last value of a field, or ""."""
        return (self.values(name) or [""])[-1]


class Body:
    """The body of a request, with limits on time and size."""

    def __init__(self, request: Request, limits: Limits) -> None:
        self._request = request
        self._limits = limits
        self._size = 0
        least = LEAST_BYTES_PER_S * limits.idle_s
        self._patience = Patience(limits.idle_s, least, "bytes", lambda: self._size)

    async def receive_form(self, place: FilePlace) -> Upload:
        """The form, with a file named "file", which takes a place.

        Raises:
            RequestError: not a form, damaged, or without a file.
            TooLargeError: too many bytes; raised before reading if their number is declared.
            IdleError: too few bytes arrived for too long.
            ClientGoneError: the client has disconnected.
            StorageError: it cannot be stored.
        """
        declared = self._request.headers.get("content-length", "")
        self._check_size(int(declared) if declared.isdecimal() else 0)
        _, settings = parse_options_header(self._request.headers.get("content-type"))
        if settings.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):  # some are decoded in quadratic time
            raise RequestError("a form must be UTF-8")
        limited = Request(self._request.scope, partial(self._receive, place))
        try:
            form = await limited.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
        except ClientDisconnect as error:
            raise ClientGoneError from error
        except (HTTPException, FormParserError) as error:
            reason = error.detail if isinstance(error, HTTPException) else error
            raise RequestError(f"the form is damaged: {reason}") from error
        except OSError as error:
            raise StorageError.of(error) from error
        upload = form.get("file")
        if not isinstance(upload, UploadFile):
            await form.close()
            raise RequestError("expected a form (multipart/form-data) with a file named 'file'", "file")
        return Upload(file=upload.file, name=upload.filename or "file", form=form)

    async def _receive(self, place: FilePlace) -> Message:
        """The next ASGI message of the request."""
        message = await self._patience.wait_for(self._request.receive)
        self._size += len(message.get("body", b""))
        self._check_size(self._size)
        place.store(self._size)
        earn(len(message.get("body", b"")) / _BYTES_PER_AUDIO_S)
        return message

    def _check_size(self, size: int) -> None:
        if size > self._limits.upload_bytes:
            raise TooLargeError(f"an upload may have {self._limits.upload_bytes} bytes", "file")
