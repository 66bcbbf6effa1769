"""Messages of clients of each server protocol, by the path of its WebSocket; Wyoming's events; and patience."""

import base64
import json
import time

import numpy as np

PATIENCE_S = 120
"""Seconds after which an operation of a server counts as hanging. The machine may be busy."""


def wait_until(holds):
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


REALTIME = '{"type": "session.update", "session": {"audio": {"input": %s}}}'
START = {
    "/stream": ["{}"],
    "/wenet": ['{"signal": "start", "continuous_decoding": true}'],
    "/sherpa": [],
    "/sherpa-offline": [],
    "/vosk": ['{"config": {"sample_rate": 16000}}'],
    "/v1/realtime": [REALTIME % '{"format": {"type": "audio/pcm", "rate": 16000}}'],
}
END = {
    "/stream": '{"type": "finish"}', "/wenet": '{"signal": "end"}', "/sherpa": "Done", "/sherpa-offline": "Done",
    "/vosk": '{"eof": 1}', "/v1/realtime": '{"type": "input_audio_buffer.commit"}',
}  # fmt: skip
UPGRADE = (
    "GET /stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)
"""The beginning of a handwritten WebSocket request."""
WYOMING_AUDIO = {"rate": 16_000, "width": 2, "channels": 1}


def float32(samples):
    """Return samples in the form of sherpa-onnx's protocols."""
    return (samples.astype(np.float32) / np.float32(32768)).tobytes()


def realtime_audio(data):
    """Return an event with audio, for OpenAI's protocol."""
    return json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(data).decode()})


def audio_messages(path, samples, block_len=8000):
    """Return int16 samples as messages of a protocol."""
    blocks = [samples[start : start + block_len] for start in range(0, len(samples), block_len)]
    match path:
        case "/sherpa":
            return [float32(block) for block in blocks]
        case "/sherpa-offline":
            return [np.array([16_000, 4 * len(samples)], "<i4").tobytes(), *map(float32, blocks)]
        case "/v1/realtime":
            return [realtime_audio(block.tobytes()) for block in blocks]
        case _:
            return [block.tobytes() for block in blocks]


def wyoming_event(kind, data=None, payload=b"", **head):
    line = {"type": kind, "data": data or {}, "payload_length": len(payload), **head}
    return json.dumps(line).encode() + b"\n" + payload


WITH_OPTIONS = {
    "/stream": ['{"sample_rate": 16000, "hotwords": ["seven", ["three", 2.5]], "nbest": 3}'],
    "/wenet": ['{"signal": "start", "nbest": 5, "continuous_decoding": true}'],
    "/vosk": ['{"config": {"sample_rate": 16000, "max_alternatives": 2, "phrase_list": ["seven"]}}'],
    "/v1/realtime": [REALTIME % '{"turn_detection": null}'],
}
"""Beginnings with more options than `START`."""


def conversation(path, samples):
    """Return all messages of a client that uses options."""
    return [*WITH_OPTIONS.get(path, START[path]), *audio_messages(path, samples, 3200), END[path]]


def wyoming_request(samples):
    """Return a whole request to the port of Wyoming."""
    begin = [wyoming_event("describe"), wyoming_event("transcribe"), wyoming_event("audio-start", WYOMING_AUDIO)]
    blocks = (samples[start : start + 3200].tobytes() for start in range(0, len(samples), 3200))
    chunks = (wyoming_event("audio-chunk", WYOMING_AUDIO, block) for block in blocks)
    return b"".join([*begin, *chunks, wyoming_event("audio-stop")])


def upload(content, fields=(("response_format", "verbose_json"),)):
    """Return the body of a request to `/v1/audio/transcriptions`, with the boundary "x"."""
    head = "--x\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    parts.append(f'{head}"file"; filename="a.wav"\r\n\r\n')
    return "".join(parts).encode() + content + b"\r\n--x--\r\n"
