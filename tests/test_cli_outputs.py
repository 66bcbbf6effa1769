"""`u2moe transcribe`: inputs, and transcripts on stdout, on a terminal and in a folder."""

import io
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from commands import transcribe
from feeding import feed
from media import write_media

from u2moe.runtime import format_transcript
from u2moe.runtime.cli import terminal
from u2moe.runtime.text.formats import FORMATS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_once")]


def written(folder):
    return {
        str(file.relative_to(folder)): file.read_text(encoding="utf-8")
        for file in folder.rglob("[!.]*") if file.is_file()
    }  # fmt: skip


def test_one_and_several_recordings_on_stdout(bundle, recognizer, clips, capsys):
    transcript = recognizer.transcribe(clips / "a.wav")
    for name in FORMATS:
        assert transcribe(bundle, "-f", name, clips / "a.wav") == 0
        assert capsys.readouterr() == (format_transcript(transcript, name, name=str(clips / "a.wav")), "")
    assert transcribe(bundle, "-f", "json", "--search", "ctc_prefix_beam", "--beam-size", 3, clips) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == [str(clips / "a.wav"), str(clips / "b.wav")]
    assert set(lines[0]) == {"file", "text", "duration", "segments", "complete", "error"}
    assert len(lines[1]["segments"][0]["nbest"]) == 3
    assert err == ""
    assert transcribe(bundle, "-f", "tsv", clips) == 0
    header, *rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert header == ["file", "start", "end", "text"]
    assert [(row[0], len(row)) for row in rows] == [(str(clips / "a.wav"), 4), (str(clips / "b.wav"), 4)]


