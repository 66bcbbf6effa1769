"""Protocols over WebSocket: common behaviour, and the messages of each protocol's clients."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from dialects import END, START, audio_messages, float32

from u2moe.runtime.result import Alternative
from u2moe.runtime.server.protocols import PROTOCOLS, wenet

ERROR_FIELDS = {"/stream": "message", "/wenet": "message", "/vosk": "error"}
"""Field of the error message in the last message. Other protocols only have a close reason."""


@pytest.mark.parametrize("name", [name for name, each in PROTOCOLS.items() if each.path and each.may_have_port])
def test_a_port_of_its_own(server, speech, texts, name):
    path = PROTOCOLS[name].path
    with server.connect("/", port=server.ports[name], origin="https://wenet.example") as client:
        for message in (*START[path], *audio_messages(path, speech()[: len(speech()) // 2]), END[path]):
            client.send(message)
        assert texts[0] in " ".join(client.rest("Done!"))


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
    ("/stream", ['{"hotwords": ["' + "A" * 300 + '"]}'], "200 characters"),
    ("/stream", ['{"hotwords": [' + ",".join(['"A"'] * 1001) + "]}"], "1000 hotwords"),
    ("/stream", ['{"hotwords": [' + ",".join(['"A"'] * 20_000) + "]}"], "10000 commas, got 19999"),
    ("/stream", ['{"endpoint": {"rule4": null}}'], "rule4"),
    ("/stream", ['{"endpoint": {"rule3": null}}'], "rule3 must end segments"),
    ("/stream", ['{"endpoint": 3}'], "endpoint must be an object, got 3"),
    ("/stream", ['{"endpoint": {"rule1": {"silence": 1}}}'], "unknown option 'silence': must be one of must_contain"),
    ("/stream", ['{"endpoint": {"rule3": {"min_utterance_length": 0.1}}}'], "rule3 must wait 1 s"),
    ("/stream", ['{"endpoint": {"rule1": {"min_trailing_silence": 0.3}}}'], "rule1 must wait 1 s"),
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
    ("/stream", ['{"sample_rate": -Infinity}'], "invalid JSON"),
    ("/stream", [r'{"hotwords": ["\ud83d"]}'], "surrogate"),
    ("/stream", [r'{"hotwords": ["\ud83d\ude00"]}'], "\U0001f600"),  # a complete pair
    ("/stream", ['{"encoding": "pcm_f32le"}', np.full(1000, np.nan, np.float32).tobytes()], "NaN"),
])  # fmt: skip
def test_what_is_wrong_is_answered(server, path, messages, complaint):
    with server.connect(path) as client:
        for message in messages:
            client.send(message)
        said = client.rest()
        assert client.websocket.close_code == {each.path: each.close_code for each in PROTOCOLS.values()}[path]
        told = json.loads(said[-1])[ERROR_FIELDS[path]] if path in ERROR_FIELDS else client.websocket.close_reason
    assert complaint in told


@pytest.mark.parametrize("sample_rate", [16_000, 44_100])
def test_finals_are_the_segments_of_transcribe_and_partials_precede_them(server, speech, expected, sample_rate):
    *events, done = server.recognised(speech(sample_rate), sample_rate=sample_rate, nbest=100)
    segments = expected(sample_rate).segments
    assert {event["segment"] for event in events} == set(range(len(segments))) >= {0, 1}
    for number, segment in enumerate(segments):
        *partials, final = [event for event in events if event["segment"] == number]
        assert final == json.loads(json.dumps({"type": "final", **dataclasses.asdict(segment)}))
        assert {(event["type"], event["is_final"]) for event in partials} == {("partial", False)}
    assert done == {"type": "done", "duration": round(len(speech(sample_rate)) / sample_rate, 3)}


def test_options_and_endpoint_rules_of_the_client_also_in_small_fragments(server, speech, texts):
    data = float32(speech())
    with server.connect() as client:
        client.start(encoding="pcm_f32le", partials=False, words=False)
        client.send(data[start : start + 200] for start in range(0, len(data), 200))
        events = client.finish()
    assert [event["type"] for event in events] == ["final"] * len(texts) + ["done"]
    assert [event["text"] for event in events[:-1]] == texts
    assert all("words" not in event and len(event["nbest"]) == 1 for event in events[:-1])
    rules = {"rule1": None, "rule2": None, "rule3": {"min_utterance_length": 3.0}, "pause": None, "turn": 0.1}
    finals = server.recognised(speech(), endpoint=rules, partials=False)[:-1]
    assert len(finals) >= 3
    assert all(final["end"] - final["start"] <= 3.0 for final in finals)


def test_nothing_said(server):
    before, num_open = server.metric("failures", "request"), server.server.connections.num_open
    events = server.recognised(np.zeros(80_000, np.int16))
    assert [event["type"] for event in events if event["type"] != "partial"] == ["done"]
    assert server.recognised(b"") == [{"type": "done", "duration": 0.0}]
    server.wait_until(lambda: server.server.connections.num_open <= num_open)
    assert server.metric("failures", "request") == before  # although the client's close frame came last


def speak_to_wenet(client, samples, late_len=0, **start):
    client.tell(signal="start", **start)
    assert client.receive() == {"status": "ok", "type": "server_ready"}
    client.play(samples[: len(samples) - late_len], block_len=8000)  # half a second, as WeNet's client sends
    client.tell(signal="end")
    client.play(samples[len(samples) - late_len :])
    return client.receive_until("speech_end")


def sentences(events, kind="final_result"):
    # `nbest` is a string, which the C++ and web clients parse again.
    return [json.loads(event["nbest"]) for event in events if event["type"] == kind]


def test_continuous_decoding_of_wenet_whose_end_may_overtake_the_last_audio(
    server, demo, speech, expected, texts, monkeypatch
):
    monkeypatch.setattr(wenet, "_LATE_AUDIO_S", 2.0)  # for a busy machine
    with server.connect("/wenet") as client:
        events = speak_to_wenet(client, speech(), late_len=48_000, nbest=5, continuous_decoding=True)
        assert client.close_code() == 1000
    finals = sentences(events)
    assert [final[0]["sentence"] for final in finals] == texts
    for final, segment in zip(finals, expected().segments, strict=True):
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


def test_one_utterance_of_wenet_even_of_nothing_unless_asked_for_more(server, speech, texts):
    with server.connect("/wenet") as client:
        events = speak_to_wenet(client, speech())
    assert [final[0]["sentence"] for final in sentences(events)] == texts[:1]
    with server.connect("/wenet") as client:
        events = speak_to_wenet(client, np.zeros(16_000, np.int16))
    assert sentences(events) == [[{"sentence": "", "word_pieces": []}]]


def test_times_of_units_are_those_of_wenet(demo):
    """Times of asr_decoder.cc: 100 ms before the peak, or the middle between two close peaks."""
    frame_s = demo.bundle.manifest.frame_s
    times = [frame_s * peak for peak in (1, 6, 7, 30)]
    alternative = Alternative(text="", tokens=[1, 2, 3, 4], score=0, ctc_score=0, attention_score=None, times=times)
    one, six, seven, thirty = (round(1000 * frame_s) * peak for peak in (1, 6, 7, 30))
    pieces = [(piece["start"], piece["end"]) for piece in wenet._pieces(alternative, demo)]
    assert pieces == [(0, one), (six - 100, six), (six, seven), (thirty - 100, thirty)]


def speak_to_sherpa(client, samples):
    """Return the answers up to "Done!", as sherpa-onnx's Python client reads them."""
    client.play(samples.astype(np.float32) / np.float32(32768), block_len=1600)
    client.send("Done")
    return [json.loads(message) for message in client.rest("Done!")[:-1]]


