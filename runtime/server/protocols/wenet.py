"""WeNet's WebSocket protocol: `{"signal": "start"}`, int16 at 16 kHz, `{"signal": "end"}`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

from u2moe.runtime.server.connection import Connection, converse, int16_samples, parse_object
from u2moe.runtime.server.errors import RequestError, refusing
from u2moe.runtime.server.protocol import Protocol
from u2moe.runtime.validation import checked_flag, checked_integer

if TYPE_CHECKING:
    from u2moe.runtime.result import Result
    from u2moe.runtime.server.session import ServerSession

_SAMPLE_RATE = 16_000
_MAX_NBEST = 100
_LATE_AUDIO_S = 0.1
"""After "end", one more block of audio may arrive, as from WeNet's web page."""


async def run(connection: Connection) -> None:
    """Serve one utterance or, with `continuous_decoding`, any number."""
    message = await connection.receive()
    if isinstance(message, bytes):
        raise RequestError("expected the signal 'start' before audio")
    start = parse_object(message)
    if start.get("signal") != "start":
        raise RequestError(f"expected the signal 'start', got {start.get('signal')!r}")
    with refusing("nbest"):
        nbest = checked_integer("nbest", start.get("nbest", 1), least=1, most=_MAX_NBEST)
    with refusing("continuous_decoding"):
        is_continuous = checked_flag("continuous_decoding", start.get("continuous_decoding", False))
    session = await connection.place.open_session(_SAMPLE_RATE)
    await connection.send({"status": "ok", "type": "server_ready"})
    await converse(_read(connection, session), _write(connection, session, nbest, is_continuous=is_continuous))
    await connection.send({"status": "ok", "type": "speech_end"})


async def _read(connection: Connection, session: ServerSession) -> None:
    signal = parse_object(await connection.feed(session, int16_samples)).get("signal")
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
            await session.feed(int16_samples(late))
    session.finish()


async def _write(connection: Connection, session: ServerSession, nbest: int, *, is_continuous: bool) -> None:
    has_final = False
    async for result in session:
        if result.is_final:
            has_final = True
            sentences = [_sentence(result, alternative.text) for alternative in result.nbest[:nbest]]
            await _send(connection, "final_result", sentences or [_sentence(result, result.text)])
            if not is_continuous:
                return
        else:
            await _send(connection, "partial_result", [{"sentence": result.text}])
    if not has_final:  # without speech, an empty result is still expected
        await _send(connection, "final_result", [{"sentence": "", "word_pieces": []}])


async def _send(connection: Connection, kind: str, sentences: list[dict[str, object]]) -> None:
    """Send a result; `nbest` is a JSON string, as from WeNet's server."""
    await connection.send({"status": "ok", "type": kind, "nbest": json.dumps(sentences, ensure_ascii=False)})


def _sentence(result: Result, text: str) -> dict[str, object]:
    """An alternative; only the best one has times, in milliseconds."""
    words = result.words if text == result.text else []
    pieces = [{"word": word.word, "start": round(word.start * 1000), "end": round(word.end * 1000)} for word in words]
    return {"sentence": text, "word_pieces": pieces}


def _tell_error(error: Exception) -> str:
    return json.dumps({"status": "failed", "message": str(error)}, ensure_ascii=False)


PROTOCOL = Protocol(name="wenet", path="/wenet", run=run, may_have_port=True, tell_error=_tell_error, close_code=1000)
