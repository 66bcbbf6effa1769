"""What can go wrong between a client and the server. Each protocol says it in a form of its own."""

from __future__ import annotations

from u2moe.runtime.errors import U2moeError


class RequestError(U2moeError):
    """The client asked for something that cannot be done, or broke the protocol.

    Attributes:
        close_code: what a WebSocket is closed with.
        status: the same for HTTP.
        parameter: the field that is wrong, where there is one.
    """

    close_code = 1008
    status = 400

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class IdleError(RequestError):
    """The client sent nothing, or read nothing, for longer than it may."""

    status = 408


class TooLargeError(RequestError):
    """The client sent more than it may, in bytes or in seconds of audio."""

    close_code = 1009
    status = 413


class KeyRefusedError(RequestError):
    """The API key is missing or wrong."""

    status = 401


class UnavailableError(RequestError):
    """The server is full, or is about to stop.

    Attributes:
        retry_after_s: seconds after which another try may succeed.
    """

    close_code = 1013
    status = 503
    retry_after_s = 5


class StoppingError(UnavailableError):
    """The server is about to stop."""

    close_code = 1001


class RecognitionError(U2moeError):
    """Recognition itself has failed: it is not the client's fault."""

    close_code = 1011
    status = 500


class ClientGoneError(Exception):
    """The client has closed the connection, or lost it."""
