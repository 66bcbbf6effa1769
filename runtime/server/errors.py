"""Errors that the server reports to clients, in the form of each protocol."""

import contextlib
import errno
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from u2moe.runtime.errors import U2moeError

_MAX_QUOTED = 300  # maximum characters of an error message that may quote the client


class RequestError(U2moeError):
    """The request cannot be served, or the client violated the protocol."""

    kind = "request"  # label in the metric `failures`
    close_code = 1008  # of a WebSocket
    status = 400  # of HTTP

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter  # name of the invalid field
        self.code = code  # OpenAI's error code


class IdleError(RequestError):
    """The client sent or read too little before the timeout."""

    kind = "idle"
    status = 408


class TooLargeError(RequestError):
    """The client exceeded a limit on bytes or on seconds of audio."""

    kind = "too_large"
    close_code = 1009
    status = 413


class UnavailableError(RequestError):
    """The server is full or stopping. The client should try again later. It counts as a refusal, not as a failure."""

    close_code = 1013
    status = 503


class StoppingError(UnavailableError):
    """The server is stopping."""

    close_code = 1001

    def __init__(self, message: str = "the server is stopping") -> None:
        super().__init__(message)


class StorageError(RequestError):
    """An upload cannot be stored or decoded: the disk is full (HTTP 507), or another resource is missing (HTTP 503)."""

    kind = "storage"

    def __init__(self, number: int | None) -> None:
        is_full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        problem = "has no disk space for the file" if is_full else "cannot take files"
        super().__init__(f"the server {problem} at the moment")
        self.status = 507 if is_full else 503


class RecognitionError(U2moeError):
    """Recognition failed because of an error in the server."""

    kind = "recognition"
    close_code = 1011
    status = 500


class ClientGoneError(Exception):
    """The client closed or lost the connection."""


@contextlib.contextmanager
def refusing(parameter: str | None = None) -> Iterator[None]:
    """Turn a ValueError into a RequestError that names `parameter` or, without it, the field of the ValueError."""
    try:
        yield
    except ValueError as error:
        raise RequestError(str(error)[:_MAX_QUOTED], parameter or getattr(error, "field", None)) from None


def error_response(error: Exception, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response that reports an error in OpenAI's form. `status` overrides the error's own status."""
    retry = {"Retry-After": "5"} if isinstance(error, UnavailableError) else {}
    status = status or int(getattr(error, "status", 400))
    return JSONResponse({"error": in_openai_form(error)}, status, {**retry, **(headers or {})})


def in_openai_form(error: Exception) -> dict[str, Any]:
    """Return an error as OpenAI's REST and realtime APIs represent it."""
    return {
        "message": str(error),
        "type": "invalid_request_error" if getattr(error, "status", 400) < 500 else "server_error",
        "param": getattr(error, "parameter", None),
        "code": getattr(error, "code", None),
    }
