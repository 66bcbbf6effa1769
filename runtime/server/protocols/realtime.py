"""OpenAI's realtime transcription over WebSocket, `/v1/realtime`: JSON events with audio in base64.

Words cannot be retracted once they are sent in a delta, so deltas contain only committed words. The second pass may
still revise these; only the `completed` event has the final transcript.
"""

import asyncio
import base64
import dataclasses
import io
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.errors import AudioError
from u2moe.runtime.options import EndpointConfig, EndpointRule
from u2moe.runtime.server.connection import Connection, Protocol, converse, int16_samples, parse_object, plain_number
from u2moe.runtime.server.errors import RequestError, in_openai_form, refusing
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.scheduler import ServedStream
from u2moe.runtime.text.vocabulary import join_texts
from u2moe.runtime.validation import checked_choice, checked_number, checked_object

_SAMPLE_RATE = 24_000
_FORMATS = {"audio/pcm": "", "audio/pcmu": "ULAW", "audio/pcma": "ALAW"}
"""Audio formats of the protocol, and soundfile's names for their encodings. G.711 has a sample rate of 8 kHz."""
_OLDER_FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
_TELEPHONE_RATE = 8000
_LEAST_SILENCE_MS = 500  # minimum silence that ends an item; shorter silences also occur within words
_TRANSCRIPTION = "conversation.item.input_audio_transcription"
_EMPTY = "input_audio_buffer_commit_empty"

_Settings = dict[str, Any]
"""Settings of the client as in the protocol, which can change between items: `format` (type and, for PCM, rate),
`noise_reduction` (None), `transcription` (model and its options, as in `ServedModel.decoding`) and `turn_detection`
(silence that ends an item; None: the client's commits end items)."""


@dataclasses.dataclass(kw_only=True)
class _Source:
    """Stream of audio up to the client's next commit."""

    session: ServedStream
    settings: _Settings  # settings at the start of the audio
    begin_s: float  # seconds of audio in earlier sources
    needs_answer: bool = False  # whether the client has committed, and no item has been completed since


@dataclasses.dataclass(kw_only=True)
class _Item:
    """A conversation item that is not completed yet."""

    id: str = dataclasses.field(default_factory=lambda: _new_id("item"))
    sent: str = ""  # text of its deltas


async def run(connection: Connection) -> None:
    """Transcribe each item of speech until the client closes the connection."""
    conversation = _Conversation(connection)
    await conversation.send("session.created", session=conversation.description())
    await converse(conversation.read(), conversation.write())


