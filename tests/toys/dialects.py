"""What clients of each protocol of the server send, by the path of its WebSocket; and Wyoming's events."""

import base64
import json

import numpy as np

START = {
    "/stream": ["{}"],
    "/wenet": ['{"signal": "start", "continuous_decoding": true}'],
    "/sherpa": [],
    "/sherpa-offline": [],
    "/vosk": ['{"config": {"sample_rate": 16000}}'],
    "/v1/realtime": [
        json.dumps(
            {
                "type": "session.update",
                "session": {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}},
            }
        )
    ],
}
END = {
    "/stream": '{"type": "finish"}',
    "/wenet": '{"signal": "end"}',
    "/sherpa": "Done",
    "/sherpa-offline": "Done",
    "/vosk": '{"eof": 1}',
    "/v1/realtime": '{"type": "input_audio_buffer.commit"}',
}
WYOMING_AUDIO = {"rate": 16_000, "width": 2, "channels": 1}


def float32(samples):
    """Samples as the protocols of sherpa-onnx have them."""
    return (samples.astype(np.float32) / np.float32(32768)).tobytes()


def realtime_audio(data):
    """An event with audio, for OpenAI's protocol."""
    return json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(data).decode()})


def audio_messages(path, samples, block_len=8000):
    """int16 samples as messages of a protocol."""
    blocks = [samples[start : start + block_len] for start in range(0, len(samples), block_len)]
    match path:
        case "/sherpa":
            return [float32(block) for block in blocks]
        case "/sherpa-offline":
            head = np.array([16_000, 4 * len(samples)], "<i4").tobytes()
            return [head, *map(float32, blocks)]
        case "/v1/realtime":
            return [realtime_audio(block.tobytes()) for block in blocks]
        case _:
            return [block.tobytes() for block in blocks]


def wyoming_event(kind, data=None, payload=b"", **head):
    line = {"type": kind, "data": data or {}, "payload_length": len(payload), **head}
    return json.dumps(line).encode() + b"\n" + payload