def test_segments_of_sherpa_and_the_end_within_a_segment_and_without_one(server, speech, expected, texts, demo):
    sources = speech(), speech()[:24_000], np.zeros(16_000)
    with server.connect("/sherpa") as client:
        found, cut, silent = (speak_to_sherpa(client, each) for each in sources)  # as its C++ server accepts them
    finals = [answer for answer in found if answer["is_final"]]
    assert [final["text"] for final in finals] == texts
    for final, segment in zip(finals, expected().segments, strict=True):
        assert final["segment"] == segment.segment
        assert [final["start_time"] + time for time in final["timestamps"]] == segment.times
        assert len(final["tokens"]) == len(segment.times)
        assert set(final["tokens"]) <= set(demo.vocabulary.symbols)
    assert any(not answer["is_final"] for answer in found)
    assert [answer["is_eof"] for answer in cut] == [False] * (len(cut) - 1) + [True]
    assert cut[-1]["text"]
    assert silent[-1]["is_final"]  # its Python client uses the last one
    assert [answer["text"] for answer in silent if answer["text"]] == []


def test_recordings_of_sherpa_in_sequence(server, speech, expected):
    """Messages are split as its Python clients split them, and anywhere."""
    with server.connect("/sherpa-offline") as client:
        spoken = (16_000, speech(), 10_240), (8000, speech(8000), 9999)
        silent = (16_000, np.zeros(0), 8), (16_000, np.zeros(16_000), 10_240)
        for sample_rate, samples, block_len in spoken + silent:
            data = float32(samples)
            data = struct.pack("<ii", sample_rate, len(data)) + data
            for start in range(0, len(data), block_len):
                client.send(data[start : start + block_len])
            answer = client.receive()
            segments = expected(sample_rate).segments if samples.any() else []
            assert answer["text"] == (expected(sample_rate).text if samples.any() else "")
            assert answer["timestamps"] == [time for segment in segments for time in segment.times]
            assert len(answer["tokens"]) == len(answer["timestamps"])
        client.send("Done")
        assert client.close_code() == 1000


