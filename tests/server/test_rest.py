"""OpenAI's REST API, with OpenAI's client, and untrusted files: their effects, and fairness among clients."""

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
import soundfile
from dialects import PATIENCE_S, upload
from media import write_media

from u2moe.runtime import AudioError, format_transcript
from u2moe.runtime.audio import decoder
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.server.log import Metrics
from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.server.protocols.rest import RESPONSE_FORMATS
from u2moe.runtime.server.service import Service

CLIP = DEMO_FOLDER / "clips" / "command.flac"
FILE = {"file": (CLIP.name, CLIP.read_bytes())}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def short(demo):
    return demo.transcribe(CLIP)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


def test_json_with_empty_fields_or_plain_names_and_errors_of_other_paths(short, server):
    with httpx.Client(trust_env=False, timeout=PATIENCE_S) as http:
        for _ in range(3):
            data = {"response_format": "", "language": ""}
            answer = http.post(f"{server.url}/v1/audio/transcriptions", files=FILE, data=data)
            assert answer.json()["text"] == short.text
    data = {"response_format": "verbose_json", "timestamp_granularities": "word"}
    answer = server.post(data=data, files=FILE).json()
    assert answer["words"]
    assert answer["language"] == "en"  # the model's only language
    assert "segments" not in answer
    assert server.get("/v1/chat/completions").json()["error"]["type"] == "invalid_request_error"
    answer = server.get("/v1/audio/transcriptions")
    assert (answer.status_code, answer.headers["Allow"], "error" in answer.json()) == (405, "POST", True)
    answer = httpx.post(f"{server.url}/v1/audio/translations", trust_env=False)
    assert answer.status_code == 404
    assert "does not translate" in answer.json()["error"]["message"]


def test_formats_segments_of_verbose_json_and_events(client, short, talk, demo):
    for form in RESPONSE_FORMATS.keys() - {"json", "verbose_json"}:
        answer = client.audio.transcriptions.create(model="u2moe", file=CLIP, response_format=form)
        assert answer == (short.text + "\n" if form == "text" else format_transcript(short, form, name=CLIP.name)), form
    answer, transcript = client.audio.transcriptions.create(model="whisper-1", file=talk), demo.transcribe(talk)
    assert answer.text == transcript.text
    assert answer.usage.seconds == pytest.approx(transcript.duration, abs=0.01)
    answer = client.audio.transcriptions.create(
        model="u2moe", file=talk, language="en", response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )  # fmt: skip
    words = [word for segment in transcript.segments for word in segment.words]
    assert [(word.word, word.start, word.end) for word in answer.words] == [(w.word, w.start, w.end) for w in words]
    assert [(each.text, each.start, each.end, each.tokens) for each in answer.segments] == [
        (segment.text, segment.start, segment.end, segment.tokens) for segment in transcript.segments
    ]
    assert all(segment.avg_logprob <= 0 for segment in answer.segments)
    assert (answer.language, answer.text) == ("en", transcript.text)
    *deltas, done = client.audio.transcriptions.create(model="u2moe", file=talk, stream=True)
    assert [event.type for event in deltas] == ["transcript.text.delta"] * len(transcript.segments)
    assert done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text == transcript.text


def test_damage_after_the_first_event_is_told_without_names_of_the_server(server, client, talk, tmp_path):
    file = tmp_path / "cut.wav"
    file.write_bytes(talk.read_bytes()[:-40_000])
    failures = server.metric("failures", "request")
    events = client.audio.transcriptions.create(model="u2moe", file=file, stream=True)
    assert next(events).delta
    with pytest.raises(openai.APIError) as caught:
        list(events)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.message.startswith("cut.wav: ")
    assert server.metric("failures", "request") == failures + 1


def test_hotwords_in_the_prompt_and_models(client, assert_hotwords, demo):
    client.audio.transcriptions.create(model="u2moe", file=CLIP, prompt="Seventy, what do you.\n\u4e2d\u6587")
    assert_hotwords("Seventy", "what do you")
    models = client.models.list().data
    assert [model.id for model in models] == [demo.bundle.path.name]
    assert client.models.retrieve(models[0].id).object == "model"
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.models.retrieve("gpt-4o")


