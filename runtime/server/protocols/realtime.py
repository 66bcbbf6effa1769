"""OpenAI's realtime transcription over WebSocket: JSON events with audio in base64, on `/v1/realtime`.

Deltas cannot retract words, so they are sent with the final result, as with whisper-1.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import json
import uuid
from typing import TYPE_CHECKING, Any

from u2moe.runtime.endpoint import EndpointConfig, EndpointRule
from u2moe.runtime.errors import AudioError
from u2moe.runtime.server.connection import Connection, Protocol, converse, int16_samples, parse_object
from u2moe.runtime.server.errors import IdleError, RequestError, TooLargeError, UnavailableError
from u2moe.runtime.server.texts import phrases_of
from u2moe.runtime.text import join_texts

if TYPE_CHECKING:
    from u2moe.runtime.context import ContextGraph
    from u2moe.runtime.result import Result
    from u2moe.runtime.server.session import Session

_SAMPLE_RATE = 24_000
_FATAL = (IdleError, TooLargeError, UnavailableError)
_DETECTIONS = ("server_vad", "semantic_vad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config:
    """Settings of the client, which can change between two items.

    Attributes:
        sample_rate: sample rate of the audio in Hz.
        detects_turns: whether the server detects the ends of items; else the client commits them.
        silence_s: seconds of silence that end an item; None: the server's.
        prompt: hotwords.
    """

    sample_rate: float = _SAMPLE_RATE
    detects_turns: bool = True
    silence_s: float | None = None
    prompt: str = ""


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
        self._config = _Config()
        self._hotwords: ContextGraph | None = None
        self._session: Session | None = None
        self._sessions: asyncio.Queue[tuple[Session, _Config]] = asyncio.Queue()
        self._last_item: str | None = None

    async def send(self, kind: str, **values: Any) -> None:
        """Send an event."""
        await self._connection.send({"type": kind, "event_id": _new_id("event"), **values})

    def description(self) -> dict[str, Any]:
        """The description of the session for the client."""
        detection: dict[str, Any] | None = None
        if self._config.detects_turns:
            silence_s = self._config.silence_s
            detection = {"type": "server_vad", "silence_duration_ms": None if silence_s is None else silence_s * 1000}
        return {
            "id": self._id,
            "object": "realtime.transcription_session",
            "type": "transcription",
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": self._config.sample_rate},
                    "noise_reduction": None,
                    "transcription": {"model": "u2moe", "prompt": self._config.prompt},
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
                await self.send("error", error=_error(error, event.get("event_id")))

    async def _handle(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "input_audio_buffer.append":
                await self._append(event.get("audio"))
            case "input_audio_buffer.commit":
                await self._commit()
            case "input_audio_buffer.clear":
                if self._session is not None:
                    self._session.close()
                    self._session = None
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
        samples = int16_samples(data)
        if self._session is None:
            self._session = await self._open()
        await self._session.feed(samples)

    async def _open(self) -> Session:
        service = self._connection.service
        decoding = service.stream_options
        if self._config.silence_s is not None:
            endpoint = decoding.endpoint or EndpointConfig()
            rule = EndpointRule(must_contain_nonsilence=True, min_trailing_silence=self._config.silence_s)
            decoding = dataclasses.replace(decoding, endpoint=dataclasses.replace(endpoint, rule2=rule))
        session = await self._connection.place.open_session(self._config.sample_rate, decoding, self._hotwords)
        self._sessions.put_nowait((session, self._config))
        return session

    async def _commit(self) -> None:
        if self._session is None or self._session.duration == 0:
            raise RequestError("the audio buffer is empty: there is nothing to commit")
        session, self._session = self._session, None
        session.finish()
        await session.settle()

    async def _update(self, settings: Any) -> None:
        if self._session is not None:
            raise RequestError("the session can be updated while no audio is in the buffer: commit or clear it first")
        config = _read_settings(settings, self._config)
        if config.prompt != self._config.prompt:
            self._hotwords = await self._connection.service.writable_hotwords(phrases_of(config.prompt))
        self._config = config

    async def write(self) -> None:
        """Send the results of each source, until one ends because the server stops."""
        while True:
            session, config = await self._sessions.get()
            if config.detects_turns:
                await self._write_turns(session)
            else:
                await self._write_item(session)
            if session.inbox.is_draining:
                return

    async def _write_turns(self, session: Session) -> None:
        item = ""
        async for result in session:
            if not item and result.text:
                item = _new_id("item")
                start = result.start if result.is_final else min(result.times, default=0.0)
                started = "input_audio_buffer.speech_started"
                await self.send(started, audio_start_ms=round(start * 1000), item_id=item)
            if result.is_final and item:
                stopped = "input_audio_buffer.speech_stopped"
                await self.send(stopped, audio_end_ms=round(result.end * 1000), item_id=item)
                await self._complete(item, [result], result.end - result.start)
                item = ""

    async def _write_item(self, session: Session) -> None:
        results = [result async for result in session if result.is_final]
        if not session.inbox.is_closed:
            await self._complete(_new_id("item"), results, session.duration)

    async def _complete(self, item: str, results: list[Result], seconds: float) -> None:
        text = join_texts([result.text for result in results])
        await self.send("input_audio_buffer.committed", item_id=item, previous_item_id=self._last_item)
        content = [{"type": "input_audio", "transcript": None}]
        added = {"id": item, "type": "message", "status": "completed", "role": "user", "content": content}
        await self.send("conversation.item.added", item=added, previous_item_id=self._last_item)
        self._last_item = item
        kind, place = "conversation.item.input_audio_transcription", {"item_id": item, "content_index": 0}
        if text:
            await self.send(f"{kind}.delta", **place, delta=text)
        usage = {"type": "duration", "seconds": round(seconds, 3)}
        await self.send(f"{kind}.completed", **place, transcript=text, usage=usage)


def _read_settings(settings: Any, before: _Config) -> _Config:
    """Read the settings of a session, in the present form or the older one."""
    session = _object(settings, "session")
    if session.get("type", "transcription") != "transcription":
        raise RequestError(f"the type of a session must be 'transcription', got {session['type']!r}", "session.type")
    changes: dict[str, Any] = {}
    given = _object(_object(session.get("audio", {}), "session.audio").get("input", {}), "session.audio.input")
    audio_format = given.get("format", session.get("input_audio_format"))
    if audio_format is not None:
        changes["sample_rate"] = _read_format(audio_format)
    transcription = given.get("transcription", session.get("input_audio_transcription"))
    if transcription is not None:
        changes["prompt"] = str(_object(transcription, "transcription").get("prompt") or "")
    for place in (given, session):
        if "turn_detection" in place:
            changes |= _read_detection(place["turn_detection"])
            break
    return dataclasses.replace(before, **changes)


def _read_format(value: Any) -> float:
    if value == "pcm16":
        return _SAMPLE_RATE
    audio_format = _object(value, "format")
    if audio_format.get("type") != "audio/pcm":
        raise RequestError(f"the format must be 'audio/pcm', got {audio_format.get('type')!r}", "format.type")
    rate = audio_format.get("rate", _SAMPLE_RATE)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 8000 <= rate <= 96_000:
        raise RequestError(f"the rate must be a number between 8000 and 96000, got {rate!r}", "format.rate")
    return float(rate)


def _read_detection(value: Any) -> dict[str, Any]:
    if value is None:
        return {"detects_turns": False, "silence_s": None}
    detection = _object(value, "turn_detection")
    if detection.get("type") not in _DETECTIONS:
        raise RequestError(f"the type must be one of {', '.join(_DETECTIONS)}", "turn_detection.type")
    silence_ms = detection.get("silence_duration_ms")
    if silence_ms is None:
        return {"detects_turns": True, "silence_s": None}
    if isinstance(silence_ms, bool) or not isinstance(silence_ms, int | float) or not 100 <= silence_ms <= 10_000:
        raise RequestError("silence_duration_ms must be between 100 and 10000", "turn_detection.silence_duration_ms")
    return {"detects_turns": True, "silence_s": silence_ms / 1000}


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be an object, got {type(value).__name__}", name)
    return value


def _error(error: Exception, event_id: Any = None) -> dict[str, Any]:
    server = not isinstance(error, RequestError | AudioError) or isinstance(error, UnavailableError)
    return {
        "type": "server_error" if server else "invalid_request_error",
        "code": None,
        "message": str(error),
        "param": getattr(error, "parameter", None),
        "event_id": event_id,
    }


def _tell_error(error: Exception) -> str:
    event = {"type": "error", "event_id": _new_id("event"), "error": _error(error)}
    return json.dumps(event, ensure_ascii=False)


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:20]}"


PROTOCOL = Protocol(name="realtime", run=run, tell_error=_tell_error, subprotocols=("realtime",))
