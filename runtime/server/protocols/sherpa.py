"""Protocol of sherpa-onnx's streaming WebSocket server: float32 samples at 16 kHz, then "Done", answered by "Done!"."""

from __future__ import annotations

from typing import Any

from u2moe.runtime.result import Result
from u2moe.runtime.server.connection import Connection, converse, float32_samples
from u2moe.runtime.server.errors import IdleError
from u2moe.runtime.server.protocol import Protocol
from u2moe.runtime.server.served_stream import ServedStream
from u2moe.runtime.text.vocabulary import Vocabulary

_SAMPLE_RATE = 16_000


async def run(connection: Connection) -> None:
    """Serve streams, each until the client sends "Done". Each result replaces the previous result of the same segment.

    Audio after the answer "Done!" begins another stream, as in sherpa-onnx's server. The client closes the connection.
    """
    while not connection.slot.is_drained:
        stream = await connection.slot.open_stream(_SAMPLE_RATE)
        try:
            await converse(_read(connection, stream), _write(connection, stream))
        except IdleError:
            if stream.duration or not connection.slot.fed_s:
                raise
            return  # no other stream followed
        await connection.send("Done!")


async def _read(connection: Connection, stream: ServedStream) -> None:
    while await connection.feed(stream, float32_samples) != "Done":
        pass  # other texts are ignored, as in sherpa-onnx's server
    stream.finish()


async def _write(connection: Connection, stream: ServedStream) -> None:
    vocabulary = connection.slot.model.recognizer.vocabulary
    has_answered = False
    async for result in stream:
        has_answered = True
        await connection.send(_answer(result, vocabulary, is_eof=stream.is_exhausted))
    if not has_answered:  # clients use the last message before "Done!" as the result
        await connection.send(_answer(Result(text="", is_final=True, segment=0), vocabulary, is_eof=True))


def _answer(result: Result, vocabulary: Vocabulary, *, is_eof: bool) -> dict[str, Any]:
    return {
        "text": result.text,
        "tokens": [vocabulary.symbols[token] for token in result.tokens],
        "timestamps": result.times,
        "ys_probs": [],
        "lm_probs": [],
        "context_scores": [],
        "segment": result.segment,
        "words": [],
        "start_time": 0.0,  # the timestamps are relative to this time
        "is_final": result.is_final,
        "is_eof": is_eof,
    }


PROTOCOL = Protocol(name="sherpa", path="/sherpa", run=run, may_have_port=True)
