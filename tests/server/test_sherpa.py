"""sherpa-onnx's protocol, in the messages that its Python clients send and read."""

import json

import numpy as np


def play(client, samples):
    client.play(samples.astype(np.float32) / np.float32(32768), block_len=1600)


def answers(client):
    """As its client reads: until "Done!"."""
    found = []
    while (message := client.websocket.recv(120)) != "Done!":
        found.append(json.loads(message))
    return found


def test_segments(server, speech, expected, demo):
    with server.connect("/sherpa") as client:
        play(client, speech())
        client.send("Done")
        found = answers(client)
        play(client, speech())  # its C++ server takes another source, too
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


def test_the_end_of_the_audio_within_a_segment(server, speech):
    with server.connect("/sherpa") as client:
        play(client, speech()[:24_000])
        client.send("Done")
        found = answers(client)
    assert [answer["is_eof"] for answer in found] == [False] * (len(found) - 1) + [True]


def test_nothing_said(server):
    with server.connect("/sherpa") as client:
        play(client, np.zeros(16_000))
        client.send("Done")
        found = answers(client)
    assert found[-1]["is_final"]  # its Python client parses the last one
    assert [answer["text"] for answer in found if answer["text"]] == []
