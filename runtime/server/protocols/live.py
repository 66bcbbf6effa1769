"""Our own WebSocket protocol, `/stream`: options as JSON, audio as PCM, `{"type": "finish"}`; results as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt

from u2moe.runtime.options import DecodingOptions, EndpointConfig, EndpointRule
from u2moe.runtime.result import Result
from u2moe.runtime.server.connection import (
    Connection,
    checked_choice,
    converse,
    float32_samples,
    int16_samples,
    parse_object,
    plain_number,
)
from u2moe.runtime.server.errors import RequestError, refusing
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.protocol import Protocol
from u2moe.runtime.server.session import ServerSession
from u2moe.runtime.validation import MOST_INTEGER, checked_flag, checked_integer

Encoding = Literal["pcm_s16le", "pcm_f32le"]
_READ: dict[str, Callable[[bytes], npt.NDArray[Any]]] = {"pcm_s16le": int16_samples, "pcm_f32le": float32_samples}
_MAX_NBEST = 100
_LONGEST_CHUNK_S = 5.0
"""Seconds of the longest chunk, unless the server's is longer: others wait while it is encoded, in much memory."""
_LONGEST_SEGMENT_S = 60.0
"""Longest segment in seconds: its memory and the time of its second pass grow with the length."""


@dataclass(frozen=True, kw_only=True)
class StreamRequest:
    """The first message.

    Attributes:
        sample_rate: sample rate of the audio in Hz.
        encoding: encoding of the samples, which are little-endian.
        model: one of the server's; None: its first.
        chunk_size: encoder frames per chunk, not below the server's, 5 seconds at most; None: the server's.
        hotwords, written, beam_size, lm_weight: see `ServedModel.decoding`.
        endpoint: rules by which segments end, as in `EndpointConfig`; None: the server's.
        partials: whether to send partial results.
        words: whether final results include words.
        nbest: maximum number of alternatives in a final result.
    """

    sample_rate: float = 16_000.0
    encoding: Encoding = "pcm_s16le"
    model: str | None = None
    chunk_size: int | None = None
    hotwords: Any = None
    endpoint: EndpointConfig | None = None
    partials: bool = True
    words: bool = True
    nbest: int = 1
    written: Any = None
    beam_size: Any = None
    lm_weight: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.sample_rate, bool) or not isinstance(self.sample_rate, int | float):
            raise RequestError(f"sample_rate must be a number, got {self.sample_rate!r}", "sample_rate")
        checked_choice("encoding", self.encoding, _READ)
        for name, value, least, most in (
            ("chunk_size", 1 if self.chunk_size is None else self.chunk_size, 1, MOST_INTEGER),
            ("nbest", self.nbest, 0, _MAX_NBEST),
        ):
            with refusing(name):
                checked_integer(name, value, least=least, most=most)
        for name in ("partials", "words"):
            with refusing(name):
                checked_flag(name, getattr(self, name))

    @classmethod
    def parse(cls, message: str | bytes) -> StreamRequest:
        """Parse the request in a message; RequestError: it is invalid; names the field."""
        values = parse_object(message)
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - fields:
            raise RequestError(f"unknown option {min(unknown)!r}: there are {', '.join(sorted(fields))}", min(unknown))
        if values.get("endpoint") is not None:
            values["endpoint"] = _parse_endpoint(values["endpoint"])
        return cls(**values)

    def decoding(self, default: DecodingOptions, frame_s: float) -> DecodingOptions:
        """How to decode, with encoder frames of `frame_s` seconds.

        Raises:
            RequestError: a smaller chunk size than the server's capacity allows, or too large a one.
        """
        chunk_size = self.chunk_size or default.chunk_size
        if chunk_size is not None:
            least = default.chunk_size or 1
            most = max(int(_LONGEST_CHUNK_S / frame_s), least)
            if not least <= chunk_size <= most:
                raise RequestError(f"chunk_size must be between {least} and {most}, got {chunk_size}", "chunk_size")
        return dataclasses.replace(default, chunk_size=chunk_size, endpoint=self.endpoint or default.endpoint)


async def run(connection: Connection) -> None:
    """One source: its results until it is finished, then "done"."""
    request = StreamRequest.parse(await connection.receive())
    if request.model is not None:
        connection.place.model = connection.service.model(request.model)
    model = connection.place.model
    given = {name: getattr(request, name) for name in REQUEST_OPTIONS}
    default, hotwords = await model.decoding(model.stream_options, **given)
    decoding = request.decoding(default, model.recognizer.bundle.manifest.frame_s)
    session = await connection.place.open_session(request.sample_rate, decoding, hotwords)
    await connection.send({"type": "ready", "sample_rate": plain_number(request.sample_rate)})
    await converse(_read(connection, session, _READ[request.encoding]), _write(connection, session, request))
    await connection.send({"type": "done", "duration": round(session.duration, 3)})


async def _read(connection: Connection, session: ServerSession, samples: Callable[[bytes], npt.NDArray[Any]]) -> None:
    kind = parse_object(await connection.feed(session, samples)).get("type")
    if kind != "finish":
        raise RequestError(f"expected audio or the type 'finish', got the type {kind!r}")
    session.finish()


async def _write(connection: Connection, session: ServerSession, request: StreamRequest) -> None:
    async for result in session:
        if result.is_final or request.partials:
            await connection.send(_event(result, request))


def _event(result: Result, request: StreamRequest) -> dict[str, Any]:
    event = {"type": "final" if result.is_final else "partial", **dataclasses.asdict(result)}
    event["nbest"] = event["nbest"][: request.nbest]
    if not request.words:
        del event["words"]
    return event


def _parse_endpoint(value: Any) -> EndpointConfig:
    try:
        rules: dict[str, Any] = {name: None if rule is None else EndpointRule(**rule) for name, rule in value.items()}
        config = EndpointConfig(**rules)
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError(f"endpoint: {error}", "endpoint") from error
    if config.rule3 is None or config.rule3.min_utterance_length > _LONGEST_SEGMENT_S:
        raise RequestError(f"rule3 must end segments after {_LONGEST_SEGMENT_S:g} seconds at most", "endpoint")
    return config


def _tell_error(error: Exception) -> dict[str, Any]:
    parameter, code = getattr(error, "parameter", None), getattr(error, "close_code", 1008)
    return {"type": "error", "message": str(error), "code": code, "parameter": parameter}


PROTOCOL = Protocol(name="stream", path="/stream", run=run, tell_error=_tell_error, subprotocols=("u2moe",))
