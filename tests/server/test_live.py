"""u2moe's own protocol, `/stream`."""

import dataclasses
import json

import numpy as np
import pytest


def as_json(segment):
    return json.loads(json.dumps({"type": "final", **dataclasses.asdict(segment)}))


@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 44_100])
def test_finals_are_the_segments_of_transcribe(server, speech, expected, sample_rate):
    with server.connect() as client:
        client.start(sample_rate=sample_rate, nbest=100)
        client.play(speech(sample_rate))
        events = client.finish()
    finals = [event for event in events if event["type"] == "final"]
    transcript = expected(sample_rate)
    assert len(transcript.segments) >= 2
    assert finals == [as_json(segment) for segment in transcript.segments]
    assert events[-1] == {"type": "done", "duration": round(len(speech(sample_rate)) / sample_rate, 3)}


def test_partials_grow_before_each_final_also_of_small_fragments(server, speech, expected):
    with server.connect() as client:
        client.start()
        client.play(speech(), block_len=1600)
        events = client.finish()
    for segment in expected().segments:
        own = [event for event in events if event.get("segment") == segment.segment]
        assert [event["type"] for event in own[:-1]] == ["partial"] * (len(own) - 1)
        assert own[0]["type"] == "partial"
        assert own[-1]["type"] == "final"
        assert not any(event["is_final"] for event in own[:-1])
    data = speech().tobytes()
    with server.connect() as client:
        client.start(partials=False)
        client.send(data[start : start + 100] for start in range(0, len(data), 100))
        assert [event["text"] for event in client.finish()[:-1]] == [part.text for part in expected().segments]


def test_options_and_endpoint_rules_of_the_client(server, speech, expected):
    with server.connect() as client:
        client.start(encoding="pcm_f32le", partials=False, words=False)
        client.play(speech().astype(np.float32) / np.float32(32768))
        events = client.finish()
    assert [event["type"] for event in events] == ["final"] * len(expected().segments) + ["done"]
    assert [event["text"] for event in events[:-1]] == [segment.text for segment in expected().segments]
    assert all("words" not in event and len(event["nbest"]) == 1 for event in events[:-1])
    rules = {"rule1": None, "rule2": None, "rule3": {"min_utterance_length": 3.0}, "pause": None, "turn": 0.1}
    with server.connect() as client:
        client.start(endpoint=rules)
        client.play(speech())
        finals = [event for event in client.finish() if event["type"] == "final"]
    assert len(finals) >= 3
    assert all(final["end"] - final["start"] <= 3.0 for final in finals)


def test_nothing_said(server):
    before, num_open = server.metric("failures", "request"), server.server.connections.num_open
    with server.connect() as client:
        client.start()
        client.play(np.zeros(80_000, np.int16))
        assert [event["type"] for event in client.finish() if event["type"] != "partial"] == ["done"]
    with server.connect() as client:
        client.start()
        assert client.finish() == [{"type": "done", "duration": 0.0}]
    server.wait_until(lambda: server.server.connections.num_open <= num_open)
    assert server.metric("failures", "request") == before  # although the client's close frame came last
