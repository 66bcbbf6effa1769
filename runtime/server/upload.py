"""Receives an upload: Starlette parses the form and puts its file on disk; size and time are limited here."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial
from typing import IO

from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from u2moe.runtime.server.errors import (
    ClientGoneError,
    RequestError,
    StorageError,
    TooLargeError,
    UnavailableError,
    in_openai_form,
    status_of,
)
from u2moe.runtime.server.files import FilePlace
from u2moe.runtime.server.options import Limits
from u2moe.runtime.server.patience import Patience
from u2moe.runtime.server.transport import LEAST_BYTES_PER_S

_MAX_FIELD_BYTES = 64 << 10
_MAX_FIELDS = 50
_LINGER_S = 5.0


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
        self._has_more = request.headers.get("expect", "").lower() != "100-continue"  # else it is sent when asked for
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

    async def discard(self) -> None:
        """Read the rest for a short time: a response to a client that is still sending would be lost."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while self._has_more:
                    message = await self._request.receive()
                    self._has_more = message.get("more_body", False)

    async def _receive(self, place: FilePlace) -> Message:
        """The next ASGI message of the request."""
        message = await self._patience.wait_for(self._request.receive)
        self._has_more = message.get("more_body", False)
        self._size += len(message.get("body", b""))
        self._check_size(self._size)
        place.store(self._size)
        return message

    def _check_size(self, size: int) -> None:
        if size > self._limits.upload_bytes:
            raise TooLargeError(f"an upload may have {self._limits.upload_bytes} bytes", "file")


class Refusal(JSONResponse):
    """An error that a client can read while it is still sending: the rest of the body is read after it."""

    def __init__(self, error: Exception, body: Body) -> None:
        retry = {"Retry-After": str(error.retry_after_s)} if isinstance(error, UnavailableError) else {}
        super().__init__({"error": in_openai_form(error)}, status_of(error), {**retry, "Connection": "close"})
        self._rest = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - of ASGI
        """Send it, then read what still comes."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        await self._rest.discard()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
