"""OpenAI's realtime transcription, with OpenAI's client."""

import base64
import io
import json

import numpy as np
import openai
import pytest
import soundfile

TRANSCRIPTION = "conversation.item.input_audio_transcription"
# openai's client keeps a connection in a way that websockets warns about.
pytestmark = pytest.mark.filterwarnings("ignore:connect.* must be used as a context manager:DeprecationWarning")
MANUAL = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}


@pytest.fixture
def client(server):
    """Return a plain client, after the server's first event."""
    with server.connect("/v1/realtime", max_queue=None) as client:
        assert client.receive()["type"] == "session.created"
        yield client


def play(client, samples):
    for start in range(0, len(samples), 6000):
        audio = base64.b64encode(samples[start : start + 6000].tobytes()).decode()
        client.tell(type="input_audio_buffer.append", audio=audio)


def next_text(client):
    return client.receive_until(f"{TRANSCRIPTION}.completed")[-1]["transcript"]


def test_items_that_the_server_ends(client, speech, expected):
    """Their times count from the first audio of the session."""
    samples, segments = speech(24_000), expected(24_000).segments
    for begin_s in (0, len(samples) / 24_000):
        play(client, samples)
        client.tell(type="input_audio_buffer.commit")
        events = [event for _ in segments for event in client.receive_until(f"{TRANSCRIPTION}.completed")]
        items = [event["item_id"] for event in events if event["type"] == "input_audio_buffer.committed"]
        assert len(set(items)) == len(segments)
        for item, segment in zip(items, segments, strict=True):
            own = [event for event in events if event.get("item_id") == item]
            _, stopped, *_ = told = [event for event in own if not event["type"].endswith(".delta")]
            assert [event["type"].partition("input_audio_")[2] for event in told] == [
                "buffer.speech_started", "buffer.speech_stopped", "buffer.committed", "transcription.completed",
            ]  # fmt: skip
            assert stopped["audio_end_ms"] == round((begin_s + segment.end) * 1000)
            deltas = "".join(event["delta"] for event in own if "delta" in event)
            assert own[-1]["transcript"] == segment.text
            assert deltas == segment.text or (segment.revised and not segment.text.startswith(deltas))


@pytest.mark.parametrize("turn_detection", [None, {"type": "server_vad"}])
def test_committed_words_are_deltas_while_they_are_spoken(client, speech, turn_detection):
    audio = {"input": {"turn_detection": turn_detection}}
    client.tell(type="session.update", session={"type": "transcription", "audio": audio})
    play(client, speech(24_000))
    events = client.receive_until(f"{TRANSCRIPTION}.delta")  # before the audio is committed
    item = events[-1]["item_id"]
    assert "input_audio_buffer.committed" not in [each["type"] for each in events if each.get("item_id") == item]
    client.tell(type="input_audio_buffer.commit")
    while events[-1]["type"] != f"{TRANSCRIPTION}.completed" or events[-1]["item_id"] != item:
        events.append(client.receive())
    deltas = [event["delta"] for event in events if "delta" in event and event["item_id"] == item]
    assert len(deltas) > 1
    assert "".join(deltas) == events[-1]["transcript"]  # the second pass revises nothing here


def test_items_that_openais_client_ends_and_clears(server, speech, expected):
    client = openai.OpenAI(api_key="none", base_url=f"{server.url}/v1")
    with client.realtime.connect(model="u2moe", extra_query={"intent": "transcription"}) as connection:

        def receive_until(kind):
            while (event := connection.recv()).type != kind:
                pass
            return event

        def append(samples):
            for start in range(0, len(samples), 6000):
                audio = base64.b64encode(samples[start : start + 6000].tobytes()).decode()
                connection.input_audio_buffer.append(audio=audio)

        assert connection.recv().type == "session.created"
        connection.session.update(session=MANUAL)
        assert receive_until("session.updated").session.audio.input.turn_detection is None
        for is_second in (False, True):
            if is_second:
                append(speech(24_000)[:30_000])
                connection.input_audio_buffer.clear()
                receive_until("input_audio_buffer.cleared")
            append(speech(24_000))
            connection.input_audio_buffer.commit()
            completed = receive_until(f"{TRANSCRIPTION}.completed")
            assert completed.transcript == expected(24_000).text
            assert completed.usage.seconds == pytest.approx(len(speech(24_000)) / 24_000, abs=0.01)


def test_each_commit_of_several_at_once_is_answered(client, speech):
    """The client does not wait for answers between commits of different lengths."""
    client.tell(type="session.update", session=MANUAL)
    words = speech(24_000)[: 24_000 * 2]
    for samples in (words[:2400], words, words[:240], words, words[:4800], words):
        play(client, samples)
        client.tell(type="input_audio_buffer.commit")
    texts = [next_text(client) for _ in range(6)]
    assert texts[1] == texts[3] == texts[5] != ""


def test_format_prompt_and_pauses_are_the_clients(client, speech, expected, assert_hotwords):
    audio = {
        "format": {"type": "audio/pcm", "rate": 16_000},
        "transcription": {"model": "whisper-1", "prompt": "seventy, what do you (\u4e2d)."},
        "turn_detection": None,
    }
    client.tell(type="session.update", session={"type": "transcription", "audio": {"input": audio}})
    assert client.receive()["type"] == "session.updated"
    play(client, speech())
    client.tell(type="input_audio_buffer.commit")
    assert next_text(client) == expected().text
    assert_hotwords("seventy")


