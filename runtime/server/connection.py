"""A WebSocket for the protocols: messages in and out with limits on time and size, and one way to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected, WebSocketState

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.access import KEY_SUBPROTOCOLS
from u2moe.runtime.server.errors import (
    ClientGoneError,
    IdleError,
    RecognitionError,
    RequestError,
    StoppingError,
    TooLargeError,
    UnavailableError,
)
from u2moe.runtime.server.log import LOGGER
from u2moe.runtime.server.patience import patience_for_audio

if TYPE_CHECKING:
    from u2moe.runtime.server.mailbox import Mailbox
    from u2moe.runtime.server.options import Limits
    from u2moe.runtime.server.service import Place, Service

_MAX_REASON = 120
"""Maximum bytes of the reason for closing a WebSocket (123 by RFC 6455)."""
_CLOSE_CODE = 1008
"""Close code for other errors of the client."""
_GONE = (ClientGoneError, WebSocketDisconnect, WebSocketDisconnected)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A WebSocket protocol.

    Attributes:
        name: name of the protocol and of its path.
        run: serves one client until it is done; exceptions are reported to the client.
        tell_error: returns the message that reports an error to the client; None: the protocol has none.
        subprotocols: supported WebSocket subprotocols, of which the first that the client offers is chosen.
    """

    name: str
    run: Callable[[Connection], Coroutine[Any, Any, None]]
    tell_error: Callable[[Exception], str] | None = None
    subprotocols: tuple[str, ...] = ()


class Connection:
    """A WebSocket whose client has a place.

    Attributes:
        service: shared by all connections.
        place: opens sessions.
        query: parameters of the URL.
    """

    def __init__(self, websocket: WebSocket, service: Service, place: Place) -> None:
        self.service = service
        self.place = place
        self.query: Mapping[str, str] = websocket.query_params
        self._websocket = websocket
        self._mailbox: Mailbox = websocket.scope["state"]["mailbox"]
        self._patience = patience_for_audio(place, self.limits.idle_s)

    @property
    def limits(self) -> Limits:
        """The limits of the client."""
        return self.service.options.limits

    async def receive(self) -> str | bytes:
        """The next message.

        Raises:
            ClientGoneError: the client has disconnected.
            IdleError: too little audio came for too long.
        """
        message = await self._mailbox.get(self._patience)
        if message["type"] == "websocket.disconnect":
            self._mailbox.put_nowait(message)  # whoever reads next is told, too
            raise ClientGoneError
        text: str | None = message.get("text")
        if text is not None:
            return text
        data: bytes = message.get("bytes") or b""
        return data

    async def send(self, message: str | Mapping[str, Any]) -> None:
        """Send a text, or an object as JSON.

        Raises:
            ClientGoneError: the client has gone.
            IdleError: it reads too slowly.
        """
        text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
        try:
            async with asyncio.timeout(self.limits.send_s):
                await self._websocket.send_text(text)
        except TimeoutError:
            raise IdleError(f"nothing was read for {self.limits.send_s:g} seconds") from None
        except (WebSocketDisconnect, WebSocketDisconnected, OSError) as error:
            raise ClientGoneError from error


async def serve_websocket(protocol: Protocol, service: Service, websocket: WebSocket) -> None:
    """Serve a client with a protocol, if there is a place; errors are reported to it and end the connection."""
    with contextlib.suppress(*_GONE, OSError, TimeoutError):
        code, reason = await _serve_to_the_end(protocol, service, websocket)
        async with asyncio.timeout(service.options.limits.send_s):
            await websocket.close(code, reason.encode()[:_MAX_REASON].decode(errors="ignore"))


async def _serve_to_the_end(protocol: Protocol, service: Service, websocket: WebSocket) -> tuple[int, str]:
    """Serve a client; returns the code and the reason to close with."""
    offered = websocket.scope["subprotocols"]
    # browsers give up if they offer some and none is chosen: then it is the one that holds the key
    keys = (name for name in offered if name.startswith(KEY_SUBPROTOCOLS))
    subprotocol = next((name for name in protocol.subprotocols if name in offered), None) or next(keys, None)
    try:
        with service.place(protocol.name) as place:
            await websocket.accept(subprotocol)
            await protocol.run(Connection(websocket, service, place))
        return (StoppingError.close_code, str(StoppingError())) if place.is_drained else (1000, "")
    except U2moeError as error:
        count_failure(service, error)
        if websocket.application_state == WebSocketState.CONNECTING:
            await websocket.accept(subprotocol)  # web pages see the reason only if it was accepted
        if protocol.tell_error is not None:
            async with asyncio.timeout(service.options.limits.send_s):
                await websocket.send_text(protocol.tell_error(error))
        return getattr(error, "close_code", _CLOSE_CODE), str(error)
    except _GONE:
        raise
    except Exception as error:  # noqa: BLE001 - a bug ends one connection, not the server
        count_failure(service, error)
        LOGGER.exception("a connection (%s) was ended by an error", protocol.name)
        return RecognitionError.close_code, "an error within the server"


def count_failure(service: Service, error: Exception) -> None:
    """Count and log the error that ended a connection or request; refusals are counted where they occur."""
    if isinstance(error, UnavailableError):
        return
    kinds = ((IdleError, "idle"), (TooLargeError, "too_large"), (RecognitionError, "recognition"))
    known = next((name for kind, name in kinds if isinstance(error, kind)), None)
    service.incidents.fail(known or ("request" if isinstance(error, U2moeError) else "recognition"))


async def converse(read: Coroutine[Any, Any, None], write: Coroutine[Any, Any, None]) -> None:
    """Read from and write to a client concurrently until everything is written; the first error ends both."""
    reader, writer = asyncio.create_task(read), asyncio.create_task(write)
    try:
        await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        if reader.done():
            reader.result()
            await writer
        else:
            writer.result()
    finally:
        for task in (reader, writer):
            task.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)


def parse_object(message: str | bytes) -> dict[str, Any]:
    """Read the JSON object in a message.

    Raises:
        RequestError: it is binary, or not an object.
    """
    if isinstance(message, bytes):
        raise RequestError("expected text with a JSON object, got binary data")
    return read_object(message)


def read_object(text: str | bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RequestError: it is not one.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"this is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"expected a JSON object, got {type(value).__name__}")
    return value


def plain_number(value: float) -> float:
    """A whole number as an integer, as which the clients of some languages must read it from JSON."""
    return int(value) if value == int(value) else value


def int16_samples(data: bytes) -> npt.NDArray[np.int16]:
    """Samples from little-endian int16.

    Raises:
        RequestError: an incomplete sample.
    """
    if len(data) % 2:
        raise RequestError(f"16-bit samples need an even number of bytes, got {len(data)}")
    return np.frombuffer(data, "<i2").astype(np.int16, copy=False)


def float32_samples(data: bytes) -> npt.NDArray[np.float32]:
    """Samples from little-endian float32.

    Raises:
        RequestError: an incomplete sample.
    """
    if len(data) % 4:
        raise RequestError(f"32-bit samples need a multiple of four bytes, got {len(data)}")
    return np.frombuffer(data, "<f4").astype(np.float32, copy=False)
