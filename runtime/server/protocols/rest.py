"""OpenAI's REST API for transcriptions, and its list of models."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from u2moe.runtime.audio.files import name_of
from u2moe.runtime.errors import AudioError, U2moeError
from u2moe.runtime.recording import transcript_of
from u2moe.runtime.result import Transcript
from u2moe.runtime.server.access import KEY
from u2moe.runtime.server.connection import read_object, refusing
from u2moe.runtime.server.errors import ClientGoneError, RequestError, in_openai_form, status_of
from u2moe.runtime.server.protocol import Protocol
from u2moe.runtime.server.texts import added_text, parse_hotwords, phrases_of
from u2moe.runtime.server.upload import Body, Refusal, Upload
from u2moe.runtime.text.formats import format_transcript
from u2moe.runtime.text.vocabulary import join_texts
from u2moe.runtime.validation import checked_number

if TYPE_CHECKING:
    from u2moe.runtime.result import Result
    from u2moe.runtime.server.files import FileTask
    from u2moe.runtime.server.service import Service

_FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
_GRANULARITY, _GRANULARITIES = "timestamp_granularities", ("segment", "word")
_LEAST_CONFIDENCE = 1e-6
_SILENCE_S = 15.0
"""Seconds without an answer after which something is sent: proxies wait for 30 or 60."""
_PROGRESS_S = 1.0


def routes(service: Service) -> list[Route]:
    """The routes below `/v1`."""
    name = service.recognizer.bundle.path.name
    known = {"id": name, "object": "model", "created": 0, "owned_by": "u2moe", "languages": service.languages}

    async def transcriptions(request: Request) -> Response:
        return await _transcribe(request, service)

    async def translations(_request: Request) -> Response:
        told = "this model writes what is said in its own language: it does not translate; use /v1/audio/transcriptions"
        return error_response(RequestError(told, code="unsupported"), 404)

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [known]})

    async def model(request: Request) -> Response:
        asked = request.path_params["model"]
        if asked != name:
            error = RequestError(f"the model {asked!r} does not exist", "model", "model_not_found")
            return error_response(error, 404)
        return JSONResponse(known)

    return [
        Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
        Route("/v1/audio/translations", translations, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model}", model),
    ]


def error_response(error: Exception, status: int | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """An error in OpenAI's form."""
    return JSONResponse({"error": in_openai_form(error)}, status or status_of(error), headers)


async def _transcribe(request: Request, service: Service) -> Response:
    body = Body(request, service.options.limits)
    async with contextlib.AsyncExitStack() as stack:
        try:
            stack.enter_context(service.share_of(request.scope[KEY]))
            stack.enter_context(service.files.admission.place())
            service.metrics.count("connections", PROTOCOL.name)
            with service.files.upload():
                upload = await body.receive_form()
            wanted, task = await _begin(upload, service)
            if wanted.is_stream:
                segments = aiter(task)
                first = asyncio.ensure_future(anext(segments, None))
                await asyncio.wait({first}, timeout=_SILENCE_S)  # unreadable audio gets an error response
                if first.done():
                    first.result()
                events = _events(service, upload, wanted, task, segments, first, stack.pop_all())
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            return await _respond(request, wanted, task, stack)
        except ClientGoneError:
            return Response(status_code=499)
        except U2moeError as error:
            service.incidents.fail(error)
            return Refusal(_with_its_name(error, upload) if isinstance(error, AudioError) else error, body)


async def _begin(upload: Upload, service: Service) -> tuple[_Wanted, FileTask]:
    """What the form asks for, and the recognition of its file."""
    try:
        wanted = _Wanted(upload, service.languages)
        decoding = service.decoding(
            service.recognizer.options, is_written=wanted.is_written, beam_size=wanted.beam_size
        )
        hotwords = await service.hotwords(wanted.hotwords)
        if hotwords is None:
            hotwords = await service.writable_hotwords(phrases_of(upload.value("prompt")))
    except BaseException:
        upload.file.close()
        raise
    return wanted, service.files.recognize(upload.file, decoding, hotwords)


async def _respond(request: Request, wanted: _Wanted, task: FileTask, stack: contextlib.AsyncExitStack) -> Response:
    """The whole transcript, unless the client disconnects in the meantime.

    Proxies end connections on which nothing is sent. So where the form allows blanks, some come before a late answer.
    """

    async def collect() -> Transcript:
        segments = [segment async for segment in task]
        return transcript_of(segments, task.duration)

    collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(_wait_until_gone(request))
    try:
        timeout = _SILENCE_S if wanted.is_json else None
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED, timeout=timeout)
        if collecting.done():
            return wanted.response(collecting.result())
        if not leaving.done():
            answer = _after_blanks(collecting, wanted, stack.pop_all())
            return StreamingResponse(answer, media_type="application/json")
    except BaseException:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        raise
    finally:
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    collecting.cancel()
    await asyncio.gather(collecting, return_exceptions=True)
    raise ClientGoneError


