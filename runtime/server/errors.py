"""Errors between a client and the server. Each protocol reports them in its own form."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from typing import Any, Self

from starlette.responses import JSONResponse, Response

from u2moe.runtime.errors import U2moeError

MAX_QUOTED = 300
"""Characters of an error that may quote the client."""


class RequestError(U2moeError):
    """The client asked for something that cannot be done, or broke the protocol.

    Attributes:
        kind: label of the error in the metric `failures`.
        close_code: close code for WebSockets.
        status: status for HTTP.
        parameter: the invalid field, if any.
        code: OpenAI's code for the error, if any.
    """

    kind = "request"
    close_code = 1008
    status = 400

    def __init__(self, message: str, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.code = code


class IdleError(RequestError):
    """The client sent or read too little for too long."""

    kind = "idle"
    status = 408


class TooLargeError(RequestError):
    """The client exceeded the limit on bytes or on seconds of audio."""

    kind = "too_large"
    close_code = 1009
    status = 413


class UnavailableError(RequestError):
    """The server is full, or is about to stop. Counted as a refusal, not as a failure.

    Attributes:
        retry_after_s: seconds after which a retry may succeed.
    """

    close_code = 1013
    status = 503
    retry_after_s = 5


class StoppingError(UnavailableError):
    """The server is about to stop."""

    close_code = 1001

    def __init__(self, message: str = "the server is about to stop") -> None:
        super().__init__(message)


class StorageError(RequestError):
    """An upload cannot be stored: the folder for temporary files is full (507) or cannot be written (503)."""

    kind = "storage"

    status = 503

    @classmethod
    def of(cls, error: OSError) -> Self:
        """The error for one of the system's."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return cls("the server cannot store files now")
        full = cls("the server has no room for the file now")
        full.status = 507
        return full


class RecognitionError(U2moeError):
    """Recognition has failed, through no fault of the client."""

    kind = "recognition"
    close_code = 1011
    status = 500


class ClientGoneError(Exception):
    """The client has closed or lost the connection."""


@contextlib.contextmanager
def refusing(parameter: str | None = None) -> Iterator[None]:
    """Turn the ValueError of a check into a RequestError that names the parameter; None: the field that was checked."""
    try:
        yield
    except ValueError as error:
        raise RequestError(str(error)[:MAX_QUOTED], parameter or getattr(error, "field", None)) from None


def status_of(error: Exception) -> int:
    """The HTTP status for an error."""
    return int(getattr(error, "status", 400))


def error_response(error: Exception, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """An error in OpenAI's form, with its own status unless another is given."""
    return JSONResponse({"error": in_openai_form(error)}, status or status_of(error), headers)


def in_openai_form(error: Exception) -> dict[str, Any]:
    """An error as OpenAI's REST and realtime APIs describe it."""
    return {
        "message": str(error),
        "type": "invalid_request_error" if status_of(error) < 500 else "server_error",
        "param": getattr(error, "parameter", None),
        "code": getattr(error, "code", None),
    }