def speak_to_vosk(client, samples, block_len=4000):
    """Send and receive in turn, as vosk's test.py does; return the answers to blocks, and the last."""
    found = []
    for start in range(0, len(samples), block_len):
        client.send(samples[start : start + block_len].tobytes())
        found.append(client.receive())
    client.send('{"eof" : 1}')
    return [*found, client.receive()]


def texts_of(answers):
    return [answer["text"] for answer in answers if answer.get("text")]


def test_one_answer_of_vosk_to_each_message_at_8_kilohertz_without_configuration(server, speech, expected):
    with server.connect("/vosk") as client:
        client.send('{ "config" : { "sample_rate" : 16000 } }')
        found = speak_to_vosk(client, speech())
        assert client.close_code() == 1000
    assert [answer for answer in found if answer.get("text")] == [
        {"result": [{"conf": w.confidence, "end": w.end, "start": w.start, "word": w.word} for w in each.words],
         "text": each.text} for each in expected().segments
    ]  # fmt: skip
    assert any(answer.get("partial") for answer in found)
    assert all(("partial" in answer) != ("text" in answer) for answer in found)
    with server.connect("/vosk") as client:
        assert texts_of(speak_to_vosk(client, speech(8000))) == [segment.text for segment in expected(8000).segments]
    with server.connect("/vosk") as client:
        assert speak_to_vosk(client, b"") == [{"text": ""}]
        assert client.close_code() == 1000


def test_a_reset_and_a_later_configuration_of_vosk(server, speech, expected, texts):
    samples = speech()
    with server.connect("/vosk") as client:
        client.send('{"config": {"sample_rate": 16000}}')
        client.send(samples[:20_000].tobytes())
        client.receive()
        client.send('{"reset" : 1}')
        assert "text" in client.receive()
        client.send(samples[:8000].tobytes())
        assert client.receive() == {"partial": ""}
        # Settings that can still change apply, as in vosk's server
        client.send('{"config": {"sample_rate": 8000, "words": 0}}')
        found = speak_to_vosk(client, samples[8000:])
    assert [answer for answer in found if answer.get("text")] == [{"text": text} for text in texts]
    with server.connect("/vosk") as client:
        client.send('{"config": {"sample_rate": "16000", "max_alternatives": "2"}}')  # text, as some clients send
        client.send('{"config": {"words": 0, "phrase_list": null}}')
        found = speak_to_vosk(client, samples)
    finals = [answer["alternatives"] for answer in found if "alternatives" in answer]
    told = [[alternative["text"] for alternative in final] for final in finals if final[0]["text"]]
    assert told == [[alternative.text for alternative in segment.nbest[:2]] for segment in expected().segments]
    assert not any("result" in alternative for final in finals for alternative in final)


def test_a_message_to_vosk_with_more_segments_than_wait_for_a_client(server, speech, expected, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.scheduler._MAX_UNREAD", 3)
    with server.connect("/vosk") as client:
        client.send('{"config": {"sample_rate": 16000}}')
        client.send(np.tile(speech(), 2).tobytes())
        text = client.receive()["text"]
        client.send('{"eof" : 1}')
        text = f"{text} {client.receive()['text']}".strip()
        assert client.close_code() == 1000
    assert len(expected().segments) == 3
    assert text.startswith(expected().text)
    assert len(text) > 1.8 * len(expected().text)


def test_vosk_says_only_the_phrases(server, speech):
    """Phrases that the vocabulary cannot spell are ignored."""
    found = {}
    for others in ([], ["[unk]"]):
        with server.connect("/vosk") as client:
            client.tell(config={"sample_rate": 16000, "phrase_list": ["seven", "what do you", "24/7", "a|b", *others]})
            found[bool(others)] = " ".join(texts_of(speak_to_vosk(client, speech())))
    assert {*found[False].split()} <= {"SEVEN", "WHAT", "DO", "YOU"}
    assert {*found[True].split()} <= {"SEVEN", "WHAT", "DO", "YOU", "[unk]"}
    assert "[unk]" in found[True]
    assert "WHAT DO YOU" in found[True]
