"""OpenAI's REST API for transcriptions and for listing the server's models."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from u2moe.runtime.errors import AudioError, U2moeError
from u2moe.runtime.recognition import transcript_of
from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.server.access import KEY
from u2moe.runtime.server.accounts import CLIENT
from u2moe.runtime.server.connection import Patience, Protocol, added_text, converse, parse_object
from u2moe.runtime.server.errors import RequestError, StorageError, error_response, in_openai_form, refusing
from u2moe.runtime.server.files import FileTask
from u2moe.runtime.server.models import REQUEST_OPTIONS, ServedModel
from u2moe.runtime.server.options import Limits
from u2moe.runtime.server.service import Service
from u2moe.runtime.server.transport import LEAST_BYTES_PER_S
from u2moe.runtime.text.formats import FORMATS, format_transcript
from u2moe.runtime.text.vocabulary import join_texts
from u2moe.runtime.validation import checked_choice, checked_number

RESPONSE_FORMATS = {
    "json": "application/json",
    "text": "text/plain",
    "verbose_json": "application/json",
    **{name: each.media_type for name, each in FORMATS.items() if name not in ("txt", "json")},
}
"""Media types of OpenAI's and u2moe's response formats, by format."""
_GRANULARITY, _GRANULARITIES = "timestamp_granularities", ("segment", "word")
_LEAST_CONFIDENCE = 1e-6
_SILENCE_S = 15.0  # after so long without data, a space or an event is sent: proxies time out after 30 or 60 seconds
_PROGRESS_S = 1.0
_BLANK = " "
_BYTES_PER_AUDIO_S = 1e6  # bytes of an upload that earn as much processor time as a second of audio


def routes(service: Service) -> list[Route]:
    """Return the routes below `/v1`."""
    told = "this server does not translate; use /v1/audio/transcriptions"
    unsupported = error_response(RequestError(told, code="unsupported"), 404)
    kind = {"object": "model", "created": 0, "owned_by": "u2moe"}
    models = {name: {"id": name, **kind, "languages": each.languages} for name, each in service.models.items()}

    async def model(request: Request) -> Response:
        if (name := request.path_params["model"]) not in models:
            return error_response(RequestError(f"unknown model {name!r:.80}", "model", "model_not_found"), 404)
        return JSONResponse(models[name])

    async def transcription(request: Request) -> ASGIApp:
        return partial(_transcribe, service, request)

    return [
        Route("/v1/audio/transcriptions", transcription, methods=["POST"]),
        Route("/v1/audio/translations", unsupported, methods=["POST"]),
        Route("/v1/models", JSONResponse({"object": "list", "data": [*models.values()]}), methods=["GET"]),
        Route("/v1/models/{model}", model),
    ]


async def _transcribe(service: Service, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
    """Respond to a request for a transcription. The client keeps its slot until the response is sent."""
    async with contextlib.AsyncExitStack() as stack:
        response: Response
        try:
            stack.enter_context(service.share_of(scope[KEY]))
            task = stack.enter_context(service.files.place(service.client_of(scope)))
            service.metrics.count("connections", PROTOCOL.name)
            stopped = anext(task.segments(None, None))  # before recognition starts, it can only raise StoppingError
            form, upload = await converse(stopped, _receive_form(request, service.options.limits, task))
            try:
                model = service.model(_value(form, "model"))
                wanted = _Wanted(form, upload.filename or "file", model)
                prompt = _value(form, "prompt")
                options, hotwords = await model.decoding(model.recognizer.options, wanted.options, prompt=prompt)
            except BaseException:
                upload.file.close()
                raise
            rate = model.recognizer.bundle.manifest.features.sample_rate
            segments = partial(model.recognizer.segments, options=options, hotwords=hotwords)
            task.recognize(upload.file, wanted.name, rate, segments)
            content = _events(wanted, task) if wanted.is_stream else _whole(wanted, task)
            await stack.enter_async_context(contextlib.aclosing(content))  # type: ignore[type-var]
            first = await converse(_read(request), anext(content))
            if first != _BLANK and not wanted.is_stream:
                response = Response(first, media_type=wanted.media_type)
            else:
                parts = _parts(service, wanted, first, content)
                response = StreamingResponse(parts, 200, {"Cache-Control": "no-store"}, wanted.media_type)
        except ClientDisconnect:
            response = Response(status_code=499)
        except U2moeError as error:
            service.metrics.fail(error)
            response = error_response(_told(error), headers={"Connection": "close"})
        await response(scope, receive, send)


async def _receive_form(request: Request, limits: Limits, task: FileTask) -> tuple[FormData, UploadFile]:
    """Receive a form, and store its field "file" on disk. If the declared size is too large, nothing is read."""
    patience = Patience(limits.idle_s, LEAST_BYTES_PER_S * limits.idle_s, "bytes", lambda: task.num_bytes)

    async def receive() -> Message:
        message = await patience.wait_for(request.receive)
        num_bytes = len(message.get("body", b""))
        task.store(num_bytes)
        CLIENT.get().earn(num_bytes / _BYTES_PER_AUDIO_S)
        return message

    declared = request.headers.get("content-length", "")
    task.check_size(int(declared) if declared.isdecimal() else 0)
    _, settings = parse_options_header(request.headers.get("content-type"))
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError("a form must not be compressed (Content-Encoding)")
    if settings.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):  # other charsets can take quadratic time
        raise RequestError("a form must be UTF-8")
    try:
        form = await Request(request.scope, receive).form(max_files=1, max_fields=50, max_part_size=64 << 10)
    except (HTTPException, FormParserError) as error:
        reason = error.detail if isinstance(error, HTTPException) else error
        raise RequestError(f"the form is damaged: {reason}") from error
    except OSError as error:
        raise StorageError(error.errno) from error
    if not isinstance(upload := form.get("file"), UploadFile):
        await form.close()
        raise RequestError("expected a form (multipart/form-data) with a file in the field 'file'", "file")
    return form, upload


def _value(form: FormData, name: str) -> str:
    """Return the last value of a field, or "". Only the field "file" is a file."""
    return str(form.get(name, ""))


async def _parts(service: Service, wanted: _Wanted, first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the parts of a response that has begun. An error is an event, or else truncates the response."""
    yield first
    try:
        async for part in rest:
            yield part
    except U2moeError as error:
        if not wanted.is_stream:
            raise
        service.metrics.fail(error)
        yield _event({"type": "error", "error": in_openai_form(_told(error))})


