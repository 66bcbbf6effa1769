"""OpenAI's realtime transcription, and Wyoming, with their own clients and with invalid messages."""

import asyncio
import io
import json
import warnings

import numpy as np
import openai
import pytest
import soundfile
from dialects import WYOMING_AUDIO as RAW
from dialects import audio_messages, realtime_audio
from dialects import wyoming_event as event

from u2moe.runtime.server.models import languages_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # about audioop, which it imports if available
    from wyoming.asr import Transcribe, Transcript, TranscriptChunk
    from wyoming.audio import AudioChunk, AudioStart, AudioStop
    from wyoming.client import AsyncTcpClient
    from wyoming.event import Event
    from wyoming.info import Describe, Info
    from wyoming.ping import Ping

TRANSCRIPTION = "conversation.item.input_audio_transcription"
# openai's client keeps a connection in a way that websockets warns about.
pytestmark = pytest.mark.filterwarnings("ignore:connect.* must be used as a context manager:DeprecationWarning")
MANUAL = {"type": "transcription", "audio": {"input": {"turn_detection": None}}}


@pytest.fixture
def client(server):
    with server.connect("/v1/realtime", max_queue=None) as client:
        assert client.receive()["type"] == "session.created"
        yield client


def play(client, samples):
    for message in audio_messages("/v1/realtime", samples, 6000):
        client.send(message)


def next_text(client):
    return client.receive_until(f"{TRANSCRIPTION}.completed")[-1]["transcript"]


def test_items_that_the_server_ends(client, speech, expected):
    """Their times count from the first audio of the session."""
    samples, segments = speech(24_000), expected(24_000).segments
    for begin_s in (0, len(samples) / 24_000):
        play(client, samples)
        if begin_s:
            play(client, np.zeros(36_000, np.int16))  # ends all turns
        else:
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
    client.tell(type="input_audio_buffer.commit")  # it is always answered
    committed, *_, completed = client.receive_until(f"{TRANSCRIPTION}.completed")
    assert (committed["type"], completed["transcript"]) == ("input_audio_buffer.committed", "")
    client.tell(type="input_audio_buffer.commit")
    assert client.receive()["error"]["code"] == "input_audio_buffer_commit_empty"


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
            for message in audio_messages("/v1/realtime", samples, 6000):
                connection.input_audio_buffer.append(audio=json.loads(message)["audio"])

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
    text = next_text(client)
    assert_hotwords("seventy")
    assert text == expected().text


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
        client.send(realtime_audio(data[start : start + 999]))
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