async def _after_blanks(
    collecting: asyncio.Task[Transcript], wanted: _Wanted, stack: contextlib.AsyncExitStack
) -> AsyncIterator[bytes]:
    """Blanks, then the answer; after an error the connection is cut, since the status was sent."""
    async with stack:
        try:
            while not collecting.done():
                yield b" "
                await asyncio.wait({collecting}, timeout=_SILENCE_S)
            yield bytes(wanted.response(collecting.result()).body)
        finally:
            collecting.cancel()
            await asyncio.gather(collecting, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _with_its_name(error: Exception, upload: Upload) -> RequestError:
    """An error about a file, with the client's name for it instead of the server's."""
    return RequestError(str(error).replace(name_of(upload.file), upload.name), "file")


async def _events(
    service: Service,
    upload: Upload,
    wanted: _Wanted,
    task: FileTask,
    segments: AsyncIterator[Result],
    pending: asyncio.Future[Result | None],
    stack: contextlib.AsyncExitStack,
) -> AsyncIterator[str]:
    """Server-sent events: each segment as it is found, then the whole text, or the error that comes before it.

    Between them it is told how far recognition is; `pending` is the first segment.
    """
    texts: list[str] = []
    async with stack, contextlib.aclosing(segments):  # type: ignore[type-var]
        try:
            while True:
                await asyncio.wait({pending}, timeout=_PROGRESS_S)
                if not pending.done():
                    yield _event(_progress(task))
                    continue
                segment = pending.result()
                if segment is None:
                    break
                yield _event({**wanted.delta(segment, added_text(texts, segment.text)), "progress": _progress(task)})
                texts.append(segment.text)
                pending = asyncio.ensure_future(anext(segments, None))
            done = {"type": "transcript.text.done", "text": join_texts(texts), "usage": _usage(task.duration)}
            yield _event(done)
            yield "data: [DONE]\n\n"
        except U2moeError as error:
            service.incidents.fail(error)
            told = _with_its_name(error, upload) if isinstance(error, AudioError) else error
            yield _event({"type": "error", "error": in_openai_form(told)})
        finally:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


def _progress(task: FileTask) -> dict[str, Any]:
    return {"type": "transcript.progress", "seconds": round(task.duration, 3), "duration": round(task.whole_s, 3)}


def _usage(seconds: float) -> dict[str, Any]:
    return {"type": "duration", "seconds": round(seconds, 3)}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _Wanted:
    """The request in a form.

    Raises:
        RequestError: an unsupported value.
    """

    def __init__(self, upload: Upload, languages: Sequence[str]) -> None:
        self._format = upload.value("response_format") or "json"
        self._granularities = upload.values(f"{_GRANULARITY}[]") or upload.values(_GRANULARITY) or ["segment"]
        self._language = upload.value("language") or (languages[0] if len(languages) == 1 else "")
        self.is_stream = upload.value("stream").lower() in ("true", "1")
        written = upload.value("written").lower()
        self.is_written = None if not written else written in ("true", "1")
        beams, temperature = upload.value("beam_size"), upload.value("temperature")
        self.beam_size = int(beams) if beams.isdecimal() else None
        self.hotwords: Sequence[str | tuple[str, float]] = ()
        if hotwords := upload.value("hotwords"):
            self.hotwords = parse_hotwords(read_object(f'{{"hotwords": {hotwords}}}')["hotwords"])
        for name, value, choices in (
            ("response_format", self._format, _FORMATS),
            ("written", written or "true", ("true", "false", "1", "0")),
            *((_GRANULARITY, value, _GRANULARITIES) for value in self._granularities),
        ):
            if value not in choices:
                raise RequestError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}", name)
        if beams and self.beam_size is None:
            raise RequestError(f"beam_size must be a number, got {beams!r:.80}", "beam_size")
        if languages and self._language and self._language.partition("-")[0].lower() not in languages:
            told = f"the model knows {' and '.join(languages)}, not the language {self._language!r:.80}"
            raise RequestError(told, "language", "unsupported_language")
        with refusing("temperature"):
            checked_number("temperature", _number(temperature), least=0, most=1)

    @property
    def is_json(self) -> bool:
        """Whether blanks may come before the answer."""
        return self._format in ("json", "verbose_json")

    def delta(self, segment: Result, text: str) -> dict[str, Any]:
        """The event of a segment, with all of it if verbose JSON is wanted."""
        event = {"type": "transcript.text.delta", "delta": text}
        return {**event, "segment": dataclasses.asdict(segment)} if self._format == "verbose_json" else event

    def response(self, transcript: Transcript) -> Response:
        """The transcript in the requested format."""
        usage = _usage(transcript.duration)
        match self._format:
            case "text":
                return PlainTextResponse(transcript.text + "\n")
            case "srt" | "vtt" as kind:
                media_type = "text/vtt" if kind == "vtt" else "text/plain"
                return PlainTextResponse(format_transcript(transcript, kind), media_type=media_type)
            case "verbose_json":
                return JSONResponse({**self._verbose(transcript), "usage": usage})
            case _:
                return JSONResponse({"text": transcript.text, "usage": usage})

    def _verbose(self, transcript: Transcript) -> dict[str, Any]:
        duration = round(transcript.duration, 3)
        content: dict[str, Any] = {"task": "transcribe", "language": self._language, "duration": duration}
        content["text"] = transcript.text
        if "word" in self._granularities:
            content["words"] = [dataclasses.asdict(word) for segment in transcript.segments for word in segment.words]
        if "segment" in self._granularities:
            content["segments"] = [_segment(number, segment) for number, segment in enumerate(transcript.segments)]
        return content


def _number(text: str) -> float:
    return float(text) if text else 0.0


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


PROTOCOL = Protocol(name="file", routes=routes)