class _Conversation:
    """State of a connection: its settings and the current source of audio."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._id = _new_id("sess")
        self._settings: _Settings = {
            "format": _read_format({"type": "audio/pcm"}),
            "noise_reduction": None,
            "transcription": {"model": connection.slot.model.name, "prompt": ""},
            "turn_detection": _read_detection({"type": "server_vad"}),
        }
        self._decoding = connection.slot.model.stream_options
        self._hotwords: ContextGraph | None = None
        self._source: _Source | None = None
        self._sources: asyncio.Queue[_Source] = asyncio.Queue()
        self._last_item: str | None = None

    async def send(self, kind: str, **values: Any) -> None:
        """Send an event."""
        await self._connection.send({"type": kind, "event_id": _new_id("event"), **values})

    def description(self) -> dict[str, Any]:
        """Return the description of the session for the client."""
        kind = {"object": "realtime.transcription_session", "type": "transcription"}
        return {"id": self._id, **kind, "audio": {"input": self._settings}}

    async def read(self) -> None:
        """Handle the client's events. The answer to an invalid event is an error; the connection stays open."""
        while True:
            message = await self._connection.receive()
            event: dict[str, Any] = {}
            try:
                await self._handle(event := parse_object(message))
            except (RequestError, AudioError) as error:
                if getattr(error, "status", 400) != 400:  # the stream is too long, or the server is full, for example
                    raise
                name = sent if isinstance(sent := event.get("event_id"), str) else None  # deep lists cannot be sent
                await self.send("error", error={**in_openai_form(error), "event_id": name})

    async def _handle(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "input_audio_buffer.append":
                await self._append(event.get("audio"))
            case "input_audio_buffer.commit":
                if (source := self._source) is None or source.session.duration == 0:
                    raise RequestError("the audio buffer is empty: there is nothing to commit", code=_EMPTY)
                source.needs_answer = True
                await self._end(source)
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
            raise RequestError("audio must be a base64 string", "audio")
        try:
            data = base64.b64decode(audio, validate=True)
        except ValueError as error:
            raise RequestError(f"audio is not valid base64: {error}", "audio") from error
        if (source := self._source) is not None and source.settings != self._settings:
            is_within_turn = source.settings["turn_detection"] is None or source.session.partial_text
            if not is_within_turn:
                await self._end(source)
        source = self._source or self._open()
        await source.session.feed(_read_audio(data, source.settings["format"]))

    def _open(self) -> _Source:
        slot, decoding, settings = self._connection.slot, self._decoding, self._settings
        begin_s, detection = slot.fed_s, settings["turn_detection"]
        if detection is not None and (silence_ms := detection["silence_duration_ms"]):
            rule = EndpointRule(must_contain_nonsilence=True, min_trailing_silence=silence_ms / 1000)
            endpoint = dataclasses.replace(decoding.endpoint or EndpointConfig(), rule2=rule)
            decoding = dataclasses.replace(decoding, endpoint=endpoint)
        rate = float(settings["format"].get("rate", _TELEPHONE_RATE))
        session = slot.open_stream(rate, decoding, self._hotwords)
        session.must_be_whole = detection is None
        self._source = _Source(session=session, settings=settings, begin_s=begin_s)
        self._sources.put_nowait(self._source)
        return self._source

    async def _end(self, source: _Source) -> None:
        """End a source, and wait until all its audio is recognised."""
        self._source = None
        source.session.finish()
        await source.session.settle()

    async def _update(self, session: Any) -> None:
        """Change the settings for later audio. During an item, a change takes effect only when the item ends."""
        settings = _read_settings(session, self._settings)
        if self._source is not None and settings["format"] != self._settings["format"]:
            raise RequestError("the format cannot change while audio is in the buffer: commit or clear it first")
        asked = settings["transcription"]
        model = self._connection.service.model(asked["model"])
        model.check_language(asked.get("language"))
        self._decoding, self._hotwords = await model.decoding(model.stream_options, asked, prompt=asked["prompt"])
        self._settings = {**settings, "transcription": {**asked, "model": model.name}}
        self._connection.slot.model = model

    async def write(self) -> None:
        """Send the results of each source until the server stops."""
        while True:
            source = await self._sources.get()
            await (self._write_item if source.settings["turn_detection"] is None else self._write_turns)(source)
            if self._connection.slot.is_drained:
                return

    async def _write_turns(self, source: _Source) -> None:
        item: _Item | None = None
        async for result in source.session:
            if item is None and result.text:
                item = _Item()
                start_s = source.begin_s + (result.start if result.is_final else min(result.times, default=0.0))
                started = "input_audio_buffer.speech_started"
                await self.send(started, audio_start_ms=round(start_s * 1000), item_id=item.id)
            if item is None:
                continue
            if result.is_final:
                stopped, end_s = "input_audio_buffer.speech_stopped", source.begin_s + result.end
                await self.send(stopped, audio_end_ms=round(end_s * 1000), item_id=item.id)
                await self._complete(item, result.text, result.end - result.start)
                source.needs_answer = False
                item = None
            else:
                await self._append_to(item, result.committed)
        if source.needs_answer:  # even without words
            await self._complete(_Item(), "", 0.0)

    async def _write_item(self, source: _Source) -> None:
        item, texts, session = _Item(), [""], source.session
        async for result in session:
            texts[-1] = result.committed
            await self._append_to(item, join_texts([text for text in texts if text]))
            if result.is_final:
                texts.append("")
        if not session.is_closed:
            await self._complete(item, join_texts([text for text in texts if text]), session.duration)

    async def _append_to(self, item: _Item, text: str) -> None:
        """Send the rest of `text` as a delta if `text` begins with the item's earlier deltas."""
        delta = text.removeprefix(item.sent)
        if delta and text.startswith(item.sent):
            await self.send(f"{_TRANSCRIPTION}.delta", item_id=item.id, content_index=0, delta=delta)
            item.sent = text

    async def _complete(self, item: _Item, text: str, seconds: float) -> None:
        await self.send("input_audio_buffer.committed", item_id=item.id, previous_item_id=self._last_item)
        content = [{"type": "input_audio", "transcript": None}]
        added = {"id": item.id, "type": "message", "status": "completed", "role": "user", "content": content}
        await self.send("conversation.item.added", item=added, previous_item_id=self._last_item)
        await self.send("conversation.item.done", item=added, previous_item_id=self._last_item)
        self._last_item = item.id
        await self._append_to(item, text)
        usage = {"type": "duration", "seconds": round(seconds, 3)}
        await self.send(f"{_TRANSCRIPTION}.completed", item_id=item.id, content_index=0, transcript=text, usage=usage)


@refusing()
def _read_settings(value: Any, before: _Settings) -> _Settings:
    """Read a session's settings in the current or the older form. Omitted settings keep their values from `before`."""
    session = checked_object("session", value)
    if session.get("type", "transcription") != "transcription":
        raise RequestError(f"the type of a session must be 'transcription', got {session['type']!r}", "session.type")
    changes: dict[str, Any] = {}
    audio = checked_object("session.audio", session.get("audio", {}))
    given = checked_object("session.audio.input", audio.get("input", {}))
    audio_format = given.get("format", session.get("input_audio_format"))
    if audio_format is not None:
        changes["format"] = _read_format(audio_format)
    transcription = given.get("transcription", session.get("input_audio_transcription"))
    if transcription is not None:
        given_here = checked_object("transcription", transcription)
        names = {"model", "language", "prompt", *REQUEST_OPTIONS} & given_here.keys()
        changes["transcription"] = {**before["transcription"], **{name: given_here[name] for name in names}}
        changes["transcription"]["prompt"] = str(changes["transcription"]["prompt"] or "")
    for place in (session, given):
        if "turn_detection" in place:
            changes["turn_detection"] = _read_detection(place["turn_detection"])
    return {**before, **changes}


def _read_audio(data: bytes, audio_format: Mapping[str, Any]) -> npt.NDArray[np.int16]:
    if not (subtype := _FORMATS[audio_format["type"]]):
        return int16_samples(data)
    settings = {"dtype": "int16", "format": "RAW", "subtype": subtype, "channels": 1, "samplerate": _TELEPHONE_RATE}
    samples: npt.NDArray[np.int16] = soundfile.read(io.BytesIO(data), **settings)[0]
    return samples


def _read_format(value: Any) -> dict[str, Any]:
    """Read an audio format in the current or the older form."""
    if isinstance(value, str):
        checked_choice("format", value, _OLDER_FORMATS)
        value = {"type": _OLDER_FORMATS[value]}
    audio_format = checked_object("format", value)
    kind = checked_choice("format.type", audio_format.get("type"), _FORMATS)
    if kind != "audio/pcm":
        return {"type": kind}
    rate = checked_number("format.rate", audio_format.get("rate", _SAMPLE_RATE), least=8000, most=96_000)
    return {"type": kind, "rate": plain_number(rate)}


def _read_detection(value: Any) -> dict[str, Any] | None:
    """Read the settings of turn detection. None: turns are not detected."""
    if value is None:
        return None
    detection = checked_object("turn_detection", value)
    checked_choice("turn_detection.type", detection.get("type"), ("server_vad", "semantic_vad"))
    silence_ms = detection.get("silence_duration_ms")
    if silence_ms is not None:
        checked = checked_number("turn_detection.silence_duration_ms", silence_ms, least=100, most=10_000)
        silence_ms = max(round(checked), _LEAST_SILENCE_MS)
    return {"type": "server_vad", "silence_duration_ms": silence_ms}


def _tell_error(error: Exception) -> dict[str, Any]:
    return {"type": "error", "event_id": _new_id("event"), "error": {**in_openai_form(error), "event_id": None}}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex[:20]}"


PROTOCOL = Protocol(name="realtime", path="/v1/realtime", run=run, tell_error=_tell_error, subprotocols=("realtime",))
