"""Receives an upload: Starlette parses the form and puts its file on disk; size and time are limited here."""

from __future__ import annotations

from dataclasses import dataclass
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


async def receive_form(request: Request, limits: Limits, place: FilePlace) -> Upload:
    """The form in a request, with a file named "file", which takes a place; limited in time and size.

    Raises:
        RequestError: not a form, damaged, or without a file.
        TooLargeError: too many bytes; raised before reading if their number is declared.
        IdleError: too few bytes arrived for too long.
        ClientGoneError: the client has disconnected.
        StorageError: it cannot be stored.
    """
    size = 0
    patience = Patience(limits.idle_s, LEAST_BYTES_PER_S * limits.idle_s, "bytes", lambda: size)

    def check(size: int) -> None:
        if size > limits.upload_bytes:
            raise TooLargeError(f"an upload may have {limits.upload_bytes} bytes", "file")

    async def receive() -> Message:
        nonlocal size
        message = await patience.wait_for(request.receive)
        num_bytes = len(message.get("body", b""))
        size += num_bytes
        check(size)
        place.store(size)
        earn(num_bytes / _BYTES_PER_AUDIO_S)
        return message

    declared = request.headers.get("content-length", "")
    check(int(declared) if declared.isdecimal() else 0)
    _, settings = parse_options_header(request.headers.get("content-type"))
    if settings.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):  # some are decoded in quadratic time
        raise RequestError("a form must be UTF-8")
    try:
        form = await Request(request.scope, receive).form(
            max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
        )
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
