"""OpenAI's REST API for transcriptions, and its list of models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from u2moe.runtime.errors import AudioError, U2moeError
from u2moe.runtime.recording import transcript_of
from u2moe.runtime.result import Transcript
from u2moe.runtime.server.connection import count_failure
from u2moe.runtime.server.errors import ClientGoneError, RequestError, UnavailableError
from u2moe.runtime.server.texts import added_text, phrases_of
from u2moe.runtime.server.upload import Body, Upload, receive_upload
from u2moe.runtime.text.formats import format_transcript
from u2moe.runtime.text.vocabulary import join_texts

if TYPE_CHECKING:
    from u2moe.runtime.result import Result
    from u2moe.runtime.server.files import FileTask
    from u2moe.runtime.server.service import Service

_FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
_GRANULARITIES = ("segment", "word")
_LEAST_CONFIDENCE = 1e-6


def routes(service: Service) -> list[Route]:
    """The routes below `/v1`."""

    async def transcriptions(request: Request) -> Response:
        return await _transcribe(request, service)

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        if name != _model(service)["id"]:
            return error_response(RequestError(f"the model {name!r} does not exist", "model"), 404, "model_not_found")
        return JSONResponse(_model(service))

    return [
        Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model}", model),
    ]


def error_response(error: Exception, status: int | None = None, code: str | None = None) -> Response:
    """An error in OpenAI's form."""
    status = status or _status(error)
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, UnavailableError) else {}
    if status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(_error(error, status, code), status, headers)


def _status(error: Exception) -> int:
    return int(getattr(error, "status", 400))


def _error(error: Exception, status: int | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if (status or _status(error)) < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": getattr(error, "parameter", None), "code": code}}


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.recognizer.bundle.path.name, "object": "model", "created": 0, "owned_by": "u2moe"}


async def _transcribe(request: Request, service: Service) -> Response:
    body = Body(request, service.options.limits)
    async with contextlib.AsyncExitStack() as stack:
        try:
            stack.enter_context(service.files.place())
            service.metrics.count("connections", "file")
            content_type = request.headers.get("content-type", "")
            upload = await stack.enter_async_context(receive_upload(content_type, body))
            wanted = _Wanted(upload, service.languages)
            hotwords = await service.writable_hotwords(phrases_of(upload.value("prompt")))
            task = service.files.recognize(upload.file, hotwords)
            if wanted.is_stream:
                segments = aiter(task)
                first = await anext(segments, None)  # unreadable audio gets an error response
                events = _events(service, upload, first, segments, stack.pop_all())
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            return wanted.response(await _collect(request, task))
        except ClientGoneError:
            return Response(status_code=499)
        except U2moeError as error:
            count_failure(service, error)
            await body.discard()
            return error_response(_as_the_client_knows(error, upload) if isinstance(error, AudioError) else error)


async def _collect(request: Request, task: FileTask) -> Transcript:
    """The whole transcript, unless the client disconnects in the meantime."""

    async def collect() -> list[Result]:
        return [segment async for segment in task]

    collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(_wait_until_gone(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ClientGoneError
        return transcript_of(collecting.result(), task.duration)
    finally:
        collecting.cancel()
        leaving.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_the_client_knows(error: AudioError, upload: Upload) -> RequestError:
    """The error about a file, which has the client's name for it instead of that of a temporary file."""
    return RequestError(str(error).replace(str(upload.file), upload.name), "file")


async def _events(
    service: Service,
    upload: Upload,
    first: Result | None,
    segments: AsyncIterator[Result],
    stack: contextlib.AsyncExitStack,
) -> AsyncIterator[str]:
    """Server-sent events: each segment as it is found, then the whole text, or the error that comes before it."""
    texts: list[str] = []
    async with stack, contextlib.aclosing(segments):  # type: ignore[type-var]
        try:
            segment = first
            while segment is not None:
                yield _event({"type": "transcript.text.delta", "delta": added_text(texts, segment.text)})
                texts.append(segment.text)
                segment = await anext(segments, None)
            yield _event({"type": "transcript.text.done", "text": join_texts(texts)})
            yield "data: [DONE]\n\n"
        except AudioError as error:
            count_failure(service, error)
            yield _event({"type": "error", **_error(_as_the_client_knows(error, upload))})
        except U2moeError as error:
            count_failure(service, error)
            yield _event({"type": "error", **_error(error)})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _Wanted:
    """The request in a form.

    Raises:
        RequestError: an unsupported value.
    """

    def __init__(self, upload: Upload, languages: Sequence[str]) -> None:
        self._format = upload.value("response_format") or "json"
        if self._format not in _FORMATS:
            message = f"response_format must be one of {', '.join(_FORMATS)}, got {self._format!r}"
            raise RequestError(message, "response_format")
        name = "timestamp_granularities"
        self._granularities = upload.fields.get(f"{name}[]") or upload.fields.get(name) or ["segment"]
        for granularity in self._granularities:
            if granularity not in _GRANULARITIES:
                message = f"timestamp_granularities must be of {', '.join(_GRANULARITIES)}, got {granularity!r}"
                raise RequestError(message, "timestamp_granularities")
        self._language = upload.value("language") or (languages[0] if len(languages) == 1 else "")
        self.is_stream = upload.value("stream").lower() in ("true", "1")

    def response(self, transcript: Transcript) -> Response:
        """The transcript in the requested format."""
        match self._format:
            case "text":
                return PlainTextResponse(transcript.text + "\n")
            case "srt":
                return PlainTextResponse(format_transcript(transcript, "srt"))
            case "vtt":
                return PlainTextResponse(format_transcript(transcript, "vtt"), media_type="text/vtt")
            case "verbose_json":
                return JSONResponse(self._verbose(transcript))
            case _:
                usage = {"type": "duration", "seconds": round(transcript.duration, 3)}
                return JSONResponse({"text": transcript.text, "usage": usage})

    def _verbose(self, transcript: Transcript) -> dict[str, Any]:
        content: dict[str, Any] = {
            "task": "transcribe",
            "language": self._language,
            "duration": round(transcript.duration, 3),
            "text": transcript.text,
            "usage": {"type": "duration", "seconds": round(transcript.duration, 3)},
        }
        if "word" in self._granularities:
            content["words"] = [
                {"word": word.word, "start": word.start, "end": word.end, "confidence": word.confidence}
                for segment in transcript.segments
                for word in segment.words
            ]
        if "segment" in self._granularities:
            content["segments"] = [_segment(number, segment) for number, segment in enumerate(transcript.segments)]
        return content


def _segment(number: int, segment: Result) -> dict[str, Any]:
    """A segment in whisper's form; fields specific to whisper are constant."""
    return {
        "id": number,
        "seek": 0,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": segment.tokens,
        "temperature": 0.0,
        "avg_logprob": round(math.log(max(segment.confidence or 0.0, _LEAST_CONFIDENCE)), 4),
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
        "confidence": segment.confidence,
    }
