"""vosk-server's protocol, with the messages of its clients: each message has one answer."""

import numpy as np


def speak(client, samples, block_len=4000):
    """Send and receive in turn, as vosk's test.py does; return the answers to blocks, and the last."""
    found = []
    for start in range(0, len(samples), block_len):
        client.send(samples[start : start + block_len].tobytes())
        found.append(client.receive())
    client.send('{"eof" : 1}')
    return [*found, client.receive()]


def words(segment):
    return [
        {"conf": word.confidence, "end": word.end, "start": word.start, "word": word.word} for word in segment.words
    ]


def test_one_answer_to_each_message_at_8_kilohertz_without_configuration(server, speech, expected):
    with server.connect("/vosk") as client:
        client.send('{ "config" : { "sample_rate" : 16000 } }')
        found = speak(client, speech())
        assert client.close_code() == 1000
    finals = [answer for answer in found if answer.get("text")]
    assert finals == [{"result": words(segment), "text": segment.text} for segment in expected().segments]
    assert any(answer.get("partial") for answer in found)
    assert all(("partial" in answer) != ("text" in answer) for answer in found)
    with server.connect("/vosk") as client:
        found = speak(client, speech(8000))
    assert [answer["text"] for answer in found if answer.get("text")] == [each.text for each in expected(8000).segments]
    with server.connect("/vosk") as client:
        client.send('{"eof" : 1}')
        assert client.receive() == {"text": ""}
        assert client.close_code() == 1000


def test_a_reset_and_a_later_configuration(server, speech, expected):
    samples = speech()
    with server.connect("/vosk") as client:
        client.send('{"config": {"sample_rate": 16000}}')
        client.send(samples[:20_000].tobytes())
        client.receive()
        client.send('{"reset" : 1}')
        assert "text" in client.receive()
        found = speak(client, samples)
    assert [answer["text"] for answer in found if answer.get("text")] == [each.text for each in expected().segments]
    # Settings that can still change apply, as in vosk's server
    with server.connect("/vosk") as client:
        client.send('{"config": {"sample_rate": 16000}}')
        client.send(speech()[:8000].tobytes())
        assert client.receive() == {"partial": ""}
        client.send('{"config": {"sample_rate": 8000, "words": 0}}')
        found = speak(client, speech()[8000:])
    finals = [answer for answer in found if answer.get("text")]
    assert finals == [{"text": segment.text} for segment in expected().segments]
    with server.connect("/vosk") as client:
        client.send('{"config": {"sample_rate": "16000", "max_alternatives": "2"}}')  # text, as some clients send
        client.send('{"config": {"words": 0, "phrase_list": null}}')
        found = speak(client, speech())
    finals = [answer["alternatives"] for answer in found if "alternatives" in answer]
    texts = [[alternative["text"] for alternative in final] for final in finals if final[0]["text"]]
    assert texts == [[alternative.text for alternative in segment.nbest[:2]] for segment in expected().segments]
    assert not any("result" in alternative for final in finals for alternative in final)


def test_a_message_with_more_segments_than_wait_for_a_client(server, speech, expected, monkeypatch):
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


def test_only_the_phrases_are_said(server, speech):
    """Phrases that the vocabulary cannot spell are ignored."""
    found = {}
    for others in ([], ["[unk]"]):
        with server.connect("/vosk") as client:
            client.tell(config={"sample_rate": 16000, "phrase_list": ["seven", "what do you", "24/7", "a|b", *others]})
            answers = speak(client, speech())
        found[bool(others)] = " ".join(answer["text"] for answer in answers if answer.get("text"))
    assert {*found[False].split()} <= {"SEVEN", "WHAT", "DO", "YOU"}
    assert {*found[True].split()} <= {"SEVEN", "WHAT", "DO", "YOU", "[unk]"}
    assert "[unk]" in found[True]
    assert "WHAT DO YOU" in found[True]
