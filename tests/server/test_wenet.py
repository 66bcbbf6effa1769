"""WeNet's protocol, with the messages of its clients."""

import json

import numpy as np

from u2moe.runtime.result import Alternative
from u2moe.runtime.server.protocols import wenet


def speak(client, samples, **start):
    client.tell(signal="start", **start)
    assert client.receive() == {"status": "ok", "type": "server_ready"}
    client.play(samples, block_len=8000)  # half a second, as WeNet's client sends
    client.tell(signal="end")
    return client.receive_until("speech_end")


def sentences(events, kind="final_result"):
    # `nbest` is a string, which the C++ and web clients parse again.
    return [json.loads(event["nbest"]) for event in events if event["type"] == kind]


def test_continuous_decoding(server, demo, speech, expected):
    with server.connect("/wenet") as client:
        events = speak(client, speech(), nbest=5, continuous_decoding=True)
        assert client.close_code() == 1000
    finals = sentences(events)
    segments = expected().segments
    assert [final[0]["sentence"] for final in finals] == [segment.text for segment in segments]
    for final, segment in zip(finals, segments, strict=True):
        assert [alternative["sentence"] for alternative in final] == [each.text for each in segment.nbest[:5]]
        for alternative, ours in zip(final, segment.nbest, strict=False):
            pieces = alternative["word_pieces"]
            assert [piece["word"] for piece in pieces] == [demo.vocabulary.symbols[token] for token in ours.tokens]
            for piece, time in zip(pieces, ours.times, strict=True):
                assert piece["start"] <= 1000 * time <= piece["end"] + 40  # if two units meet, rounded down to a frame
                assert piece["end"] - piece["start"] <= 140
    partials = sentences(events, "partial_result")
    assert max(map(len, partials)) == 5
    assert all(set(sentence) == {"sentence"} for partial in partials for sentence in partial)
    assert all(len({each["sentence"] for each in partial}) == len(partial) for partial in partials)
    assert all(event["status"] == "ok" for event in events)


def test_one_utterance_even_of_nothing_unless_asked_for_more(server, speech, expected):
    with server.connect("/wenet") as client:
        events = speak(client, speech())
    assert [final[0]["sentence"] for final in sentences(events)] == [expected().segments[0].text]
    with server.connect("/wenet") as client:
        events = speak(client, np.zeros(16_000, np.int16))
    assert sentences(events) == [[{"sentence": "", "word_pieces": []}]]


def test_the_end_may_overtake_the_last_audio(server, speech, expected, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.protocols.wenet._LATE_AUDIO_S", 2.0)  # for a busy machine
    samples = speech()
    with server.connect("/wenet") as client:
        client.tell(signal="start", nbest=1, continuous_decoding=True)
        client.play(samples[:-8000], block_len=8000)
        client.tell(signal="end")
        client.play(samples[-8000:])
        events = client.receive_until("speech_end")
    assert [final[0]["sentence"] for final in sentences(events)] == [segment.text for segment in expected().segments]


def test_times_of_units_are_those_of_wenet(demo):
    """Times of asr_decoder.cc: 100 ms before the peak, or the middle between two close peaks."""
    frame_s = demo.bundle.manifest.frame_s
    times = [frame_s * peak for peak in (1, 6, 7, 30)]
    alternative = Alternative(text="", tokens=[1, 2, 3, 4], score=0, ctc_score=0, attention_score=None, times=times)
    pieces = wenet._pieces(alternative, demo)
    frame_ms = round(1000 * frame_s)
    assert [(piece["start"], piece["end"]) for piece in pieces] == [
        (0, frame_ms), (6 * frame_ms - 100, 6 * frame_ms), (6 * frame_ms, 7 * frame_ms),
        (30 * frame_ms - 100, 30 * frame_ms),
    ]  # fmt: skip
