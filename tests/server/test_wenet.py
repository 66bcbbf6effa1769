"""WeNet's protocol, in the messages that its clients send and read."""

import json

import numpy as np


def speak(client, samples, **start):
    client.tell(signal="start", **start)
    assert client.receive() == {"status": "ok", "type": "server_ready"}
    client.play(samples, block_len=8000)  # half a second, as WeNet's client sends
    client.tell(signal="end")
    return client.receive_until("speech_end")


def sentences(events, kind="final_result"):
    # The C++ and the web client parse `nbest` once more: it is a string.
    return [json.loads(event["nbest"]) for event in events if event["type"] == kind]


def test_continuous_decoding(server, speech, expected):
    with server.connect("/wenet") as client:
        events = speak(client, speech(), nbest=5, continuous_decoding=True)
        assert client.close_code() == 1000
    finals = sentences(events)
    segments = expected().segments
    assert [final[0]["sentence"] for final in finals] == [segment.text for segment in segments]
    for final, segment in zip(finals, segments, strict=True):
        assert [alternative["sentence"] for alternative in final] == [each.text for each in segment.nbest[:5]]
        assert final[0]["word_pieces"] == [
            {"word": word.word, "start": round(word.start * 1000), "end": round(word.end * 1000)}
            for word in segment.words
        ]
    partials = sentences(events, "partial_result")
    assert partials
    assert all(len(partial) == 1 for partial in partials)
    assert all(event["status"] == "ok" for event in events)


def test_one_utterance_unless_asked_for_more(server, speech, expected):
    with server.connect("/wenet") as client:
        events = speak(client, speech())
    assert [final[0]["sentence"] for final in sentences(events)] == [expected().segments[0].text]


def test_the_end_may_overtake_the_last_audio(server, speech, expected, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.protocols.wenet._LATE_AUDIO_S", 2.0)  # for a machine that is busy
    samples = speech()
    with server.connect("/wenet") as client:
        client.tell(signal="start", nbest=1, continuous_decoding=True)
        client.play(samples[:-8000], block_len=8000)
        client.tell(signal="end")
        client.play(samples[-8000:])
        events = client.receive_until("speech_end")
    assert [final[0]["sentence"] for final in sentences(events)] == [segment.text for segment in expected().segments]


def test_nothing_said_is_a_result_too(server):
    with server.connect("/wenet") as client:
        events = speak(client, np.zeros(16_000, np.int16))
    assert sentences(events) == [[{"sentence": "", "word_pieces": []}]]
