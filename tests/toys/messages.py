"""What a well-behaved client of each protocol sends, message by message. Sends nothing itself."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence

import numpy as np

Messages = list[str | bytes]
_BLOCK_LEN = 3200


def _blocks(samples: np.ndarray) -> list[np.ndarray]:
    return [samples[start : start + _BLOCK_LEN] for start in range(0, len(samples), _BLOCK_LEN)]


def _stream(samples: np.ndarray) -> Messages:
    options = {"sample_rate": 16_000, "hotwords": ["seven", ["three", 2.5]], "nbest": 3}
    return [json.dumps(options), *(block.tobytes() for block in _blocks(samples)), json.dumps({"type": "finish"})]


def _wenet(samples: np.ndarray) -> Messages:
    start = json.dumps({"signal": "start", "nbest": 5, "continuous_decoding": True})
    return [start, *(block.tobytes() for block in _blocks(samples)), json.dumps({"signal": "end"})]


def _sherpa(samples: np.ndarray) -> Messages:
    return [*((block / np.float32(32768)).astype("<f4").tobytes() for block in _blocks(samples)), "Done"]


def _sherpa_offline(samples: np.ndarray) -> Messages:
    data = (samples / np.float32(32768)).astype("<f4").tobytes()
    recording = np.array([16_000, len(data)], "<i4").tobytes() + data
    return [*(recording[start : start + 4 * _BLOCK_LEN] for start in range(0, len(recording), 4 * _BLOCK_LEN)), "Done"]


def _vosk(samples: np.ndarray) -> Messages:
    config = json.dumps({"config": {"sample_rate": 16_000, "max_alternatives": 2, "phrase_list": ["seven"]}})
    return [config, *(block.tobytes() for block in _blocks(samples)), '{"eof" : 1}']


def _realtime(samples: np.ndarray) -> Messages:
    audio = {"format": {"type": "audio/pcm", "rate": 24_000}, "turn_detection": None}
    update = {"type": "session.update", "session": {"type": "transcription", "audio": {"input": audio}}}
    appended = (
        {"type": "input_audio_buffer.append", "audio": base64.b64encode(block.tobytes()).decode()}
        for block in _blocks(samples)
    )
    return [json.dumps(update), *map(json.dumps, appended), json.dumps({"type": "input_audio_buffer.commit"})]


WEBSOCKETS: dict[str, Callable[[np.ndarray], Messages]] = {
    "/stream": _stream,
    "/wenet": _wenet,
    "/sherpa": _sherpa,
    "/sherpa-offline": _sherpa_offline,
    "/vosk": _vosk,
    "/v1/realtime": _realtime,
}
"""By path, the messages for int16 samples at 16 kHz."""


def wyoming(samples: np.ndarray) -> bytes:
    """A whole request to the port of Wyoming."""
    audio = {"rate": 16_000, "width": 2, "channels": 1}
    events = [_event("describe"), _event("transcribe"), _event("audio-start", audio)]
    events += [_event("audio-chunk", audio, block.tobytes()) for block in _blocks(samples)]
    return b"".join([*events, _event("audio-stop")])


def _event(kind: str, data: dict[str, int] | None = None, payload: bytes = b"") -> bytes:
    body = json.dumps(data or {}).encode()
    head = {"type": kind, "data_length": len(body), "payload_length": len(payload)}
    return json.dumps(head).encode() + b"\n" + body + payload


def upload(content: bytes, fields: Sequence[tuple[str, str]] = (("response_format", "verbose_json"),)) -> bytes:
    """The body of a request to `/v1/audio/transcriptions`, whose boundary is "x"."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields
    ]
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    return b"".join([*parts, head, content, b"\r\n--x--\r\n"])
