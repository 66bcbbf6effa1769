"""Wyoming protocol of Home Assistant, over TCP. An event is a line of JSON, followed by its data and audio.

The package `wyoming` is not used, because its reader stores events of any size in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import U2moeError
from u2moe.runtime.server.connection import Patience, Protocol, added_text, converse, parse_object, send_within
from u2moe.runtime.server.errors import ClientGoneError, RequestError, TooLargeError, refusing
from u2moe.runtime.server.models import ServedModel
from u2moe.runtime.server.scheduler import ServedStream
from u2moe.runtime.server.service import Service, Slot
from u2moe.runtime.text.vocabulary import join_texts
from u2moe.runtime.validation import checked_integer

LINE_BYTES = 16 << 10  # maximum bytes of an event's first line; `asyncio.StreamReader` buffers twice this number
_DATA_BYTES = 256 << 10  # maximum bytes of an event's data
_EVENTS_PER_TURN = 50
_SAMPLES = {1: "i1", 2: "<i2", 4: "<i4"}  # types of signed samples by their size in bytes
_FORMAT = ("rate", "width", "channels")
_Event = tuple[str, dict[str, Any]]  # type and data of an event, without its payload
_Value = TypeVar("_Value")


async def serve_wyoming(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one client until it disconnects, has its transcript, or is sent an error."""
    client = _Client(service, reader, writer)
    with contextlib.suppress(ClientGoneError, OSError):
        try:
            await client.run()
        except U2moeError as error:
            service.metrics.fail(error)
            with contextlib.suppress(U2moeError):
                await client.send("error", text=str(error), code=type(error).__name__)
        except ClientGoneError:
            raise
        except Exception as error:  # noqa: BLE001 - a bug ends one connection, not the server
            service.metrics.fail(error, "a connection (wyoming)")
    writer.close()