def test_output_folder_is_resumed_also_after_a_power_failure(bundle, recognizer, clips, capsys, monkeypatch):
    out = clips / "out"
    arguments = ["-f", "srt", "-o", out, clips / "a.wav"]
    write_bytes = Path.write_bytes

    def some(self, content):
        write_bytes(self, content[: len(content) // 2])
        raise SystemError("the power has failed")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", some)
        with pytest.raises(SystemError):
            transcribe(bundle, *arguments)
    assert transcribe(bundle, *arguments) == 0
    assert written(out) == {"a.srt": format_transcript(recognizer.transcribe(clips / "a.wav"), "srt")}
    (out / "a.srt").write_text("mine", encoding="utf-8")
    (clips / "c.wav").write_text("no audio")
    assert transcribe(bundle, *arguments, clips / "b.wav", clips / "c.wav") == 1
    assert sorted(written(out)) == ["a.srt", "b.srt"]
    assert written(out)["a.srt"] == "mine"
    stdout, err = capsys.readouterr()
    assert stdout == ""
    assert err.startswith(f"1 of 3 are already in {out}: kept (remove them to recognise them again)\n")
    assert err.endswith("u2moe: error: 1 of 3 files failed\n")
    for _ in range(2):  # a file given by name is overwritten
        assert transcribe(bundle, "-o", clips / "texts" / "talk.srt", clips / "b.wav") == 0
        assert written(clips / "texts") == {"talk.srt": written(out)["b.srt"]}
        (clips / "texts" / "talk.srt").write_text("old", encoding="utf-8")


def test_folders_are_mirrored_and_equal_names_allowed(bundle, clips, capsys):
    (clips / "deep" / "er").mkdir(parents=True)
    for name in ("deep/a.wav", "deep/er/a.wav", "deep/er/a.flac"):
        soundfile.write(clips / name, soundfile.read(clips / "b.wav")[0][:20_000], 16_000)
    out = clips / "out"
    (out / "deep").mkdir(parents=True)
    for place in (out, out / "deep"):  # left by killed processes
        for name, age_s in ((".0123456789abcdef.part", 7200), (".fedcba9876543210.part", 60)):
            (place / name).touch()
            os.utime(place / name, (time.time() - age_s,) * 2)
    for expected in ("", f"5 of 5 are already in {out}: kept (remove them to recognise them again)\n"):
        assert transcribe(bundle, "-o", out, clips) == 0
        assert capsys.readouterr().err == expected
    assert sorted(written(out)) == ["a.txt", "b.txt", "deep/a.txt", "deep/er/a.flac.txt", "deep/er/a.wav.txt"]
    assert [file.name for file in out.rglob(".*.part")] == [".fedcba9876543210.part"] * 2
    assert transcribe(bundle, "-o", clips / "named", clips / "a.wav", clips / "deep" / "a.wav") == 0
    assert written(clips / "named").keys() == {f"{clips.name}/a.txt", "deep/a.txt"}
    same = clips / "deep" / ".." / "deep" / "a.wav"
    assert transcribe(bundle, "-o", clips / "again", clips / "deep" / "a.wav", same) == 0
    assert len(written(clips / "again")) == 2


def test_stream_shows_partial_results_and_hotwords_are_heard(bundle, recognizer, clips, capsys):
    symbol = next(s for s in bundle.tokens[3:] if s not in recognizer.transcribe(clips / "a.wav").text)
    (clips / "names").write_text(f"# one\n{symbol} :100\n", encoding="utf-8")
    assert transcribe(bundle, "--hotwords", clips / "names", clips / "a.wav") == 0
    assert symbol in capsys.readouterr().out
    (clips / "names").write_text("\u2603", encoding="utf-8")
    assert transcribe(bundle, "--hotwords", clips / "names", clips / "a.wav") == 1
    assert "hotword '\u2603': the vocabulary has no" in capsys.readouterr().err
    assert transcribe(bundle, "--stream", "--chunk-size", 8, "--num-left-chunks", 4, clips / "a.wav") == 0
    out, err = capsys.readouterr()
    partials = err.splitlines()
    assert len(partials) > 3
    assert len(partials[0]) < len(partials[-1])
    assert transcribe(bundle, "--chunk-size", 8, "--num-left-chunks", 4, clips / "a.wav") == 0
    assert capsys.readouterr().out == out


def test_events_come_in_their_order(bundle, clips, capsys):
    (clips / "c.wav").write_text("no audio")
    assert transcribe(bundle, "-f", "events", "--stream", clips) == 1
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {event["file"] for event in events} == {str(clips / name) for name in ("a.wav", "b.wav", "c.wav")}
    *partials, segment, end = (event for event in events if event["file"].endswith("a.wav"))
    assert {event["type"] for event in partials} == {"partial"}
    assert (segment["type"], end["type"]) == ("segment", "end")
    assert set(segment["words"][0]) == {"word", "start", "end", "confidence"}
    assert (end["text"], end["complete"], end["error"]) == (segment["text"], True, None)
    assert events[-1]["type"] == "error"
    assert "c.wav: cannot be read as audio" in events[-1]["error"]


def test_progress_and_partial_results_in_place_on_a_terminal(bundle, clips, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert transcribe(bundle, "--stream", clips) == 0
    err = capsys.readouterr().err
    assert "\r\x1b[K[1/2] " in err
    assert "\n" not in err
    shown = err.split("\r\x1b[K")
    partials = [text for text in shown if text and not text.startswith("[")]
    assert len(set(partials)) > 3
    # progress never replaces a partial result
    assert all(not text.startswith("[") or int(text.partition("%")[0].split()[-1]) < 100 for text in shown)
    followers = [after for before, after in itertools.pairwise(shown) if before in partials]
    assert not [after for after in followers if after.startswith("[1/2] ")]
    monkeypatch.setenv("COLUMNS", "20")
    terminal.show_progress("a progress that is wider than the terminal")
    terminal.tell("a line that is wider than the terminal")
    terminal.show_latest("partial")
    assert capsys.readouterr().err == (
        "\r\x1b[Kr than the terminal\r\x1b[Ka line that is wider than the terminal\n\r\x1b[Kpartial"
    )


def test_a_bar_shows_how_far_all_files_are(bundle, clips, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (clips / "aa.wav").write_text("no audio")
    soundfile.write(clips / "long.wav", np.zeros(26 * 16_000), 16_000)
    assert transcribe(bundle, clips / "a.wav") == 0
    assert "#" not in capsys.readouterr().err  # only on a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert transcribe(bundle, clips) == 1
    drawn = [line.split(", ") for line in capsys.readouterr().err.split("\r\x1b[K") if line.startswith("[")]
    # 4, 0, 4 and 26 seconds; of the last ten at a time.
    assert drawn[0] == ["[1/4] ....................   0%", "a.wav"]
    begun = {line[-1]: line[0] for line in reversed(drawn)}
    assert [begun[name].split()[-1] for name in ("aa.wav", "b.wav", "long.wav")] == ["12%", "12%", "24%"]
    assert "[4/4] ###########.........  53%" in [line[0] for line in drawn]
    assert drawn[-1] == ["[4/4] #################### 100%", "0:00 left", "long.wav"]


def test_segments_are_printed_as_they_are_found(bundle, recognizer, sound, tmp_path, monkeypatch):
    file = tmp_path / "long.wav"
    soundfile.write(file, np.tile(sound, 12), 16_000)
    transcript = recognizer.transcribe(file)
    assert len(transcript.segments) > 1
    for name in ("txt", "tsv"):
        order = []
        monkeypatch.setattr("u2moe.runtime.cli.outputs.print_result", order.append)
        monkeypatch.setattr(
            "u2moe.runtime.cli.transcribe.ProgressBar.show", lambda _, at, order=order: order.append(at)
        )
        assert transcribe(bundle, "-f", name, file) == 0
        printed = [item for item in order if isinstance(item, str)]
        assert "".join(printed) == format_transcript(transcript, name)
        assert order.index(printed[0]) < order.index(48.0)
        assert len(printed) == len(transcript.segments)


def test_raw_audio_from_standard_input_as_it_comes_with_channels_and_a_track_of_a_video(
    bundle, recognizer, sound, capsys, tmp_path, monkeypatch
):
    samples = (sound * 32767).astype("<i2")
    expected = feed(recognizer, samples, options=None)
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(samples.tobytes())))
        assert transcribe(bundle, "--raw", "s16le:16000", "--stream", *arguments) == 0
        out, err = capsys.readouterr()
        assert out.split() == [word for segment in expected for word in segment.text.split()]
        assert len(err.splitlines()) > 3  # partial results
        monkeypatch.setattr(sys, "stdin", None)
        assert transcribe(bundle, *(arguments or ["--raw", "s16le:16000"])) == 1
        assert "standard input is closed" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    for name in ("a.pcm", "./-"):
        (tmp_path / name).write_bytes(np.stack([np.zeros_like(sound), sound], axis=1).astype("<f4").tobytes())
        assert transcribe(bundle, *["--raw", "f32le:16000:2", "--channel", "1"], name) == 0
        assert capsys.readouterr().out == recognizer.transcribe(sound).text + "\n"
    file = write_media(tmp_path / "a.mkv", [np.zeros_like(sound), sound], with_video=True)
    assert transcribe(bundle, "--track", "1", file) == 0
    assert capsys.readouterr().out == recognizer.transcribe(sound).text + "\n"


def test_what_comes_from_a_pipe_is_never_there_already(bundle, recognizer, clips, capsys, monkeypatch):
    for name in ("a.wav", "a.wav", "b.wav"):
        with (clips / name).open("rb") as file, subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE) as cat:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(cat.stdout))
            assert transcribe(bundle, "-f", "json", "-o", clips / "piped", "-") == 0
        assert "already" not in capsys.readouterr().err
        found = json.loads((clips / "piped" / "stdin.json").read_text(encoding="utf-8"))
        assert (found["file"], found["text"]) == ("stdin", recognizer.transcribe(clips / name).text)
