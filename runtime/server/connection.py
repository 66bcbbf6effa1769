"""Shared by protocols: admission, closing and errors of WebSockets, messages with timeouts, parsing of messages."""

import asyncio
import contextlib
import json
import re
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.routing import Route
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected, WebSocketState

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.access import KEY, KEY_SUBPROTOCOLS
from u2moe.runtime.server.errors import ClientGoneError, IdleError, RequestError, StoppingError, TooLargeError
from u2moe.runtime.server.scheduler import ServedStream
from u2moe.runtime.server.service import Service, Slot
from u2moe.runtime.server.transport import charged
from u2moe.runtime.text.vocabulary import join_texts

_DOUBTFUL = re.compile(r"\\u[dD][89a-fA-F]|[eE]\+?\d{3}|\d{300}")  # surrogates, maybe unpaired; maybe infinite numbers
_MAX_COMMAS = 10_000  # in JSON: 1 MB of values blocks the event loop for 7 ms; 1000 hotwords need a few thousand commas
_MAX_TEXT = 1 << 20  # characters of a text message: several seconds of audio in base64, or a thousand hotwords
_LEAST_AUDIO = 0.01  # least audio of a live client, as a share of real time: 0.6 s per minute, about one chunk
_MAX_REASON = 120  # maximum bytes of the reason for closing a WebSocket; RFC 6455 allows 123
_GONE = (ClientGoneError, WebSocketDisconnect, WebSocketDisconnected)  # the client closed or lost the connection
_Value = TypeVar("_Value")
Conversation = Coroutine[Any, Any, None]


class Patience:
    """Timeout of `limit_s` seconds that restarts only when the `amount` received has grown by `least` (in `unit`)."""

    def __init__(self, limit_s: float, least: float, unit: str, amount: Callable[[], float]) -> None:
        self._limit_s, self._least, self._unit, self._amount = limit_s, least, unit, amount
        self._time = asyncio.get_running_loop().time
        self._since, self._amount_then = self._time(), amount()

    @classmethod
    def for_audio(cls, slot: Slot, idle_s: float) -> Self:
        """Return the idle timeout of a live client, whose progress is measured by the audio that it sends."""
        return cls(idle_s, _LEAST_AUDIO * idle_s, "seconds of audio", lambda: slot.fed_s)

    async def wait_for(self, next_one: Callable[[], Awaitable[_Value]]) -> _Value:
        """Await `next_one()` and return its result. Raises IdleError when the timeout has expired."""
        if (amount := self._amount()) - self._amount_then >= self._least:
            self._since, self._amount_then = self._time(), amount
        left_s = self._since + self._limit_s - self._time()
        try:
            if left_s > 0:
                async with asyncio.timeout(left_s) as scope:
                    return await next_one()
        except TimeoutError:
            if not scope.expired():  # the connection was lost
                raise
        raise IdleError(f"less than {self._least:g} {self._unit} received in {self._limit_s:g} seconds") from None


