"""Selection of one of several models in each protocol, and decoding options of clients."""

import contextlib
import dataclasses
import gc
import itertools
import json

import numpy as np
import pytest
import soundfile
from dialects import END, START, WYOMING_AUDIO, audio_messages, wyoming_event
from tones import say, toy_recognizer

from u2moe.runtime import DecodingOptions, Grammar, Recognizer, TextFormat
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.protocols import PROTOCOLS

CHOOSE = {
    "/stream": '{"model": "tones"}',
    "/vosk": '{"config": {"sample_rate": 16000, "model": "tones"}}',
    "/v1/realtime": '{"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcm", '
    '"rate": 16000}, "turn_detection": null, "transcription": {"model": "tones"}}}}}',
}
"""First messages that name a model, by path. Other protocols use the URL."""


@pytest.fixture(scope="module")
def both(running, demo):
    """Return a server with two models. English is the default; the other one understands only tones."""
    with running({"english": demo, "tones": toy_recognizer()}, protocol_ports={"wyoming": 0}) as server:
        yield server


@pytest.fixture(scope="module")
def tones():
    return (np.clip(say("ABCD", [0.3] * 4)[0], -1, 1) * 32767).astype(np.int16)


def begin(client, path, samples, start=None):
    for message in ([start] if start else START[path], audio_messages(path, samples), [END[path]]):
        for part in message:
            client.send(part)


def said(client, path):
    if path == "/v1/realtime":
        return json.dumps(client.receive_until("conversation.item.input_audio_transcription.completed"))
    return " ".join(client.rest("Done!"))


