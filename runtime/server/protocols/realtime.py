"""OpenAI's realtime transcription over WebSocket: JSON events with audio in base64, on `/v1/realtime`.

Deltas cannot retract words, so they are sent with the final result, as with whisper-1.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import io
import uuid
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.errors import AudioError
from u2moe.runtime.options import EndpointConfig, EndpointRule
from u2moe.runtime.result import Result
from u2moe.runtime.server.connection import (
    Connection,
    checked_object,
    converse,
    int16_samples,
    parse_object,
    plain_number,
)
from u2moe.runtime.server.errors import (
    IdleError,
    RequestError,
    TooLargeError,
    UnavailableError,
    in_openai_form,
    refusing,
)
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.protocol import Protocol
from u2moe.runtime.server.session import ServerSession
from u2moe.runtime.text.vocabulary import join_texts
from u2moe.runtime.validation import checked_number

_SAMPLE_RATE = 24_000
_FORMATS = {"audio/pcm": "", "audio/pcmu": "ULAW", "audio/pcma": "ALAW"}
"""Audio formats and soundfile's names of their encodings; G.711 has 8 kHz."""
_OLDER_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_TELEPHONE_RATE = 8000
_LEAST_SILENCE_S = 0.5
"""Shorter ones are also found within words."""
_EMPTY = "input_audio_buffer_commit_empty"
_FATAL = (IdleError, TooLargeError, UnavailableError)
_DETECTIONS = ("server_vad", "semantic_vad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    """Settings of the client, which can change between two items."""

    audio: str = "audio/pcm"  # of `_FORMATS`
    sample_rate: float = _SAMPLE_RATE
    detects_turns: bool = True  # whether the server detects the ends of items; else the client commits them
    silence_s: float | None = None  # that ends an item; None: the server's
    transcription: dict[str, Any]  # the model and what is asked of it, as in `ServedModel.decoding`

    def samples(self, data: bytes) -> npt.NDArray[np.int16]:
        """The samples in a piece of audio."""
        if self.audio == "audio/pcm":
            return int16_samples(data)
        subtype, rate = _FORMATS[self.audio], _TELEPHONE_RATE
        samples: npt.NDArray[np.int16]
        samples, _ = soundfile.read(
            io.BytesIO(data), dtype="int16", format="RAW", subtype=subtype, channels=1, samplerate=rate
        )
        return samples

    def description(self) -> dict[str, Any]:
        """The format for the client."""
        rate = {"rate": plain_number(self.sample_rate)} if self.audio == "audio/pcm" else {}
        return {"type": self.audio, **rate}


@dataclasses.dataclass(kw_only=True)
class _Source:
    """Audio between two commits, or from the first on."""

    session: ServerSession
    config: _Config  # that it was opened with
    begin_s: float  # seconds of audio before it
    num_items: int = 0  # that are completed
    num_before_commit: int | None = None  # completed when the client committed it; None: it did not

    @property
    def is_between_turns(self) -> bool:
        """Whether the server detects turns, and knows of none that has begun."""
        return self.config.detects_turns and not self.session.partial_text


async def run(connection: Connection) -> None:
    """Items of speech, each with its transcript, until the client closes the connection."""
    conversation = _Conversation(connection)
    await conversation.send("session.created", session=conversation.description())
    await converse(conversation.read(), conversation.write())


class _Conversation:
    """The state of one connection: its settings and the current item."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._id = _new_id("sess")
        self._config = _Config(transcription={"model": connection.place.model.name, "prompt": ""})
        self._decoding = connection.place.model.stream_options
        self._hotwords: ContextGraph | None = None
        self._source: _Source | None = None
        self._sources: asyncio.Queue[_Source] = asyncio.Queue()
        self._last_item: str | None = None

    async def send(self, kind: str, **values: Any) -> None:
        """Send an event."""
        await self._connection.send({"type": kind, "event_id": _new_id("event"), **values})

    def description(self) -> dict[str, Any]:
        """The description of the session for the client."""
        detection: dict[str, Any] | None = None
        if self._config.detects_turns:
            silence_s = self._config.silence_s
            silence_ms = None if silence_s is None else round(silence_s * 1000)
            detection = {"type": "server_vad", "silence_duration_ms": silence_ms}
        return {
            "id": self._id,
            "object": "realtime.transcription_session",
            "type": "transcription",
            "audio": {
                "input": {
                    "format": self._config.description(),
                    "noise_reduction": None,
                    "transcription": self._config.transcription,
                    "turn_detection": detection,
                }
            },
        }

    async def read(self) -> None:
        """Handle the client's events; invalid ones are answered with an error, and the connection continues."""
        while True:
            message = await self._connection.receive()
            event: dict[str, Any] = {}
            try:
                event = parse_object(message)
                await self._handle(event)
            except _FATAL:
                raise
            except (RequestError, AudioError) as error:
                await self.send("error", error={**in_openai_form(error), "event_id": event.get("event_id")})

    async def _handle(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "input_audio_buffer.append":
                await self._append(event.get("audio"))
            case "input_audio_buffer.commit":
                await self._commit()
            case "input_audio_buffer.clear":
                if self._source is not None:
                    self._source.session.close()
                    self._source = None
                await self.send("input_audio_buffer.cleared")
            case "session.update" | "transcription_session.update" as kind:
                await self._update(event.get("session"))
                await self.send(f"{kind}d", session=self.description())
            case kind:
                raise RequestError(f"unknown event type {kind!r}", "type")

    async def _append(self, audio: Any) -> None:
        if not isinstance(audio, str):
            raise RequestError("audio must be a string of base64", "audio")
        try:
            data = base64.b64decode(audio, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"audio is no base64: {error}", "audio") from error
        if self._source is not None and self._source.config != self._config and self._source.is_between_turns:
            await self._end(self._source)
        source = self._source or await self._open()
        await source.session.feed(source.config.samples(data))

    async def _open(self) -> _Source:
        place, decoding = self._connection.place, self._decoding
        begin_s = place.fed_s
        if (silence_s := self._config.silence_s) is not None:
            rule = EndpointRule(must_contain_nonsilence=True, min_trailing_silence=silence_s)
            endpoint = dataclasses.replace(decoding.endpoint or EndpointConfig(), rule2=rule)
            decoding = dataclasses.replace(decoding, endpoint=endpoint)
        whole = not self._config.detects_turns
        session = await place.open_session(self._config.sample_rate, decoding, self._hotwords, is_whole=whole)
        self._source = _Source(session=session, config=self._config, begin_s=begin_s)
        self._sources.put_nowait(self._source)
        return self._source

    async def _end(self, source: _Source) -> None:
        """End a source whose audio is whole; all of it is recognised before the next is opened."""
        self._source = None
        source.session.finish()
        await source.session.settle()

    async def _commit(self) -> None:
        source = self._source
        if source is None or source.session.duration == 0:
            raise RequestError("the audio buffer is empty: there is nothing to commit", code=_EMPTY)
        source.num_before_commit = source.num_items
        await self._end(source)

    async def _update(self, settings: Any) -> None:
        """Change the settings: of the next item, or of the present one where it has not begun."""
        config = _read_settings(settings, self._config)
        if self._source is not None and config.description() != self._config.description():
            raise RequestError("the format can change while no audio is in the buffer: commit or clear it first")
        asked = config.transcription
        model = self._connection.service.model(asked["model"])
        model.check_language(asked.get("language"))
        options = {name: asked.get(name) for name in REQUEST_OPTIONS}
        decoding, hotwords = await model.decoding(model.stream_options, prompt=asked["prompt"], **options)
        config = dataclasses.replace(config, transcription={**asked, "model": model.name})
        self._config, self._decoding, self._hotwords = config, decoding, hotwords
        self._connection.place.model = model

    async def write(self) -> None:
        """Send the results of each source, until one ends because the server stops."""
        while True:
            source = await self._sources.get()
            if source.config.detects_turns:
                await self._write_turns(source)
            else:
                await self._write_item(source.session)
            if self._connection.place.is_drained:
                return

    async def _write_turns(self, source: _Source) -> None:
        item = ""
        async for result in source.session:
            if not item and result.text:
                item = _new_id("item")
                start_s = source.begin_s + (result.start if result.is_final else min(result.times, default=0.0))
                started = "input_audio_buffer.speech_started"
                await self.send(started, audio_start_ms=round(start_s * 1000), item_id=item)
            if result.is_final and item:
                stopped, end_s = "input_audio_buffer.speech_stopped", source.begin_s + result.end
                await self.send(stopped, audio_end_ms=round(end_s * 1000), item_id=item)
                await self._complete(item, [result], result.end - result.start)
                source.num_items += 1
                item = ""
        if source.num_before_commit == source.num_items:  # the client waits for an answer, but there were no words
            await self._complete(_new_id("item"), [], 0.0)

    async def _write_item(self, session: ServerSession) -> None:
        results = [result async for result in session if result.is_final]
        if not session.inbox.is_closed:
            await self._complete(_new_id("item"), results, session.duration)

    async def _complete(self, item: str, results: list[Result], seconds: float) -> None:
        text = join_texts([result.text for result in results])
        await self.send("input_audio_buffer.committed", item_id=item, previous_item_id=self._last_item)
        content = [{"type": "input_audio", "transcript": None}]
        added = {"id": item, "type": "message", "status": "completed", "role": "user", "content": content}
        await self.send("conversation.item.added", item=added, previous_item_id=self._last_item)
        await self.send("conversation.item.done", item=added, previous_item_id=self._last_item)
        self._last_item = item
        kind, place = "conversation.item.input_audio_transcription", {"item_id": item, "content_index": 0}
        if text:
            await self.send(f"{kind}.delta", **place, delta=text)
        usage = {"type": "duration", "seconds": round(seconds, 3)}
        await self.send(f"{kind}.completed", **place, transcript=text, usage=usage)


def _read_settings(settings: Any, before: _Config) -> _Config:
    """Read the settings of a session, in the present form or the older one."""
    session = checked_object("session", settings)
    if session.get("type", "transcription") != "transcription":
        raise RequestError(f"the type of a session must be 'transcription', got {session['type']!r}", "session.type")
    changes: dict[str, Any] = {}
    audio = checked_object("session.audio", session.get("audio", {}))
    given = checked_object("session.audio.input", audio.get("input", {}))
    audio_format = given.get("format", session.get("input_audio_format"))
    if audio_format is not None:
        changes["audio"], changes["sample_rate"] = _read_format(audio_format)
    transcription = given.get("transcription", session.get("input_audio_transcription"))
    if transcription is not None:
        given_here = checked_object("transcription", transcription)
        names = {"model", "language", "prompt", *REQUEST_OPTIONS} & given_here.keys()
        changes["transcription"] = {**before.transcription, **{name: given_here[name] for name in names}}
        changes["transcription"]["prompt"] = str(changes["transcription"]["prompt"] or "")
    detection = next((place["turn_detection"] for place in (given, session) if "turn_detection" in place), ...)
    if detection is not ...:
        changes["detects_turns"], changes["silence_s"] = _read_detection(detection)
    return dataclasses.replace(before, **changes)


def _read_format(value: Any) -> tuple[str, float]:
    """A format in the present form or the older one, and its sample rate."""
    if isinstance(value, str):
        _check_choice("format", value, _OLDER_FORMATS)
        value = {"type": _OLDER_FORMATS[value]}
    audio_format = checked_object("format", value)
    kind = _check_choice("format.type", audio_format.get("type"), _FORMATS)
    if kind != "audio/pcm":
        return kind, _TELEPHONE_RATE
    with refusing("format.rate"):
        return kind, checked_number("rate", audio_format.get("rate", _SAMPLE_RATE), least=8000, most=96_000)


def _read_detection(value: Any) -> tuple[bool, float | None]:
    """Whether turns are detected, and the seconds of silence that end one, if the client says so."""
    if value is None:
        return False, None
    detection = checked_object("turn_detection", value)
    _check_choice("turn_detection.type", detection.get("type"), _DETECTIONS)
    silence_ms = detection.get("silence_duration_ms")
    if silence_ms is None:
        return True, None
    with refusing("turn_detection.silence_duration_ms"):
        silence_ms = checked_number("silence_duration_ms", silence_ms, least=100, most=10_000)
    return True, max(silence_ms / 1000, _LEAST_SILENCE_S)


def _check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}", name)
    return value


def _tell_error(error: Exception) -> dict[str, Any]:
    return {"type": "error", "event_id": _new_id("event"), "error": {**in_openai_form(error), "event_id": None}}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:20]}"


PROTOCOL = Protocol(name="realtime", path="/v1/realtime", run=run, tell_error=_tell_error, subprotocols=("realtime",))