async def _read(request: Request) -> None:
    """Wait until the client disconnects, then raise ClientDisconnect."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


async def _whole(wanted: _Wanted, task: FileTask) -> AsyncIterator[str]:
    """Yield the whole transcript, after spaces if it is JSON and late, since proxies close idle connections."""
    segments: list[Result] = []
    async for segment in task.segments(_SILENCE_S, _SILENCE_S):
        if segment is not None:
            segments.append(segment)
        elif wanted.is_json:
            yield _BLANK
    yield wanted.answer(transcript_of(segments, task.duration))


async def _events(wanted: _Wanted, task: FileTask) -> AsyncIterator[str]:
    """Yield server-sent events: each segment when it is found, progress in between, and finally the whole text."""
    texts: list[str] = []
    async for segment in task.segments(_SILENCE_S, _PROGRESS_S):
        if segment is None:
            yield _event(_progress(task))
        else:
            details = {"segment": dataclasses.asdict(segment)} if wanted.format == "verbose_json" else {}
            event = {"type": "transcript.text.delta", "delta": added_text(texts, segment.text), **details}
            yield _event({**event, "progress": _progress(task)})
            texts.append(segment.text)
    yield _event({"type": "transcript.text.done", "text": join_texts(texts), "usage": _usage(task.duration)})
    yield "data: [DONE]\n\n"


def _told(error: Exception) -> Exception:
    """Return the error to report to the client. If it is about audio, it names the field "file"."""
    return RequestError(str(error), "file") if isinstance(error, AudioError) else error


def _progress(task: FileTask) -> dict[str, Any]:
    return {"type": "transcript.progress", "seconds": round(task.duration, 3), "duration": round(task.whole_s, 3)}


def _usage(seconds: float) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(seconds, 3)}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _Wanted:
    """A client's request for a transcription, read from a form. A RequestError reports an unsupported value."""

    def __init__(self, form: FormData, name: str, model: ServedModel) -> None:
        self.name = name  # the client's name for the file
        self.format = _value(form, "response_format") or "json"
        self._granularities = form.getlist(f"{_GRANULARITY}[]") or form.getlist(_GRANULARITY) or ["segment"]
        self._language = _value(form, "language") or (model.languages[0] if len(model.languages) == 1 else "")
        with refusing():
            checked_choice("response_format", self.format, RESPONSE_FORMATS)
            for granularity in self._granularities:
                checked_choice(_GRANULARITY, granularity, _GRANULARITIES)
            checked_number("temperature", _value(form, "temperature") or 0, least=0, most=1, from_text=True)
        model.check_language(_value(form, "language"))
        self.is_stream = _value(form, "stream").lower() in ("true", "1")
        self.is_json = self.format.endswith("json")  # so spaces may precede the response
        self.media_type = "text/event-stream" if self.is_stream else RESPONSE_FORMATS[self.format]
        self.options = {name: _option(name, text) for name in REQUEST_OPTIONS if (text := _value(form, name))}

    def answer(self, transcript: Transcript) -> str:
        """Return the transcript in the requested format."""
        if self.format == "text":
            return transcript.text + "\n"
        if not self.is_json:
            return format_transcript(transcript, self.format, name=self.name)
        answer: dict[str, Any] = {"text": transcript.text}
        if self.format == "verbose_json":
            duration, segments = round(transcript.duration, 3), transcript.segments
            answer |= {"task": "transcribe", "language": self._language, "duration": duration}
            if "word" in self._granularities:
                answer["words"] = [dataclasses.asdict(word) for segment in segments for word in segment.words]
            if "segment" in self._granularities:
                answer["segments"] = [_segment(number, segment) for number, segment in enumerate(segments)]
        return json.dumps({**answer, "usage": _usage(transcript.duration)}, ensure_ascii=False)


def _option(name: str, text: str) -> Any:
    """Parse an option's value, which is JSON. Flags may be capitalised, because Python clients send True."""
    wrapped = f'{{"value": {text.lower() if REQUEST_OPTIONS[name].kind == "flag" else text}}}'
    try:
        return parse_object(wrapped)["value"]
    except RequestError:
        raise RequestError(f"{name} must be JSON, got {text!r:.80}", name) from None


def _segment(number: int, segment: Result) -> dict[str, Any]:
    """Return a segment in Whisper's form. Fields that only Whisper has are constant."""
    place = {"id": number, "seek": 0, "start": segment.start, "end": segment.end}
    said = {"text": segment.text, "tokens": segment.tokens, "temperature": 0.0}
    score = round(math.log(max(segment.confidence or 0.0, _LEAST_CONFIDENCE)), 4)
    scores = {"avg_logprob": score, "compression_ratio": 1.0, "no_speech_prob": 0.0, "confidence": segment.confidence}
    return {**place, **said, **scores}


PROTOCOL = Protocol(name="file", routes=routes)
