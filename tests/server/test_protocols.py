"""Common behaviour of all protocols over WebSocket."""

import json
import struct

import numpy as np
import pytest
from dialects import END, START, audio_messages

from u2moe.runtime.server.protocols import PROTOCOLS

PROTOCOLS_BY_PATH = {protocol.path: protocol for protocol in PROTOCOLS.values()}
ERROR_FIELDS = {"/stream": "message", "/wenet": "message", "/vosk": "error"}
"""Field of the error message in the last message. Other protocols only have a close reason."""


@pytest.mark.parametrize("name", [name for name, each in PROTOCOLS.items() if each.path and each.may_have_port])
def test_a_port_of_its_own(server, speech, expected, name):
    path = PROTOCOLS[name].path
    with server.connect("/", port=server.ports[name], origin="https://wenet.example") as client:
        for message in (*START[path], *audio_messages(path, speech()), END[path]):
            client.send(message)
        said = " ".join(client.rest("Done!"))
    assert all(segment.text in said for segment in expected().segments)


@pytest.mark.parametrize(("path", "messages", "complaint"), [
    ("/stream", ["{"], "invalid JSON"),
    ("/stream", [b"\0\0"], "binary"),
    ("/stream", ["[]"], "expected a JSON object, got list"),
    ("/stream", ['{"rate": 8000}'], "unknown option 'rate'"),
    ("/stream", ['{"sample_rate": "8k"}'], "sample_rate must be a number"),
    ("/stream", ['{"sample_rate": 3}'], "sample rate must be between"),
    ("/stream", ['{"encoding": "opus"}'], "encoding must be one of"),
    ("/stream", ['{"chunk_size": 1}'], "chunk_size must be between 16 and 83, got 1"),
    ("/stream", ['{"chunk_size": 84}'], "chunk_size must be between 16 and 83, got 84"),
    ("/stream", ['{"nbest": null}'], "nbest must be an integer, got None"),
    ("/stream", ['{"nbest": 1000}'], "nbest must be at most 100"),
    ("/stream", ['{"hotwords": [["A", 1' + "0" * 400 + "]]}"], "weight must be a number"),
    ("/stream", ['{"words": 1}'], "words must be true or false"),
    ("/stream", ['{"hotwords": "A"}'], "hotwords must be a list"),
    ("/stream", ['{"hotwords": [7]}'], "a hotword must be"),
    ("/stream", ['{"hotwords": ["\\u4e2d"]}'], "\u4e2d"),
    ("/stream", ['{"hotwords": ["' + "A" * 300 + '"]}'], "200 characters"),
    ("/stream", ['{"hotwords": [' + ",".join(['"A"'] * 1001) + "]}"], "1000 hotwords"),
    ("/stream", ['{"hotwords": [' + ",".join(['"A"'] * 20_000) + "]}"], "10000 commas, got 19999"),
    ("/stream", ['{"endpoint": {"rule4": null}}'], "rule4"),
    ("/stream", ['{"endpoint": {"rule3": null}}'], "rule3 must end segments"),
    ("/stream", ['{"endpoint": 3}'], "endpoint:"),
    ("/wenet", [b"\0\0"], "'start' before audio"),
    ("/wenet", ['{"signal": "begin"}'], "'begin'"),
    ("/wenet", ["start"], "invalid JSON"),
    ("/wenet", ['{"signal": "start", "nbest": 0}'], "nbest"),
    ("/wenet", ['{"signal": "start", "continuous_decoding": 1}'], "continuous_decoding"),
    ("/wenet", ['{"signal": "start"}', '{"signal": "pause"}'], "'pause'"),
    ("/wenet", ['{"signal": "start"}', b"\0"], "multiple of 2"),
    ("/vosk", ["{"], "invalid JSON"),
    ("/vosk", ["{}"], "expected audio or one of"),
    ("/vosk", ['{"config": 1}'], "config must be an object"),
    ("/vosk", ['{"config": {"sample_rate": "x"}}'], "sample_rate"),
    ("/vosk", ['{"config": {"max_alternatives": -1}}'], "max_alternatives"),
    ("/vosk", ['{"config": {"phrase_list": "x"}}'], "phrase_list"),
    ("/vosk", ['{"config": {"sample_rate": 1e9}}', b"\0\0"], "sample rate must be between"),
    ("/vosk", [b"\0"], "multiple of 2"),
    ("/sherpa-offline", [b"1234567"], "8 bytes (its sample rate and length), got 7"),
    ("/sherpa-offline", [struct.pack("<ii", 16_000, 5)], "multiple of four"),
    ("/sherpa-offline", [struct.pack("<ii", 16_000, -4)], "multiple of four"),
    ("/sherpa-offline", [struct.pack("<ii", 0, 4)], "sample rate"),
    ("/sherpa-offline", [struct.pack("<ii", 16_000, 4) + bytes(8)], "4 bytes longer"),
    ("/sherpa-offline", [struct.pack("<ii", 16_000, 8), bytes(4), "Done"], "4 bytes of the recording are missing"),
    ("/sherpa-offline", ["Stop"], "or the text"),
    ("/sherpa", [b"\0\0\0"], "multiple of 4 bytes"),
    ("/sherpa", [np.full(100, np.inf, np.float32).tobytes()], "inf"),
    ("/stream", ["{}", b"\0"], "multiple of 2 bytes"),
    ("/stream", ["{}", "hello"], "invalid JSON"),
    ("/stream", ["{}", '{"type": "stop"}'], "'stop'"),
    ("/stream", ['{"encoding": "pcm_f32le"}', np.full(1000, np.nan, np.float32).tobytes()], "NaN"),
])  # fmt: skip
def test_what_is_wrong_is_answered(server, path, messages, complaint):
    with server.connect(path) as client:
        for message in messages:
            client.send(message)
        said = client.rest()
        assert client.websocket.close_code == PROTOCOLS_BY_PATH[path].close_code
        told = json.loads(said[-1])[ERROR_FIELDS[path]] if path in ERROR_FIELDS else client.websocket.close_reason
    assert complaint in told