class _Client:
    """A connection. It ends after one request with audio."""

    def __init__(self, service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._service, self._limits = service, service.options.limits
        self._reader, self._writer = reader, writer
        self._model = service.default
        self._names = ""  # phrases separated by NUL; a list would take three times as much memory
        self._num_events = self._num_unread = 0
        self._patience = Patience(self._limits.idle_s, 1, "event", lambda: self._num_events)

    async def run(self) -> None:
        while (event := await self._receive()) is not None:
            kind, data = event
            match kind:  # others are of a newer version, or for another service
                case "describe":
                    await self.send("info", **_info(self._service))
                case "ping":
                    await self.send("pong", **data)
                case "transcribe":
                    self._model = self._choose(data)
                    self._names = "\0".join(self._model.shortened(_names(data)))
                case "audio-start" | "audio-chunk":
                    with self._service.slot("wyoming") as slot:
                        await self._transcribe(slot, event)
                    return
                case "audio-stop":
                    raise RequestError("expected audio before 'audio-stop'")

    def _choose(self, data: dict[str, Any]) -> ServedModel:
        """Return the model that the client names, or else the first for the client's language, or else the default."""
        language = str(data.get("language") or "").partition("-")[0].lower()
        able = (model for model in self._service.models.values() if language in model.languages)
        return self._service.model(data["name"]) if data.get("name") else next(able, self._service.default)

    async def _transcribe(self, slot: Slot, first: _Event) -> None:
        """Serve one request, from the first audio event to the transcript."""
        self._patience = Patience.for_audio(slot, self._limits.idle_s)
        audio = _format_of(first[1])
        slot.model = self._model
        # not built earlier: only clients with a slot may use processor time for hotwords
        hotwords = await self._model.writable_hotwords(self._names.split("\0"))
        stream = slot.open_stream(audio[0], hotwords=hotwords)
        stream.must_be_whole = True
        await converse(self._read(stream, audio, first), self._write(stream))

    async def _read(self, stream: ServedStream, audio: tuple[int, int, int], first: _Event) -> None:
        event: _Event | None = first
        while event is not None:
            kind, data = event
            if kind == "audio-stop":
                stream.finish()
                return
            if kind == "audio-chunk":
                if _format_of(data) != audio:
                    raise RequestError("the format of the audio changed")
                length, self._num_unread = self._num_unread, 0
                payload = await self._wait_for(partial(self._reader.readexactly, length))
                await stream.feed(_read_samples(payload, *audio[1:]))
            event = await self._receive()
        raise ClientGoneError

    async def _write(self, stream: ServedStream) -> None:
        texts: list[str] = []
        async for result in stream:
            if not result.is_final:
                continue
            if not texts:
                await self.send("transcript-start")
            await self.send("transcript-chunk", text=added_text(texts, result.text))
            texts.append(result.text)
        if texts:
            await self.send("transcript-stop")
        await self.send("transcript", text=join_texts(texts))

    async def send(self, kind: str, /, **data: Any) -> None:
        """Send an event; raise the same errors as `send_within`."""
        body = json.dumps(data, ensure_ascii=False).encode()
        head = json.dumps({"type": kind, "version": "1.5.2", "data_length": len(body)}).encode()
        self._writer.write(head + b"\n" + body)
        await send_within(self._limits.send_s, self._writer.drain())

    async def _receive(self) -> _Event | None:
        """Skip the unread payload of the last event. Return the next event, or None at the end."""
        event = await self._wait_for(self._read_event)
        self._num_events += 1
        if self._num_events % _EVENTS_PER_TURN == 0:  # reading buffered data does not yield to other tasks
            await asyncio.sleep(0)
        return event

    async def _wait_for(self, read: Callable[[], Awaitable[_Value]]) -> _Value:
        try:
            return await self._patience.wait_for(read)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ClientGoneError from error

    async def _read_event(self) -> _Event | None:
        while self._num_unread:
            skipped = await self._reader.read(min(self._num_unread, LINE_BYTES))
            if not skipped:
                return None
            self._num_unread -= len(skipped)
        try:
            line = await self._reader.readline()
        except ValueError as error:
            raise TooLargeError(f"the line of an event may have at most {LINE_BYTES} bytes") from error
        if not line:
            return None
        head = parse_object(line, may_be_binary=True)
        kind, data = head.get("type"), head.get("data") or {}
        if not isinstance(kind, str) or not isinstance(data, dict):
            raise RequestError("an event needs a string as type and an object as data")
        if length := _length(head, "data_length", _DATA_BYTES):
            with self._service.room(length):
                data |= parse_object(await self._reader.readexactly(length), may_be_binary=True)
        self._num_unread = _length(head, "payload_length", self._limits.message_bytes)
        return kind, data


def _length(head: dict[str, Any], name: str, most: int) -> int:
    with refusing():
        length = checked_integer(name, head.get(name) or 0, least=0, most=1 << 62)
    if length > most:
        raise TooLargeError(f"{name} must be at most {most}, got {length}", name)
    return length


def _format_of(data: dict[str, Any]) -> tuple[int, int, int]:
    """Return the sample rate in Hz, the bytes of a sample, and the number of channels."""
    with refusing():
        rate, width, channels = (checked_integer(name, data.get(name), least=1) for name in _FORMAT)
    if width not in _SAMPLES:
        raise RequestError(f"samples must have 1, 2 or 4 bytes, got {width}", "width")
    return rate, width, channels


def _read_samples(payload: bytes, width: int, channels: int) -> npt.NDArray[Any]:
    """Return the samples of a payload, with all channels mixed down to one."""
    if len(payload) % (size := width * channels):
        raise RequestError(f"the length of the audio must be a multiple of {size} bytes, got {len(payload)}")
    samples = np.frombuffer(payload, _SAMPLES[width])
    if (width, channels) == (2, 1):
        return samples.astype(np.int16, copy=False)
    mixed: npt.NDArray[np.float32] = samples.reshape(-1, channels).mean(axis=1, dtype=np.float32)
    return mixed / np.float32(1 << (8 * width - 1))


def _names(data: dict[str, Any]) -> list[str]:
    """Return the phrases that the client sends as hotwords."""
    lists = [data.get(name) or [] for name in ("transcript_names", "transcript_terms")]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise RequestError("transcript_names and transcript_terms must be lists of phrases")
    return [name for names in lists for name in names]


def _info(service: Service) -> dict[str, Any]:
    attribution = {"name": "u2moe", "url": "https://github.com/rhasspy/wyoming"}
    named = {"attribution": attribution, "installed": True, "version": version("u2moe")}
    models = [
        {"name": name, "description": f"u2moe {name}", "languages": model.languages, **named}
        for name, model in service.models.items()
    ]
    program = {"name": "u2moe", "description": "U2++ speech recognition", **named}
    return {"asr": [{**program, "models": models, "supports_transcript_streaming": True}]}


PROTOCOL = Protocol(name="wyoming", run_tcp=serve_wyoming, may_have_port=True)