@pytest.mark.parametrize("path", [protocol.path for protocol in PROTOCOLS.values() if protocol.path])
def test_a_client_chooses_while_another_has_the_default(both, speech, expected, tones, path):
    samples = speech()[: len(speech()) // 2]  # up to the second pause
    other_path = path if path in CHOOSE else f"{path}?model=tones"
    # Without a limit, because this client ends before it has read all, and would otherwise wait for itself.
    with both.connect(path, max_queue=None) as one, both.connect(other_path, max_queue=None) as other:
        begin(other, path, tones, CHOOSE.get(path))
        begin(one, path, samples)
        assert "A B C D" in said(other, path)
        assert expected().segments[0].text in said(one, path)
    with both.connect(f"{path}?model=tones") as client:
        begin(client, path, tones)
        assert "A B C D" in said(client, path)
    with both.connect(f"{path}?model=none") as client:
        told = " ".join(client.rest()) + client.websocket.close_reason
        assert "unknown model 'none': must be one of english, tones" in told


def test_a_file_has_the_model_of_its_form_even_without_a_beam(both, demo, tones, tmp_path, running):
    soundfile.write(tmp_path / "tones.wav", tones, 16_000)
    file = {"file": (tmp_path / "tones.wav").read_bytes()}
    assert [model["id"] for model in both.get("/v1/models").json()["data"]] == ["english", "tones"]
    assert both.post(data={"model": "tones"}, files=file).json()["text"] == "A B C D"
    assert both.post(files=file).json()["text"] != "A B C D"
    answer = both.post(data={"model": "whisper-1"}, files=file)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_found")
    # It refuses hotwords and language models, and ignores prompts
    with running(Recognizer(demo.bundle, demo.model, DecodingOptions(search="ctc_greedy"))) as server:
        for name in ("hotwords", "lm_weight", "grammar"):
            with server.connect() as client:
                client.tell(**{name: {**ASKED, **GRAMMAR}[name]})
                assert client.receive()["parameter"] == name
        assert server.post(data={"prompt": "SEVEN"}, files={"file": b"RIFF"}).json()["error"]["param"] == "file"


@pytest.mark.parametrize("asked", [{"name": "tones"}, {"name": "none"}, {"language": "de"}, {"language": "en-GB"}])
def test_wyoming_names_a_model_or_a_language(both, tones, asked):
    audio = wyoming_event("audio-chunk", WYOMING_AUDIO, tones.tobytes()) + wyoming_event("audio-stop")
    asking = wyoming_event("describe") + wyoming_event("transcribe", asked)
    answer = both.answer(asking + audio, "wyoming").decode()
    assert '"name": "english"' in answer
    assert '"name": "tones"' in answer
    assert ("A B C D" in answer) == (asked == {"name": "tones"})
    assert ("unknown model" in answer) == (asked == {"name": "none"})


ASKED = {"written": True, "beam_size": 3, "lm_weight": 1.5, "blank_penalty": 8.0, "hotwords": [["BACK", 9.0], "THREE"]}
GRAMMAR = {"grammar": ["back to work", "[unk]"]}


@pytest.mark.parametrize("asked", [{}, ASKED, {"lm_weight": 0}, GRAMMAR])
def test_a_request_says_how_it_is_decoded(server, speech, demo, tmp_path, asked):
    assert REQUEST_OPTIONS.keys() == ASKED.keys() | GRAMMAR.keys()
    model, samples = server.service.default, speech()[: len(speech()) // 2]
    hotwords = [tuple(each) if isinstance(each, list) else each for each in asked.get("hotwords", [])]
    changes = {name: asked[name] for name in ("beam_size", "blank_penalty") if name in asked}
    if asked.get("written"):
        changes["text_format"] = TextFormat()
    if (weight := asked.get("lm_weight")) is not None:
        changes["language_model"] = dataclasses.replace(demo.language_model, weight=weight) if weight else "none"
    if "grammar" in asked:
        changes |= {"grammar": Grammar(lines=asked["grammar"]), "language_model": "none"}
    live, whole = (
        demo.transcribe(samples, options=dataclasses.replace(default, **changes), hotwords=hotwords or None)
        for default in (model.stream_options, model.recognizer.options)
    )
    finals = server.recognised(samples, **asked, nbest=3, partials=False)[:-1]
    assert [final["text"] for final in finals] == [segment.text for segment in live.segments]
    languages = [[each.language_score for each in segment.nbest[:3]] for segment in live.segments]
    assert [[each["language_score"] for each in final["nbest"]] for final in finals] == languages
    soundfile.write(tmp_path / "talk.wav", samples, 16_000)
    form = {name: json.dumps(value) for name, value in asked.items()}
    file = {"file": (tmp_path / "talk.wav").read_bytes()}
    assert server.post(data=form, files=file).json()["text"] == whole.text
    update = json.loads(CHOOSE["/v1/realtime"])
    update["session"]["audio"]["input"]["transcription"] = asked
    with server.connect("/v1/realtime") as client:
        begin(client, "/v1/realtime", samples, json.dumps(update))
        assert live.text in said(client, "/v1/realtime")


def test_few_weights_of_a_language_model_are_kept(server):
    """Each takes as much memory as the model: unused ones are dropped, and the number in use is limited."""
    prepared = server.service.default._weighted
    for number in range(1, 12):
        with server.connect() as client:
            client.start(lm_weight=number / 10)
    server.wait_until_empty()
    gc.collect()
    assert len(prepared) <= 4
    with contextlib.ExitStack() as stack:
        for number, client in enumerate([stack.enter_context(server.connect()) for _ in range(5)]):
            client.tell(lm_weight=1 + number / 10)
            answer = client.receive()
        assert (answer["type"], answer["code"]) == ("error", 1013)
    server.wait_until_empty()


WRONG = {"written": 1, "beam_size": 41, "lm_weight": 3, "blank_penalty": 11, "hotwords": ["\u4e2d"], "language": "de",
         "grammar": ["<digit>"]}  # fmt: skip


def test_a_grammar_with_too_many_ways_to_go_on_is_refused(server):
    """Optional letters: with a few more phrases, one stream took 60 times the work of a plain one."""
    lines = [" ".join(f"[{letter}]" for letter in letters * 4) + " A" for letters in itertools.permutations("EIOTN")]
    with server.connect() as client:
        client.tell(grammar=lines)
        assert "10000 ways to go on" in client.receive()["message"]
    with server.connect() as client:
        client.start(grammar=lines[:20])


def test_slots_do_not_multiply_the_work_of_the_server(server):
    """340 characters made a graph of 107 MB, and 500 kept a thread busy for hours."""
    for line, told in (
        ("<a{next}> <a{next}>", "at most 30000 characters, with its slots"),
        ("<a{next}> | <a{next}>", "steps, expected fewer"),
        ("[<a{next}>] [<a{next}>]", "steps, expected fewer"),
    ):
        depth = 14 if "30000" in told else 40
        slots = [f"<a{number}> = {line.format(next=number + 1)}" for number in range(depth)]
        with server.connect() as client:
            client.tell(grammar=["<a0>", *slots, f"<a{depth}> = A"])
            assert told in client.receive()["message"]
    server.wait_until_empty()


@pytest.mark.parametrize("name", WRONG)
def test_what_is_beyond_the_limits_is_named(server, both, name):
    wrong = {name: WRONG[name]}
    answer = server.post(data={name: json.dumps(wrong[name]).strip('"')}, files={"file": b"RIFF"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    with server.connect("/v1/realtime") as client:
        client.tell(type="session.update", session={"audio": {"input": {"transcription": wrong}}})
        assert client.receive_until("error")[-1]["error"]["param"] == name
    with server.connect() as client:
        client.tell(**wrong)
        assert client.receive()["parameter"] == name
    if name == "lm_weight":
        answer = both.post(data={name: "1", "model": "tones"}, files={"file": b"RIFF"})
        assert "no language model" in answer.json()["error"]["message"]
    assert server.get("/healthz").status_code == 200
