"""sherpa-onnx's protocols for streams and whole recordings, with the messages of its Python clients."""

import json
import struct

import numpy as np


def play(client, samples):
    client.play(samples.astype(np.float32) / np.float32(32768), block_len=1600)


def answers(client):
    """Return the answers up to "Done!", as its client reads them."""
    found = []
    while (message := client.websocket.recv(120)) != "Done!":
        found.append(json.loads(message))
    return found


def test_segments(server, speech, expected, demo):
    with server.connect("/sherpa") as client:
        play(client, speech())
        client.send("Done")
        found = answers(client)
        play(client, speech())  # its C++ server also accepts another stream
        client.send("Done")
        again = [answer for answer in answers(client) if answer["is_final"]]
    finals = [answer for answer in found if answer["is_final"]]
    assert [final["text"] for final in again] == [final["text"] for final in finals]
    assert [final["text"] for final in finals] == [segment.text for segment in expected().segments]
    assert [final["segment"] for final in finals] == [segment.segment for segment in expected().segments]
    for final, segment in zip(finals, expected().segments, strict=True):
        assert [final["start_time"] + time for time in final["timestamps"]] == segment.times
        assert len(final["tokens"]) == len(segment.times)
        assert set(final["tokens"]) <= set(demo.vocabulary.symbols)
    assert any(not answer["is_final"] for answer in found)


def test_the_end_of_the_audio_within_a_segment_and_without_one(server, speech):
    with server.connect("/sherpa") as client:
        play(client, speech()[:24_000])
        client.send("Done")
        found = answers(client)
    assert [answer["is_eof"] for answer in found] == [False] * (len(found) - 1) + [True]
    with server.connect("/sherpa") as client:
        play(client, np.zeros(16_000))
        client.send("Done")
        found = answers(client)
    assert found[-1]["is_final"]  # its Python client uses the last one
    assert [answer["text"] for answer in found if answer["text"]] == []


def recording(samples, sample_rate=16_000):
    data = (samples.astype(np.float32) / np.float32(32768)).tobytes()
    return struct.pack("<ii", sample_rate, len(data)) + data


def test_recordings_in_sequence(server, speech, expected):
    """Messages are split as its Python clients split them, and anywhere."""
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


def test_nothing_said_in_recordings(server):
    with server.connect("/sherpa-offline") as client:
        for num_samples in (0, 16_000):
            client.send(recording(np.zeros(num_samples)))
            assert client.receive()["text"] == ""
