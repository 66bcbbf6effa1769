"""Wyoming, with the client of the package `wyoming`, and with invalid messages."""

import asyncio
import json
import warnings

import numpy as np
import pytest
from dialects import WYOMING_AUDIO as RAW
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


def test_describe_and_ping(server, demo):
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


@pytest.mark.parametrize(("symbols", "languages"), [
    (["<blank>", "\u2581the"], ["en"]), (["<blank>", "\u4e2d"], ["zh"]), (["\u4e2d", "A"], ["zh", "en"]),
    (["<unk>"], []),
])  # fmt: skip
def test_languages_by_vocabulary(symbols, languages):
    assert languages_of(symbols) == languages


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
def test_what_is_wrong_is_answered(server, sent, complaint):
    head, _, data = server.answer(sent, "wyoming").partition(b"\n")
    assert json.loads(head)["type"] == "error"
    assert complaint in json.loads(data)["text"]
    server.wait_until_empty()
