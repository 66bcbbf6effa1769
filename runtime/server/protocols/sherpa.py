"""Protocols of sherpa-onnx's WebSocket servers.

Streaming: float32 samples at 16 kHz, then "Done", answered by "Done!".
Non-streaming: whole recordings with one answer each, then "Done". A recording begins with two int32 numbers: the sample
rate and the size of the samples in bytes. The float32 samples follow. A client may split a recording into messages at
any byte after the first eight.
"""

import struct
from typing import Any

from u2moe.runtime.result import Result
from u2moe.runtime.server.connection import Connection, Protocol, converse, float32_samples
from u2moe.runtime.server.errors import IdleError, RequestError
from u2moe.runtime.server.scheduler import ServedStream
from u2moe.runtime.text.vocabulary import Vocabulary, join_texts

_SAMPLE_RATE = 16_000
_HEAD = struct.Struct("<ii")
_SAMPLE_BYTES = 4


async def run(connection: Connection) -> None:
    """Serve streams, each until the client sends "Done". Each result replaces the previous result of the same segment.

    Audio after the answer "Done!" begins another stream, as in sherpa-onnx's server. The client closes the connection.
    """
    while not connection.slot.is_drained:
        stream = connection.slot.open_stream(_SAMPLE_RATE)
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
    symbols = [vocabulary.symbols[token] for token in result.tokens]
    said = {"text": result.text, "tokens": symbols, "timestamps": result.times}
    scores: dict[str, Any] = {"ys_probs": [], "lm_probs": [], "context_scores": []}
    place = {"segment": result.segment, "words": [], "start_time": 0.0}  # the timestamps are relative to this time
    return {**said, **scores, **place, "is_final": result.is_final, "is_eof": is_eof}


PROTOCOL = Protocol(name="sherpa", path="/sherpa", run=run, may_have_port=True)


async def run_offline(connection: Connection) -> None:
    """Serve recordings one after another until the client sends "Done"."""
    vocabulary = connection.slot.model.recognizer.vocabulary
    while isinstance(message := await connection.receive(), bytes):
        if len(message) < _HEAD.size:
            needed = f"{_HEAD.size} bytes (its sample rate and length)"
            raise RequestError(f"a recording must begin with {needed}, got {len(message)}")
        sample_rate, num_bytes = _HEAD.unpack_from(message)
        if num_bytes < 0 or num_bytes % _SAMPLE_BYTES:
            raise RequestError(f"the recording's length must be a non-negative multiple of four bytes, got {num_bytes}")
        stream = connection.slot.open_stream(sample_rate)
        stream.must_be_whole = True
        results = await converse(_read_recording(connection, stream, message[_HEAD.size :], num_bytes), _finals(stream))
        text = join_texts([result.text for result in results])
        times = [time for result in results for time in result.times]
        symbols = [vocabulary.symbols[token] for result in results for token in result.tokens]
        said = {"lang": "", "emotion": "", "event": "", "text": text, "timestamps": times, "durations": []}
        await connection.send({**said, "tokens": symbols, "ys_log_probs": [], "words": []})
        if connection.slot.is_drained:
            return
    if message != "Done":
        raise RequestError('expected a recording or the text "Done"')


async def _read_recording(connection: Connection, stream: ServedStream, data: bytes, num_missing: int) -> None:
    """Feed `stream` a recording of `num_missing` bytes. It begins with `data` and may continue in further messages."""
    while True:
        num_missing -= len(data)
        if num_missing < 0:
            raise RequestError(f"the recording is {-num_missing} bytes longer than announced")
        whole = len(data) - len(data) % _SAMPLE_BYTES
        await stream.feed(float32_samples(data[:whole]))
        if num_missing == 0:
            stream.finish()
            return
        message = await connection.receive()
        if isinstance(message, str):
            raise RequestError(f"{num_missing} bytes of the recording are missing")
        num_missing += len(data) - whole
        data = data[whole:] + message


async def _finals(stream: ServedStream) -> list[Result]:
    return [result async for result in stream if result.is_final]


OFFLINE = Protocol(name="sherpa-offline", path="/sherpa-offline", run=run_offline, may_have_port=True)