class Connection:
    """A WebSocket whose client has a slot. Streams are opened with `slot`."""

    def __init__(self, websocket: WebSocket, service: Service, slot: Slot) -> None:
        self.service, self.slot, self._websocket = service, slot, websocket
        self._limits = service.options.limits
        self._patience = Patience.for_audio(slot, self._limits.idle_s)

    async def receive(self) -> str | bytes:
        """Return the next message. Raises ClientGoneError, IdleError (too little audio) or TooLargeError (a text)."""
        message = await self._patience.wait_for(self._websocket.receive)
        if message["type"] == "websocket.disconnect":
            raise ClientGoneError
        text = message.get("text")
        received: str | bytes = text if text is not None else message.get("bytes") or b""
        if isinstance(received, str) and len(received) > _MAX_TEXT:
            raise TooLargeError(f"a text message may have at most {_MAX_TEXT} characters")
        return received

    async def feed(self, stream: ServedStream, samples: Callable[[bytes], npt.NDArray[Any]]) -> str:
        """Feed a stream until a text message arrives, and return this message. `samples` decodes binary messages."""
        while isinstance(message := await self.receive(), bytes):
            await stream.feed(samples(message))
        return message

    async def send(self, message: str | Mapping[str, Any]) -> None:
        """Send a text, or an object as JSON. Raises IdleError, or one of `_GONE`."""
        text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
        await send_within(self._limits.send_s, self._websocket.send_text(text))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol over WebSocket (`path` and `run`), TCP (`run_tcp`, which reports errors itself) or HTTP (`routes`)."""

    name: str  # in options, metrics and logs
    path: str | None = None  # of its WebSocket
    run: Callable[[Connection], Conversation] | None = None  # serves one client; errors are reported to it
    run_tcp: Callable[[Service, asyncio.StreamReader, asyncio.StreamWriter], Conversation] | None = None
    routes: Callable[[Service], list[Route]] | None = None
    may_have_port: bool = False  # whether `--protocol` can assign a port, for clients that cannot set a path
    tell_error: Callable[[Exception], Mapping[str, Any]] | None = None  # returns JSON for the client; None: not sent
    close_code: int = RequestError.close_code  # for client errors that have no close code of their own
    subprotocols: tuple[str, ...] = ()  # in order of preference

    async def serve(self, service: Service, run: Callable[[Connection], Conversation], websocket: WebSocket) -> None:
        """Serve a client by `run` if a slot is free. Errors are reported to the client and end the connection."""
        limit_s, offered = service.options.limits.send_s, websocket.scope["subprotocols"]
        keys = (name for name in offered if name.startswith(KEY_SUBPROTOCOLS))
        # browsers disconnect if none is chosen, even if they offer only one that contains their key
        subprotocol = next((name for name in self.subprotocols if name in offered), None) or next(keys, None)
        with contextlib.suppress(*_GONE, OSError, TimeoutError):
            try:
                with service.slot(self.name, websocket.scope[KEY]) as slot:
                    await websocket.accept(subprotocol)
                    slot.model = service.model(websocket.query_params.get("model"))
                    await run(Connection(websocket, service, slot))
                code, reason = (StoppingError.close_code, str(StoppingError())) if slot.is_drained else (1000, "")
            except U2moeError as error:
                service.metrics.fail(error)
                if websocket.application_state == WebSocketState.CONNECTING:
                    await websocket.accept(subprotocol)  # web pages see the reason only on an accepted connection
                if self.tell_error is not None:
                    async with asyncio.timeout(limit_s):
                        await websocket.send_text(json.dumps(self.tell_error(error), ensure_ascii=False))
                code, reason = getattr(error, "close_code", RequestError.close_code), str(error)
                code = self.close_code if code == RequestError.close_code else code
            except _GONE:
                raise
            except Exception as error:  # noqa: BLE001 - a bug ends one connection, not the server
                service.metrics.fail(error, f"a connection ({self.name})")
                code, reason = 1011, "internal server error"
            async with asyncio.timeout(limit_s):
                await websocket.close(code, reason.encode()[:_MAX_REASON].decode(errors="ignore"))


async def send_within(seconds: float, sending: Awaitable[None]) -> None:
    """Wait for `sending`. Raises ClientGoneError, or IdleError if the client has read nothing for `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            await sending
    except TimeoutError:
        raise IdleError(f"the client read nothing for {seconds:g} seconds") from None
    except OSError as error:
        raise ClientGoneError from error


async def converse(read: Awaitable[object], write: Awaitable[_Value]) -> _Value:
    """Run `read` and `write` concurrently; return the result of `write`. The first error ends both."""
    reader, writer = asyncio.create_task(charged(read)), asyncio.create_task(charged(write))
    try:
        await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        if reader.done():
            reader.result()
        return await writer
    finally:
        for task in (reader, writer):
            task.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)


def parse_object(message: str | bytes, *, may_be_binary: bool = False) -> dict[str, Any]:
    """Read the JSON object in a message. Raises RequestError if it is something else, or has too many values."""
    if isinstance(message, bytes) and not may_be_binary:
        raise RequestError("expected text with a JSON object, got binary data")
    try:
        text = message if isinstance(message, str) else message.decode()  # json would also accept UTF-16
        if (num_commas := text.count(",")) > _MAX_COMMAS:
            raise RequestError(f"JSON may have at most {_MAX_COMMAS} commas, got {num_commas}")
        value = json.loads(text, parse_constant=int)  # fails for NaN and Infinity, which are not JSON
        if _DOUBTFUL.search(text):
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RequestError("invalid JSON: half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"expected a JSON object, got {type(value).__name__}")
    return value


def plain_number(value: float) -> float:
    """Return a number, as an int if it is whole. Clients in some languages reject integers with a decimal point."""
    return int(value) if value == int(value) else value


def added_text(before: Sequence[str], text: str) -> str:
    """Return `text`, with a leading space if it needs one after the texts in `before`."""
    return join_texts([*before, text])[len(join_texts(before)) :]


def read_samples(kind: str, data: bytes) -> npt.NDArray[Any]:
    """Read samples of a little-endian type such as "<i2". Raises RequestError if the last sample is incomplete."""
    stored = np.dtype(kind)
    if len(data) % (size := stored.itemsize):
        raise RequestError(f"{8 * size}-bit samples need a multiple of {size} bytes, got {len(data)}")
    return np.frombuffer(data, stored).astype(stored.newbyteorder("="), copy=False)


int16_samples = partial(read_samples, "<i2")
float32_samples = partial(read_samples, "<f4")