@pytest.mark.parametrize(("event", "complaint"), [
    ("{", "invalid JSON"),
    (b"\0\0", "binary"),
    (r'{"type": "nothing", "event_id": "\ud83d"}', "surrogate"),
    ('{"event_id": [[1]]}', "unknown event type None"),  # an answer with 972 lists failed
    ('{"event_id": NaN}', "invalid JSON"),  # was echoed, and answers were not JSON
    ('{"event_id": 1e999}', "invalid JSON"),
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


# -------------------- Wyoming


async def speak(port, audio, rate=16_000, channels=1, transcribe=None):
    """Send audio as Home Assistant does; return all events of the answer."""
    async with AsyncTcpClient("127.0.0.1", port) as client:
        await client.write_event((transcribe or Transcribe()).event())
        await client.write_event(AudioStart(rate=rate, width=2, channels=channels).event())
        for start in range(0, len(audio), 4096):
            chunk = AudioChunk(rate=rate, width=2, channels=channels, audio=audio[start : start + 4096])
            await client.write_event(chunk.event())
        await client.write_event(AudioStop().event())
        events = []
        while (event := await client.read_event()) is not None:
            events.append(event)
        return events


def test_transcript_also_of_two_channels_at_another_rate_and_of_nothing(server, speech, expected):
    events = asyncio.run(speak(server.ports["wyoming"], speech().tobytes()))
    texts = [segment.text for segment in expected().segments]
    assert [event.type for event in events] == [
        "transcript-start", *["transcript-chunk"] * len(texts), "transcript-stop", "transcript",
    ]  # fmt: skip
    assert Transcript.from_event(events[-1]).text == expected().text
    chunks = [TranscriptChunk.from_event(event).text for event in events[1:-2]]
    assert [chunk.strip() for chunk in chunks] == texts
    assert "".join(chunks) == expected().text
    stereo = np.repeat(speech(44_100), 2).tobytes()
    events = asyncio.run(speak(server.ports["wyoming"], stereo, rate=44_100, channels=2))
    assert Transcript.from_event(events[-1]).text == expected(44_100).text
    events = asyncio.run(speak(server.ports["wyoming"], bytes(32_000)))
    assert [(event.type, event.data["text"]) for event in events] == [("transcript", "")]


def test_names_are_hotwords_and_the_client_leaves_at_any_point(server, assert_hotwords, speech):
    transcribe = Transcribe(transcript_names=["seventy", "\u4e2d"])
    asyncio.run(speak(server.ports["wyoming"], bytes(16_000), transcribe=transcribe))
    assert_hotwords("seventy")
    whole = event("transcribe") + event("audio-start", RAW) + event("audio-chunk", RAW, speech()[:20_000].tobytes())

    for length in (0, 5, len(event("transcribe")) + 3, len(whole) - 30_000, len(whole)):
        with server.open_plain("wyoming") as plain:
            plain.sendall(whole[:length])
    server.wait_until_empty()


@pytest.mark.parametrize("width", [1, 4])
def test_audio_of_other_widths_without_a_start(server, speech, demo, width):
    samples = speech().astype(np.int32) << 16 if width == 4 else (speech() >> 8).astype(np.int8)
    audio = event("audio-chunk", {**RAW, "width": width}, samples.tobytes()) + event("audio-stop")
    as_read = samples.astype(np.float32) / np.float32(1 << (8 * width - 1))
    text = demo.transcribe(as_read, options=server.service.default.stream_options).text
    assert f'{{"text": "{text}"}}' in server.answer(audio, "wyoming").decode()


def test_describe_with_languages_by_vocabulary_and_ping(server, demo):
    async def ask():
        async with AsyncTcpClient("127.0.0.1", server.ports["wyoming"]) as client:
            await client.write_event(Describe().event())
            info = Info.from_event(await client.read_event())
            await client.write_event(Ping(text="here").event())
            pong = await client.read_event()
            await client.write_event(Event("ping", {"kind": "of any", "self": 1}))
            return info, pong, await client.read_event()

    info, pong, odd = asyncio.run(ask())
    assert info.asr[0].models[0].name == demo.bundle.path.name
    assert info.asr[0].models[0].languages == ["en"]  # Home Assistant does not offer models without a language
    assert info.asr[0].supports_transcript_streaming
    assert (pong.type, pong.data["text"]) == ("pong", "here")
    assert (odd.type, odd.data["kind"]) == ("pong", "of any")
    assert languages_of(["<blank>", "\u2581the"]) == ["en"]
    assert languages_of(["<blank>", "\u4e2d"]) == ["zh"]
    assert languages_of(["\u4e2d", "A"]) == ["zh", "en"]
    assert languages_of(["<unk>"]) == []


@pytest.mark.parametrize(("sent", "complaint"), [
    (b"hello\n", "invalid JSON"),
    (b"[]\n", "expected a JSON object"),
    (b'{"type": 3}\n', "needs a string as type"),
    (b"x" * 100_000 + b"\n", "may have"),
    (b'{"type": "ping", "data": {"text": "\\ud83d"}}\n', "surrogate"),
    (b'{"type": "ping", "data": {"text": "\xed\xa0\xbd"}}\n', "invalid JSON"),  # json.loads would accept this
    ('{"type": "ping"}\n'.encode("utf-16"), "invalid JSON"),  # and this
    (event("audio-stop"), "audio before 'audio-stop'"),
    (event("audio-start", {"rate": 16_000, "width": 2}), "channels must be an integer"),
    (event("audio-start", {**RAW, "width": 3}), "1, 2 or 4 bytes"),
    (event("audio-start", {**RAW, "rate": 7}), "sample rate must be between"),
    (event("audio-start", RAW) + event("audio-chunk", {**RAW, "rate": 8000}), "format of the audio changed"),
    (event("audio-start", RAW) + event("audio-chunk", RAW, b"\0"), "multiple of 2"),
    (event("audio-chunk", {**RAW, "channels": 2}, b"\0\0"), "multiple of 4"),
    (event("transcribe", {"transcript_names": [3]}), "lists of phrases"),
    (event("transcribe", {"transcript_terms": 3}), "lists of phrases"),
    (event("ping", payload_length=-1), "payload_length must be"),
    (event("ping", payload_length=1 << 40), "payload_length must be at most"),
    (event("ping", data_length="x"), "data_length must be"),
    (event("ping", data_length=1 << 40), "data_length must be at most"),
])  # fmt: skip
def test_what_is_wrong_is_answered_by_wyoming(server, sent, complaint):
    head, _, data = server.answer(sent, "wyoming").partition(b"\n")
    assert json.loads(head)["type"] == "error"
    assert complaint in json.loads(data)["text"]
    server.wait_until_empty()