def test_a_shorter_pause_ends_items_earlier(client, speech):
    detection = {"type": "server_vad", "silence_duration_ms": 400}
    settings = {"input_audio_format": "pcm16", "turn_detection": detection}
    client.tell(type="transcription_session.update", session=settings)
    assert client.receive()["type"] == "transcription_session.updated"
    samples = speech(24_000)
    play(client, samples[: len(samples) // 2])  # up to the pause after the second speaker
    assert next_text(client)


def test_pauses_that_words_have_end_no_items(client, speech, expected):
    detection = {"type": "server_vad", "silence_duration_ms": 100}
    client.tell(type="session.update", session={"audio": {"input": {"turn_detection": detection}}})
    (updated,) = client.receive_until("session.updated")
    audio = updated["session"]["audio"]["input"]
    assert audio["turn_detection"]["silence_duration_ms"] == 500
    assert json.dumps(audio["format"]) == '{"type": "audio/pcm", "rate": 24000}'  # not 24000.0
    play(client, speech(24_000))
    client.tell(type="input_audio_buffer.commit")
    last = expected(24_000).segments[-1].text  # a question without a pause
    text = ""
    while last.split()[-1] not in text:
        text = next_text(client)
    assert text == last


@pytest.mark.parametrize(
    ("kind", "older", "encoding"), [("audio/pcmu", "g711_ulaw", "ULAW"), ("audio/pcma", "g711_alaw", "ALAW")]
)
def test_audio_of_telephones(client, server, speech, demo, kind, older, encoding):
    file = io.BytesIO()
    soundfile.write(file, speech(8000), 8000, encoding, format="RAW")
    data = file.getvalue()
    settings = {"format": "RAW", "subtype": encoding, "channels": 1, "samplerate": 8000}
    samples, _ = soundfile.read(io.BytesIO(data), dtype="int16", **settings)
    newer = {"type": "transcription", "audio": {"input": {"format": {"type": kind}, "turn_detection": None}}}
    in_the_older_way = {"input_audio_format": older, "turn_detection": None}
    for settings, form in ((newer, kind), ({"input_audio_format": "pcm16"}, "audio/pcm"), (in_the_older_way, kind)):
        client.tell(type="session.update", session=settings)
        assert client.receive()["session"]["audio"]["input"]["format"]["type"] == form
    for start in range(0, len(data), 999):
        audio = base64.b64encode(data[start : start + 999]).decode()
        client.tell(type="input_audio_buffer.append", audio=audio)
    client.tell(type="input_audio_buffer.commit")
    text = next_text(client)
    assert text == demo.transcribe(samples, 8000, options=server.service.default.stream_options).text


def test_settings_may_change_between_turns(client, speech, expected):
    samples, segments = speech(24_000), expected(24_000).segments
    cut = round((segments[0].end + 1.4) * 24_000)  # in the pause
    play(client, np.concatenate([samples[:cut], np.zeros(36_000, np.int16)]))
    first = client.receive_until(f"{TRANSCRIPTION}.completed")
    client.tell(type="session.update", session=MANUAL)
    assert client.receive()["type"] == "session.updated"
    play(client, samples[cut:])
    client.tell(type="input_audio_buffer.commit")
    rest = client.receive_until(f"{TRANSCRIPTION}.completed")
    assert "input_audio_buffer.speech_started" not in {event["type"] for event in rest}
    play(client, samples[:100])
    client.tell(type="session.update", session={"audio": {"input": {"format": {"type": "audio/pcmu"}}}})
    assert "the format cannot change while audio is in the buffer" in client.receive()["error"]["message"]
    assert first[-1]["transcript"] == segments[0].text
    assert rest[-1]["transcript"].endswith(segments[-1].text)


def test_a_commit_is_always_answered(client, speech, expected):
    play(client, speech(24_000))
    play(client, np.zeros(36_000, np.int16))  # ends all turns
    for segment in expected(24_000).segments:
        assert next_text(client) == segment.text
    client.tell(type="input_audio_buffer.commit")
    committed, *_, completed = client.receive_until(f"{TRANSCRIPTION}.completed")
    assert committed["type"] == "input_audio_buffer.committed"
    assert completed["transcript"] == ""
    client.tell(type="input_audio_buffer.commit")
    assert client.receive()["error"]["code"] == "input_audio_buffer_commit_empty"


@pytest.mark.parametrize(("event", "complaint"), [
    ("{", "invalid JSON"),
    (b"\0\0", "binary"),
    (r'{"type": "nothing", "event_id": "\ud83d"}', "surrogate"),
    (r'{"type": "session.update", "session": {"prompt": "\uDC00"}}', "surrogate"),
    ({"type": "response.create"}, "unknown event type 'response.create'"),
    ({"type": "input_audio_buffer.commit"}, "nothing to commit"),
    ({"type": "input_audio_buffer.append"}, "must be a base64 string"),
    ({"type": "input_audio_buffer.append", "audio": "%%"}, "not valid base64"),
    ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "multiple of 2"),
    ({"type": "session.update", "session": {"type": "realtime"}}, "'transcription'"),
    ({"type": "session.update"}, "session must be an object"),
    ({"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/opus"}}}}}, "audio/pcmu"),
    ({"type": "session.update", "session": {"input_audio_format": "opus"}}, "pcm16, g711_ulaw, g711_alaw, got 'opus'"),
    ({"type": "session.update", "session": {"turn_detection": {"type": "none"}}}, "server_vad"),
])  # fmt: skip
def test_what_is_wrong_is_answered_and_the_session_goes_on(client, event, complaint):
    client.send(event if isinstance(event, str | bytes) else json.dumps({"event_id": "mine", **event}))
    answer = client.receive()
    assert answer["type"] == "error"
    assert complaint in answer["error"]["message"]
    assert answer["error"]["event_id"] == ("mine" if isinstance(event, dict) else None)
    play(client, np.zeros(2400, np.int16))
    client.tell(type="input_audio_buffer.clear")
    assert client.receive()["type"] == "input_audio_buffer.cleared"