def test_something_is_sent_while_a_file_is_recognised(running, held, short, monkeypatch):
    """Blanks precede JSON, and progress is reported among events. A later error truncates the response."""
    monkeypatch.setattr("u2moe.runtime.server.protocols.rest._SILENCE_S", 0.05)
    monkeypatch.setattr("u2moe.runtime.server.protocols.rest._PROGRESS_S", 0.05)
    held.failure = AudioError("damaged")
    with running(held) as server, ThreadPoolExecutor() as pool:
        damaged = pool.submit(server.post, files=FILE)
        assert held.is_held.wait(PATIENCE_S)
        time.sleep(0.2)
        held.release()
        with pytest.raises(httpx.RemoteProtocolError):
            damaged.result()
        server.wait_until(lambda: server.metric("failures", "request") == 1)
        assert not server.metric("failures", "recognition")
        held.is_held.clear()
        held.may_go_on.clear()
        plain = pool.submit(server.post, files=FILE)
        assert held.is_held.wait(PATIENCE_S)
        events = pool.submit(server.post, files=FILE, data={"stream": "true", "response_format": "verbose_json"})
        time.sleep(0.3)
        held.release()
        lines = [json.loads(line[6:]) for line in events.result().text.splitlines() if line.startswith("data: {")]
        assert lines[0]["type"] == "transcript.progress"
        assert plain.result().text.startswith("  ")
        assert plain.result().json()["text"] == short.text
        found = [line["segment"]["text"] for line in lines if line["type"] == "transcript.text.delta"]
        assert found == [segment.text for segment in short.segments]
        assert lines[-1]["usage"]["seconds"] == pytest.approx(short.duration, abs=0.01)


@pytest.mark.parametrize(("content", "complaint", "parameter"), [
    ({"data": {"response_format": "docx"}, "files": FILE}, "", "response_format"),
    ({"data": {"timestamp_granularities[]": "sentence"}, "files": FILE}, "", "timestamp_granularities"),
    ({"data": {"temperature": "hot"}, "files": FILE}, "", "temperature"),
    ({"data": {"written": "maybe"}, "files": FILE}, "", "written"),
    ({"data": {"hotwords": '{"a": 1}'}, "files": FILE}, "", "hotwords"),
    ({"content": b"RIFF"}, "expected a form", "file"),
    ({"json": {"file": "talk.wav"}}, "expected a form", "file"),
    ({"data": {"model": "u2moe"}, "files": {"other": b""}}, "a file in the field 'file'", "file"),
    ({"files": [("file", ("a.wav", b"")), ("file", ("b.wav", b""))]}, "number of files is 1", None),
    ({"files": {f"f{i}": (None, "x") for i in range(60)}}, "number of fields is 50", None),
    ({"files": {"prompt": (None, "x" * 100_000)}}, "maximum size of 64KB", None),
    ({"content": b"--", "headers": {"Content-Type": f"multipart/form-data; boundary={300 * 'x'}"}}, "is damaged", None),
    ({"content": b"--x\r\nno", "headers": FORM}, "a file in the field", "file"),
    ({"content": b"--x\r\n", "headers": FORM}, "a file in the field", "file"),
    ({"content": b"garbage", "headers": FORM}, "the form", None),
    ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, "Missing boundary", None),
    ({"content": b"", "headers": {"Content-Encoding": "gzip"}}, "must not be compressed", None),
    ({"files": {"file": ("empty.wav", b"")}}, "empty.wav: cannot be read as audio", "file"),
    ({"files": {"file": ("a.mp3", b"no sound" * 100)}}, "a.mp3: cannot be read as audio", "file"),
])  # fmt: skip
def test_what_is_wrong_is_answered_without_names_of_the_server(server, content, complaint, parameter):
    answer = server.post(**content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", parameter)
    assert complaint in error["message"]
    assert "u2moe-" not in error["message"]


CRASH = """
import os
import u2moe.runtime.audio.decoder as decoder

def crash(file, *given, read=decoder.read_blocks, **more):
    return read(file, *given, **more) if getattr(file, "name", "") != "crash.mp3" else file.read(10) and os.abort()

decoder.read_blocks = crash
decoder.main()
"""


def test_media_files_of_many_channels_and_libraries_that_print_nothing(server, short, tmp_path, capfd):
    """PyAV counted nine for eight planar channels, which crashed the server. 255 channels took four gigabytes."""
    samples, _ = soundfile.read(CLIP, dtype="float32", always_2d=True)
    for name, tracks in (("talk.wv", [np.repeat(samples, 8, axis=1)]), ("talk.mp4", [samples[:, 0]])):  # lossless
        file = write_media(tmp_path / name, tracks)
        assert server.post(files={"file": (name, file.read_bytes())}).json()["text"] == short.text
    with soundfile.SoundFile(tmp_path / "many.ogg", "w", 192_000, 255, "VORBIS", format="OGG") as many:
        many.write(np.zeros((100, 255), np.float32))
    answer = server.post(files={"file": ("many.ogg", (tmp_path / "many.ogg").read_bytes())})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "many.ogg: has 255 channels, expected at most 64"
    # libmpg123 prints errors about damaged frames
    content = io.BytesIO()
    soundfile.write(content, np.random.default_rng(0).normal(0, 0.1, 48_000), 16_000, format="MP3")
    damaged = bytearray(content.getvalue())
    for place in range(1000, len(damaged), 300):
        damaged[place : place + 4] = b"\xff\xfb\xff\xff"
    server.post(files={"file": ("odd.mp3", bytes(damaged))})
    assert capfd.readouterr() == ("", "")


def test_a_file_that_crashes_its_decoder_is_an_error_for_it_alone(running, short, monkeypatch, caplog):
    monkeypatch.setattr(decoder, "_CODE", CRASH)
    with running() as server, ThreadPoolExecutor() as pool:
        names = ["talk.wav", "crash.mp3", "talk.wav", "crash.mp3", "talk.wav"]
        answers = list(pool.map(lambda name: server.post(files={"file": (name, CLIP.read_bytes())}), names))
        assert [answer.status_code for answer in answers] == [200, 400, 200, 400, 200]
        assert {answer.json()["text"] for answer in answers[::2]} == {short.text}
        error = answers[1].json()["error"]
        assert error["param"] == "file"
        assert error["message"].startswith("crash.mp3: cannot be decoded: the decoder process died")
        assert server.metric("failures", "decoder") == 2
    assert sum("crashed the decoder process" in record.getMessage() for record in caplog.records) == 1


def test_a_short_file_does_not_wait_for_a_long_one(server, short):
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", 8000, 1, format="FLAC") as file:
        for _ in range(40):
            file.write(np.zeros(8000 * 60, np.int16))
    body = upload(content.getvalue())
    kind = f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.open_plain() as plain:
        plain.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\n{kind}".encode() + body)
        server.wait_until(lambda: any(task.duration > 30 for task in server.service.files._running))
        assert server.post(files=FILE).json()["text"] == short.text
        server.wait_until(lambda: len(server.service.files._running) == 1)
        (long,) = server.service.files._running
        assert 30 < long.duration < long.whole_s == 2400
    server.wait_until_empty()
    server.wait_until(lambda: not server.service.files._running)
    assert len(server.service.files._decoders) == 1


def test_one_client_leaves_places_and_turns_to_others(running, held, short, monkeypatch):
    """One of four uploads of an address is refused. Another address comes next although it came last."""
    monkeypatch.setattr("u2moe.runtime.server.files._AT_ONCE", 1)
    with running(held, max_files=5) as server, ThreadPoolExecutor() as pool:
        order, post = [], pool.submit

        def send(address):
            with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=PATIENCE_S) as http:
                answer = http.post(f"{server.url}/v1/audio/transcriptions", files=FILE)
            order.append(address)
            return answer

        greedy = [post(send, "127.0.0.1")]
        assert held.is_held.wait(PATIENCE_S)
        greedy.append(post(send, "127.0.0.1"))
        server.wait_until(lambda: len(server.service.files._tasks) == 1)
        refused = send("127.0.0.1")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert (refused.json()["error"]["type"], refused.json()["error"]["code"]) == ("server_error", "rate_limit")
        other = post(send, "127.0.0.2")
        server.wait_until(lambda: len(server.service.files._tasks) == 2)
        held.release()
        answers = [each.result() for each in (*greedy, other)]
        assert {answer.json()["text"] for answer in answers} == {short.text}
        assert order == ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.1"]  # the first was refused
        server.wait_until_empty()
        assert not server.service.files._placed


