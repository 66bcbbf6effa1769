"""Inputs of `u2moe transcribe`: trees, standard input, raw audio, tracks; and its events."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from commands import transcribe
from media import write_media

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_once")]


@pytest.fixture
def clips(tmp_path, sound):
    soundfile.write(tmp_path / "a.wav", sound, 16_000)
    soundfile.write(tmp_path / "b.wav", sound[:40_000], 16_000)
    return tmp_path


@pytest.fixture
def feed(monkeypatch):
    """Return a function that puts bytes on standard input."""
    return lambda content: monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def written(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*.txt"))


def test_folders_are_mirrored_and_equal_names_allowed(bundle, clips, capsys):
    (clips / "deep" / "er").mkdir(parents=True)
    for name in ("deep/a.wav", "deep/er/a.wav", "deep/er/a.flac"):
        soundfile.write(clips / name, soundfile.read(clips / "b.wav")[0], 16_000)
    out = clips / "out"
    for expected in ("", f"5 of 5 are already in {out}: kept (remove them to recognise them again)\n"):
        assert transcribe(bundle, "-o", out, clips) == 0
        assert capsys.readouterr().err == expected
    assert written(out) == ["a.txt", "b.txt", "deep/a.txt", "deep/er/a.flac.txt", "deep/er/a.wav.txt"]
    (clips / "c").mkdir()
    (clips / "c" / "a.wav").write_bytes((clips / "b.wav").read_bytes())
    other = clips / "c" / ".." / "c" / "a.wav"
    assert transcribe(bundle, "-o", clips / "named", clips / "a.wav", clips / "c" / "a.wav") == 0
    assert written(clips / "named") == ["c/a.txt", f"{clips.name}/a.txt"]
    assert transcribe(bundle, "-o", clips / "again", clips / "c" / "a.wav", other) == 0  # the same file
    assert len(written(clips / "again")) == 2


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_raw_audio_from_standard_input_as_it_comes(bundle, recognizer, sound, capsys, feed, arguments):
    feed((sound * 32767).astype("<i2").tobytes())
    assert transcribe(bundle, "--raw", "s16le:16000", "--stream", *arguments) == 0
    out, err = capsys.readouterr()
    stream = recognizer.create_stream()
    stream.accept_waveform(16_000, (sound * 32767).astype(np.int16))
    stream.input_finished()
    recognizer.decode_streams([stream])
    assert out.split() == stream.get_result().text.split()
    assert len(err.splitlines()) > 3  # partial results


def test_raw_audio_with_channels_and_a_track_of_a_video(bundle, recognizer, sound, capsys, tmp_path):
    (tmp_path / "a.pcm").write_bytes(np.stack([np.zeros_like(sound), sound], axis=1).astype("<f4").tobytes())
    assert transcribe(bundle, *["--raw", "f32le:16000:2", "--channel", "1"], tmp_path / "a.pcm") == 0
    assert capsys.readouterr().out == recognizer.transcribe(sound).text + "\n"
    file = write_media(tmp_path / "a.mkv", [np.zeros_like(sound), sound], with_video=True)
    assert transcribe(bundle, "--track", "1", file) == 0
    assert capsys.readouterr().out == recognizer.transcribe(sound).text + "\n"


def test_standard_input_that_is_closed(bundle, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    for arguments in (["-"], ["--raw", "s16le:16000"]):
        assert transcribe(bundle, *arguments) == 1
        assert "standard input is closed" in capsys.readouterr().err


def test_events_come_in_their_order(bundle, recognizer, clips, capsys):
    (clips / "c.wav").write_text("no audio")
    assert transcribe(bundle, "-f", "events", "--stream", clips) == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {event["file"] for event in events} == {str(clips / name) for name in ("a.wav", "b.wav", "c.wav")}
    kinds = [event["type"] for event in events if event["file"].endswith("a.wav")]
    assert set(kinds[:-2]) == {"partial"}
    assert kinds[-2:] == ["segment", "end"]
    segment, end = (event for event in events if event["file"].endswith("a.wav") and event["type"] != "partial")
    assert set(segment["words"][0]) == {"word", "start", "end", "confidence"}
    assert (end["text"], end["complete"], end["error"]) == (segment["text"], True, None)
    assert events[-1]["type"] == "error"
    assert "c.wav: cannot be read as audio" in events[-1]["error"]
