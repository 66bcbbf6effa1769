"""OpenAI's REST API, with OpenAI's client."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import soundfile
from media import write_media

from u2moe.runtime import AudioError, format_transcript
from u2moe.runtime.server.protocols.rest import RESPONSE_FORMATS


@pytest.fixture(scope="module")
def talk(tmp_path_factory, speech):
    file = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(file, speech(), 16_000)
    return file


@pytest.fixture(scope="module")
def transcript(demo, talk):
    return demo.transcribe(talk)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(api_key="none", base_url=f"{server.url}/v1", max_retries=0) as client:
        yield client


def test_json_alike_for_several_files_at_once_and_errors_of_other_paths(client, talk, transcript, server):
    answer = client.audio.transcriptions.create(model="whisper-1", file=talk)
    assert answer.text == transcript.text
    assert answer.usage.seconds == pytest.approx(transcript.duration, abs=0.01)
    with httpx.Client(trust_env=False, timeout=120) as http:
        for _ in range(3):
            content = {"file": ("talk.wav", talk.read_bytes())}
            assert http.post(f"{server.url}/v1/audio/transcriptions", files=content).json()["text"] == transcript.text
    assert server.get("/v1/chat/completions").json()["error"]["type"] == "invalid_request_error"
    answer = server.get("/v1/audio/transcriptions")
    assert (answer.status_code, answer.headers["Allow"], "error" in answer.json()) == (405, "POST", True)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_media_files(client, talk, transcript, tmp_path, suffix):
    file = write_media(tmp_path / f"talk.{suffix}", [soundfile.read(talk, dtype="float32")[0]])  # a lossless codec
    assert client.audio.transcriptions.create(model="u2moe", file=file).text == transcript.text


@pytest.mark.parametrize("form", sorted(RESPONSE_FORMATS.keys() - {"json", "verbose_json"}))
def test_formats(client, talk, transcript, form):
    answer = client.audio.transcriptions.create(model="u2moe", file=talk, response_format=form)
    assert answer == (transcript.text + "\n" if form == "text" else format_transcript(transcript, form, name=talk.name))


def test_segments_of_verbose_json_and_of_events(client, talk, transcript):
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
    events = list(client.audio.transcriptions.create(model="u2moe", file=talk, stream=True))
    assert [event.type for event in events] == ["transcript.text.delta"] * len(transcript.segments) + [
        "transcript.text.done"
    ]
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == transcript.text


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


def test_fields_without_a_value_or_with_a_plain_name(server, talk):
    files = {"file": ("talk.wav", talk.read_bytes())}
    assert server.post(data={"response_format": "", "language": ""}, files=files).json()["text"]
    data = {"response_format": "verbose_json", "timestamp_granularities": "word"}
    answer = server.post(data=data, files=files).json()
    assert answer["words"]
    assert answer["language"] == "en"  # the model's only language
    assert "segments" not in answer


def test_hotwords_in_the_prompt_and_models(client, talk, assert_hotwords, demo):
    client.audio.transcriptions.create(model="u2moe", file=talk, prompt="Seventy, what do you.\n\u4e2d\u6587")
    assert_hotwords("Seventy", "what do you")
    models = client.models.list().data
    assert [model.id for model in models] == [demo.bundle.path.name]
    assert client.models.retrieve(models[0].id).object == "model"
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.models.retrieve("gpt-4o")


def test_what_is_no_audio_is_told_without_names_of_the_server_and_nothing_translated(client, tmp_path, server):
    (tmp_path / "talk.mp3").write_bytes(b"no sound" * 100)
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(model="u2moe", file=tmp_path / "talk.mp3")
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == "file"
    assert "talk.mp3: cannot be read as audio" in caught.value.message
    assert "u2moe-" not in caught.value.message
    answer = httpx.post(f"{server.url}/v1/audio/translations", trust_env=False)
    assert answer.status_code == 404
    assert "does not translate" in answer.json()["error"]["message"]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_something_is_sent_while_a_file_is_recognised(running, held, talk, monkeypatch, is_damaged):
    """Blanks precede JSON, and progress is reported among events. A later error truncates the response."""
    monkeypatch.setattr("u2moe.runtime.server.protocols.rest._SILENCE_S", 0.05)
    monkeypatch.setattr("u2moe.runtime.server.protocols.rest._PROGRESS_S", 0.05)
    held.failure = AudioError("damaged") if is_damaged else None
    with running(held) as server, ThreadPoolExecutor() as pool:
        files = {"file": ("talk.wav", talk.read_bytes())}
        plain = pool.submit(server.post, files=files)
        assert held.is_held.wait(120)
        time.sleep(0.2)
        events = pool.submit(server.post, files=files, data={"stream": "true", "response_format": "verbose_json"})
        time.sleep(0.3)
        held.release()
        lines = [json.loads(line[6:]) for line in events.result().text.splitlines() if line.startswith("data: {")]
        assert lines[0]["type"] == "transcript.progress"
        if is_damaged:
            with pytest.raises(httpx.RemoteProtocolError):
                plain.result()
            server.wait_until(lambda: server.metric("failures", "request") == 1)
            assert not server.metric("failures", "recognition")
            return
        assert plain.result().text.startswith("  ")
        wanted = held.transcribe(talk)
        assert plain.result().json()["text"] == wanted.text
        found = [line["segment"]["text"] for line in lines if line["type"] == "transcript.text.delta"]
        assert found == [segment.text for segment in wanted.segments]
        assert lines[-1]["usage"]["seconds"] == pytest.approx(wanted.duration, abs=0.01)


@pytest.mark.parametrize(("values", "parameter"), [
    ({"response_format": "docx"}, "response_format"),
    ({"timestamp_granularities[]": "sentence"}, "timestamp_granularities"),
    ({"language": "zh"}, "language"),
    ({"temperature": "2"}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"beam_size": "-1"}, "beam_size"),
    ({"written": "maybe"}, "written"),
    ({"hotwords": '{"a": 1}'}, "hotwords"),
])  # fmt: skip
def test_a_form_that_asks_for_what_there_is_not(server, talk, values, parameter):
    answer = server.post(data=values, files={"file": ("talk.wav", talk.read_bytes())})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == parameter


@pytest.mark.parametrize(("content", "complaint"), [
    ({"content": b"RIFF"}, "expected a form"),
    ({"json": {"file": "talk.wav"}}, "expected a form"),
    ({"data": {"model": "u2moe"}, "files": {"other": b""}}, "a file in the field 'file'"),
    ({"files": [("file", ("a.wav", b"")), ("file", ("b.wav", b""))]}, "number of files is 1"),
    ({"files": {f"f{i}": (None, "x") for i in range(60)}}, "number of fields is 50"),
    ({"files": {"prompt": (None, "x" * 100_000)}}, "maximum size of 64KB"),
    ({"content": b"--", "headers": {"Content-Type": f"multipart/form-data; boundary={300 * 'x'}"}}, "is damaged"),
    ({"content": b"--x\r\nno", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, "a file in the field"),
    ({"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, "a file in the field"),
    ({"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, "the form"),
    ({"content": b"", "headers": {"Content-Type": "multipart/form-data"}}, "Missing boundary"),
    ({"content": b"", "headers": {"Content-Encoding": "gzip"}}, "must not be compressed"),
    ({"files": {"file": ("empty.wav", b"")}}, "empty.wav: cannot be read as audio"),
])  # fmt: skip
def test_damaged_forms(server, content, complaint):
    answer = server.post(**content)
    assert answer.status_code == 400
    assert complaint in answer.json()["error"]["message"]