def test_who_a_client_is(demo, tmp_path):
    (tmp_path / "keys").write_text("alice a 2\nbob b\n", encoding="utf-8")
    options = ServerOptions(keys_file=tmp_path / "keys"), ServerOptions(api_key="k")
    several, single = (Service({"demo": demo}, each, Metrics()) for each in options)
    for service, key, host, client in (
        (several, several.keys.find(["a"]), "10.0.0.1", "key alice"),
        (single, single.keys.find(["k"]), "10.0.0.1", "10.0.0.1"),
        (single, None, "2001:db8::1:2", "2001:db8::/64"),
        (single, None, "unknown", "unknown"),
    ):
        assert service.client_of({"u2moe.key": key, "client": (host, 1)}) == client
    assert single.client_of({"u2moe.key": None, "client": None}) == ""


def test_one_client_leaves_room_to_others(running, held, monkeypatch):
    room, content = SimpleNamespace(free=3 << 20), io.BytesIO()
    soundfile.write(content, *soundfile.read(CLIP), format="WAV")
    clip = content.getvalue()
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    with running(held) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(server.post, files={"file": ("a.wav", clip + bytes(2 << 20))})
        assert held.is_held.wait(PATIENCE_S)
        assert server.post(files={"file": ("b.wav", bytes(2 << 20))}).status_code == 507
        held.release()
        assert first.result().status_code == 200
        server.wait_until_empty()
        assert server.post(files={"file": ("b.wav", clip + bytes(4 << 20))}).status_code == 200  # its only file
