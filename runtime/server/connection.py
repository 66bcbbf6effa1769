"""A WebSocket for the protocols: messages in and out, with limits on time; and what they contain."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected, WebSocketState

from u2moe.runtime.server.errors import MAX_QUOTED, ClientGoneError, IdleError, RequestError, TooLargeError
from u2moe.runtime.server.served_stream import ServedStream
from u2moe.runtime.server.service import Service, Slot
from u2moe.runtime.server.transport import charged
from u2moe.runtime.text.vocabulary import join_texts

_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
"""Escapes in JSON that may be half of a character beyond U+FFFF, which no text can be made of."""
_MAX_COMMAS = 10_000
"""A thousand hotwords with weights have some thousands, audio in base64 hardly any. Reading 1 MB of values takes 7 ms,
in which nobody else is served; counting commas takes half a millisecond."""
_MAX_TEXT = 1 << 20
"""Maximum length of a text: some seconds of audio in base64, or a thousand hotwords."""
_LEAST_AUDIO = 0.01
"""Minimum audio of a live client as a share of real time: 0.6 seconds, about one chunk, in a minute."""
_Value = TypeVar("_Value")


class Patience:
    """A timeout that is extended only by progress, not by messages without any.

    Args:
        limit_s: seconds within which there must be progress.
        least: the amount that counts as progress.
        unit: unit of amounts, for errors.
        amount: returns the amount received since the start.
    """

    def __init__(self, limit_s: float, least: float, unit: str, amount: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._least = least
        self._unit = unit
        self._amount = amount
        self._time = asyncio.get_running_loop().time
        self._since, self._amount_then = self._time(), amount()

    async def wait_for(self, next_one: Callable[[], Awaitable[_Value]]) -> _Value:
        """Await `next_one()` and return its result; IdleError: the time is over."""
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
        raise IdleError(f"less than {self._least:g} {self._unit} came within {self._limit_s:g} seconds") from None


def patience_for_audio(slot: Slot, idle_s: float) -> Patience:
    """The idle timeout of a live client, which has to send audio."""
    return Patience(idle_s, _LEAST_AUDIO * idle_s, "seconds of audio", lambda: slot.fed_s)


class Connection:
    """A WebSocket whose client has a slot, which opens its streams."""

    def __init__(self, websocket: WebSocket, service: Service, slot: Slot) -> None:
        self.service = service
        self.slot = slot
        self._websocket = websocket
        self._limits = service.options.limits
        self._patience = patience_for_audio(slot, self._limits.idle_s)

    async def receive(self) -> str | bytes:
        """The next message.

        Raises:
            ClientGoneError: the client has disconnected.
            IdleError: too little audio came for too long.
            TooLargeError: it is a text of more than a megabyte.
        """
        if self._websocket.client_state == WebSocketState.DISCONNECTED:
            raise ClientGoneError
        message = await self._patience.wait_for(self._websocket.receive)
        if message["type"] == "websocket.disconnect":
            raise ClientGoneError
        text: str | None = message.get("text")
        if text is None:
            data: bytes = message.get("bytes") or b""
            return data
        if len(text) > _MAX_TEXT:
            raise TooLargeError(f"a text may have {_MAX_TEXT} characters")
        return text

    async def feed(self, stream: ServedStream, samples: Callable[[bytes], npt.NDArray[Any]]) -> str:
        """Feed a stream with what `samples` reads from binary messages, up to the first text, which is returned."""
        while isinstance(message := await self.receive(), bytes):
            await stream.feed(samples(message))
        return message

    async def send(self, message: str | Mapping[str, Any]) -> None:
        """Send a text, or an object as JSON; raises what `send_within` does."""
        text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
        try:
            await send_within(self._limits.send_s, self._websocket.send_text(text))
        except (WebSocketDisconnect, WebSocketDisconnected) as error:
            raise ClientGoneError from error


async def send_within(seconds: float, sending: Awaitable[None]) -> None:
    """Send something to a client.

    Raises:
        ClientGoneError: the client has gone.
        IdleError: it reads too slowly.
    """
    try:
        async with asyncio.timeout(seconds):
            await sending
    except TimeoutError:
        raise IdleError(f"nothing was read for {seconds:g} seconds") from None
    except OSError as error:
        raise ClientGoneError from error


async def converse(read: Awaitable[object], write: Awaitable[_Value]) -> _Value:
    """Read from and write to a client concurrently; returns what writing does, but the first error ends both."""
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


def parse_object(message: str | bytes) -> dict[str, Any]:
    """Read the JSON object in a message; RequestError: it is binary, or not an object."""
    if isinstance(message, bytes):
        raise RequestError("expected text with a JSON object, got binary data")
    return read_object(message)


def read_object(text: str | bytes) -> dict[str, Any]:
    """Read a JSON object; RequestError: it is not one, or has far too many values."""
    num_commas = text.count(",") if isinstance(text, str) else text.count(b",")
    if num_commas > _MAX_COMMAS:
        raise RequestError(f"JSON may have {_MAX_COMMAS} commas, got {num_commas}")
    try:
        text = text if isinstance(text, str) else text.decode()  # json would read UTF-16, and halves of characters
        value = json.loads(text)
        if _HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError("this text has half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"this is no JSON: {error}"[:MAX_QUOTED]) from None
    if not isinstance(value, dict):
        raise RequestError(f"expected a JSON object, got {type(value).__name__}")
    return value


def plain_number(value: float) -> float:
    """A whole number as an integer, as which the clients of some languages must read it from JSON."""
    return int(value) if value == int(value) else value


def added_text(before: Sequence[str], text: str) -> str:
    """The text to append to the transcript of the segments `before`, including a space if needed."""
    return join_texts([*before, text])[len(join_texts(before)) :]


def read_samples(kind: str, data: bytes) -> npt.NDArray[Any]:
    """Samples of a little-endian type such as "<i2"; RequestError: the last is incomplete."""
    stored = np.dtype(kind)
    if len(data) % stored.itemsize:
        needed = f"{8 * stored.itemsize}-bit samples need a multiple of {stored.itemsize} bytes"
        raise RequestError(f"{needed}, got {len(data)}")
    return np.frombuffer(data, stored).astype(stored.newbyteorder("="), copy=False)


int16_samples = partial(read_samples, "<i2")
float32_samples = partial(read_samples, "<f4")
