"""WeNet's WebSocket protocol: `{"signal": "start"}`, int16 audio at 16 kHz, then `{"signal": "end"}`."""

import asyncio
import contextlib
import json
from itertools import pairwise, zip_longest
from typing import Any

from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Alternative, Result
from u2moe.runtime.server.connection import Connection, Protocol, converse, int16_samples, parse_object
from u2moe.runtime.server.errors import RequestError, refusing
from u2moe.runtime.server.scheduler import ServedStream
from u2moe.runtime.validation import checked_flag, checked_integer

_SAMPLE_RATE = 16_000
_UNIT_MS = 100  # milliseconds from the start of a unit to its peak: `time_stamp_gap_` of WeNet's decoder
_LATE_AUDIO_S = 0.1  # seconds after "end" in which audio is accepted: WeNet's web page sends one more buffer


async def run(connection: Connection) -> None:
    """Serve one utterance or, with `continuous_decoding`, any number of utterances."""
    message = await connection.receive()
    if isinstance(message, bytes):
        raise RequestError("expected the signal 'start' before audio")
    start = parse_object(message)
    if start.get("signal") != "start":
        raise RequestError(f"expected the signal 'start', got {start.get('signal')!r}")
    with refusing():
        nbest = checked_integer("nbest", start.get("nbest", 1), least=1, most=100)
        is_continuous = checked_flag("continuous_decoding", start.get("continuous_decoding", False))
    stream = connection.slot.open_stream(_SAMPLE_RATE)
    stream.num_alternatives = nbest
    await connection.send({"status": "ok", "type": "server_ready"})
    await converse(_read(connection, stream), _write(connection, stream, nbest, is_continuous=is_continuous))
    await connection.send({"status": "ok", "type": "speech_end"})


async def _read(connection: Connection, stream: ServedStream) -> None:
    signal = parse_object(await connection.feed(stream, int16_samples)).get("signal")
    if signal != "end":
        raise RequestError(f"expected audio or the signal 'end', got the signal {signal!r}")
    loop = asyncio.get_running_loop()
    end = loop.time() + _LATE_AUDIO_S
    with contextlib.suppress(TimeoutError):
        while loop.time() < end:
            async with asyncio.timeout_at(end):
                late = await connection.receive()
            if isinstance(late, str):
                break
            await stream.feed(int16_samples(late))
    stream.finish()


async def _write(connection: Connection, stream: ServedStream, nbest: int, *, is_continuous: bool) -> None:
    has_final = False
    async for result in stream:
        has_final = has_final or result.is_final
        await _send(connection, result, nbest)
        if result.is_final and not is_continuous:
            return
    if not has_final:  # clients expect a final result, even for audio without speech
        await _send(connection, Result(text="", is_final=True), nbest)


async def _send(connection: Connection, result: Result, nbest: int) -> None:
    """Send a result. The field `nbest` is JSON within a string, as in WeNet's server."""
    sentences: list[dict[str, Any]] = [{"sentence": each.text} for each in result.nbest[:nbest]] or [{"sentence": ""}]
    if result.is_final:
        for sentence, each in zip_longest(sentences, result.nbest[:nbest]):
            sentence["word_pieces"] = [] if each is None else _pieces(each, connection.slot.model.recognizer)
    kind = "final_result" if result.is_final else "partial_result"
    await connection.send({"status": "ok", "type": kind, "nbest": json.dumps(sentences, ensure_ascii=False)})


def _pieces(alternative: Alternative, recognizer: Recognizer) -> list[dict[str, Any]]:
    """Return the units of an alternative, with times in milliseconds by WeNet's rule.

    A unit begins `_UNIT_MS` before its peak and ends at the peak. If two peaks are closer than that, their units meet
    midway between the peaks, rounded down to a frame.
    """
    frame_ms, symbols = 1000 * recognizer.bundle.manifest.frame_s, recognizer.vocabulary.symbols
    peaks = [round(1000 * time / frame_ms) for time in alternative.times]
    starts = [max(round(peak * frame_ms) - _UNIT_MS, 0) for peak in peaks]
    ends = [round(peak * frame_ms) for peak in peaks]
    for i, (peak, after) in enumerate(pairwise(peaks)):
        if (after - peak) * frame_ms < _UNIT_MS:
            starts[i + 1] = ends[i] = round((peak + after) // 2 * frame_ms)
    units = (symbols[token] for token in alternative.tokens)
    return [{"word": unit, "start": start, "end": end} for unit, start, end in zip(units, starts, ends, strict=False)]


def _tell_error(error: Exception) -> dict[str, Any]:
    return {"status": "failed", "message": str(error)}


PROTOCOL = Protocol(name="wenet", path="/wenet", run=run, may_have_port=True, close_code=1000, tell_error=_tell_error)
