"""u2moe's own WebSocket protocol, `/stream`: options as JSON, audio as PCM, then `{"type": "finish"}`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from u2moe.runtime.declarations import Checked, option, options_of
from u2moe.runtime.options import EndpointConfig, EndpointRule
from u2moe.runtime.server.connection import Connection, Protocol, converse, parse_object, plain_number, read_samples
from u2moe.runtime.server.errors import RequestError, refusing
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.scheduler import ServedStream
from u2moe.runtime.validation import checked_object

Encoding = Literal["pcm_s16le", "pcm_f32le"]
_KINDS = {"pcm_s16le": "<i2", "pcm_f32le": "<f4"}
_LONGEST_CHUNK_S = 5.0  # maximum length of a chunk, unless the server's are longer; others wait while it is encoded
_LONGEST_SEGMENT_S = 60.0  # longest segment; its length determines memory and the time of the second pass
_SEGMENT_S, _SILENCE_S = 1.0, 0.2  # shortest segment, silence after speech; one-frame segments take 12 times the work


@dataclass(frozen=True, kw_only=True)
class StreamRequest(Checked):
    """Options in the first message.

    Attributes:
        sample_rate: sample rate of the audio in Hz.
        encoding: encoding of the samples, which are little-endian.
        model: name of a model. None: the server's first.
        chunk_size: encoder frames per chunk, from the server's value up to 5 seconds of audio. None: the server's.
        endpoint: rules that end segments, as in `EndpointConfig`, after 1 s or, after speech, 0.2 s of silence at
            least. Below 0.5 s, words may be split. None: the server's.
        partials: whether to send partial results.
        words: whether final results include words.
        nbest: maximum number of alternatives in a final result.
        decoding: the request's values for options in `REQUEST_OPTIONS`, by name.
    """

    sample_rate: float = option("number", 16_000.0)
    encoding: Encoding = option("choice", "pcm_s16le", choices=tuple(_KINDS))
    model: str | None = option("text")
    chunk_size: int | None = option("integer", least=1)
    endpoint: EndpointConfig | None = option("record", record=EndpointConfig)
    partials: bool = option("flag", default=True)
    words: bool = option("flag", default=True)
    nbest: int = option("integer", 1, least=0, most=100)
    decoding: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    @refusing()
    def parse(cls, message: str | bytes) -> StreamRequest:
        """Parse the request in a message. Raises RequestError with the name of an invalid field."""
        values = _known(parse_object(message), OPTIONS)
        decoding = {name: values.pop(name) for name in REQUEST_OPTIONS if name in values}
        if values.get("endpoint") is not None:
            values["endpoint"] = _parse_endpoint(values["endpoint"])
        return cls(**values, decoding=decoding)


OPTIONS = {**options_of(StreamRequest), **REQUEST_OPTIONS}  # options of a request, by name


async def run(connection: Connection) -> None:
    """Serve one stream: send its results, then "done"."""
    request = StreamRequest.parse(await connection.receive())
    if request.model is not None:
        connection.slot.model = connection.service.model(request.model)
    model = connection.slot.model
    default, hotwords = await model.decoding(model.stream_options, request.decoding)
    chunk_size = request.chunk_size or default.chunk_size
    if chunk_size is not None:
        least = default.chunk_size or 1
        most = max(int(_LONGEST_CHUNK_S / model.recognizer.bundle.manifest.frame_s), least)
        if not least <= chunk_size <= most:
            raise RequestError(f"chunk_size must be between {least} and {most}, got {chunk_size}", "chunk_size")
    decoding = dataclasses.replace(default, chunk_size=chunk_size, endpoint=request.endpoint or default.endpoint)
    stream = connection.slot.open_stream(request.sample_rate, decoding, hotwords)
    await connection.send({"type": "ready", "sample_rate": plain_number(request.sample_rate)})
    await converse(_read(connection, stream, _KINDS[request.encoding]), _write(connection, stream, request))
    await connection.send({"type": "done", "duration": round(stream.duration, 3)})


async def _read(connection: Connection, stream: ServedStream, samples: str) -> None:
    kind = parse_object(await connection.feed(stream, partial(read_samples, samples))).get("type")
    if kind != "finish":
        raise RequestError(f"expected audio or a message of type 'finish', got type {kind!r}")
    stream.finish()


async def _write(connection: Connection, stream: ServedStream, request: StreamRequest) -> None:
    async for result in stream:
        if result.is_final or request.partials:
            event = {"type": "final" if result.is_final else "partial", **dataclasses.asdict(result)}
            event["nbest"] = event["nbest"][: request.nbest]
            if not request.words:
                del event["words"]
            await connection.send(event)


@refusing("endpoint")
def _parse_endpoint(value: Any) -> EndpointConfig:
    rules = _known(checked_object("endpoint", value), options_of(EndpointConfig))
    for name, rule in rules.items():
        rules[name] = EndpointRule(**_known(rule, options_of(EndpointRule))) if isinstance(rule, dict) else rule
    config = EndpointConfig(**rules)
    if config.rule3 is None or config.rule3.min_utterance_length > _LONGEST_SEGMENT_S:
        raise RequestError(f"rule3 must end segments after at most {_LONGEST_SEGMENT_S:g} seconds", "endpoint")
    for number, rule in config.rules:
        least_s = _SILENCE_S if rule.must_contain_nonsilence else _SEGMENT_S
        if rule.min_utterance_length < _SEGMENT_S and rule.min_trailing_silence < least_s:
            raise ValueError(f"rule{number} must wait {_SEGMENT_S:g} s or, after speech, {_SILENCE_S:g} s of silence")
    return config


def _known(values: dict[str, Any], options: Mapping[str, object]) -> dict[str, Any]:
    if unknown := values.keys() - options.keys():
        raise RequestError(f"unknown option {min(unknown)!r:.80}: must be one of {', '.join(options)}", min(unknown))
    return values


def _tell_error(error: Exception) -> dict[str, Any]:
    parameter, code = getattr(error, "parameter", None), getattr(error, "close_code", 1008)
    return {"type": "error", "message": str(error), "code": code, "parameter": parameter}


PROTOCOL = Protocol(name="stream", path="/stream", run=run, tell_error=_tell_error, subprotocols=("u2moe",))
