"""sherpa-onnx's protocol for whole recordings, in the messages that its clients send and read."""

import struct

import numpy as np

HALF = np.float32(32768)


def recording(samples, sample_rate=16_000):
    data = (samples.astype(np.float32) / HALF).tobytes()
    return struct.pack("<ii", sample_rate, len(data)) + data


def test_recordings_in_sequence(server, speech, expected):
    """Cut as its Python clients cut them, and anywhere."""
    with server.connect("/sherpa-offline") as client:
        for sample_rate, block_len in ((16_000, 10_240), (8000, 9999)):
            data = recording(speech(sample_rate), sample_rate)
            for start in range(0, len(data), block_len):
                client.send(data[start : start + block_len])
            answer = client.receive()
            segments = expected(sample_rate).segments
            assert answer["text"] == expected(sample_rate).text
            assert answer["timestamps"] == [time for segment in segments for time in segment.times]
            assert len(answer["tokens"]) == len(answer["timestamps"])
        client.send("Done")
        assert client.close_code() == 1000


def test_nothing_said(server):
    with server.connect("/sherpa-offline") as client:
        for num_samples in (0, 16_000):
            client.send(recording(np.zeros(num_samples)))
            assert client.receive()["text"] == ""
