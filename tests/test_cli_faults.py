"""Faults around `u2moe transcribe`: names, encodings, closed streams, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import transcribe

from u2moe.runtime import cli
from u2moe.runtime.installation import install_command
from u2moe.runtime.text.formats import format_transcript

pytestmark = pytest.mark.slow

FULL = Path("/dev/full")
posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX systems")


def started(bundle, *arguments, **settings):
    command = [sys.executable, "-m", "u2moe", "transcribe", "--model", str(bundle.path), *map(str, arguments)]
    return subprocess.Popen(command, **settings)


def finished(bundle, *arguments, **settings):
    with started(bundle, *arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **settings) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("into_folder", [False, True])
def test_paths_that_cannot_be_looked_up(bundle, clips, capsys, into_folder):
    (clips / "empty").mkdir()
    paths = [clips / ("n" * 300), clips / "a.wav", clips / "empty", "nul\0.wav", clips / "b.wav"]
    assert transcribe(bundle, *(["-o", clips / "out"] if into_folder else []), *paths) == 1
    out, err = capsys.readouterr()
    if into_folder:
        assert sorted(file.name for file in (clips / "out").glob("[a-z]*")) == ["a.txt", "b.txt"]
    else:
        assert [line.split("\t")[0] for line in out.splitlines()] == [str(clips / "a.wav"), str(clips / "b.wav")]
    for expected in ("File name too long", "embedded null", "empty: contains no audio files", "3 of 5 files failed"):
        assert expected in err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow only names in Unicode")
@pytest.mark.parametrize("file_format", ["txt", "json"])
def test_names_that_are_no_text(bundle, clips, file_format):
    name = os.fsdecode(b"caf\xe9.wav")
    (clips / "b.wav").rename(clips / name)
    code, out, err = finished(bundle, "-f", file_format, clips, env={**os.environ, "PYTHONUTF8": "1"})
    assert (code, err) == (0, b"")
    lines = out.splitlines()
    if file_format == "json":
        assert os.fsencode(json.loads(lines[1])["file"]) == os.fsencode(clips / name)
    else:
        assert lines[-1].startswith(os.fsencode(clips / name))
    code, _, err = finished(bundle, "-f", file_format, "-o", clips / "out", clips)
    assert (code, err) == (0, b"")
    assert f"caf\udce9.{file_format}" in [file.name for file in (clips / "out").iterdir()]


def test_a_text_that_stdout_cannot_encode(bundle, recognizer, clips):
    texts = [recognizer.transcribe(clips / name).text for name in ("a.wav", "b.wav")]
    assert not any(text.isascii() for text in texts)
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    code, out, err = finished(bundle, clips, clips / "missing.wav", env=environment)
    assert (code, out) == (1, b"")
    assert err.count(b" cannot be written to stdout in ") == 2
    assert b"set PYTHONIOENCODING=utf-8, or use --output" in err
    assert err.strip().endswith(b"3 of 3 files failed")
    code, out, err = finished(bundle, "-f", "json", clips, env=environment)
    assert (code, err) == (0, b"")  # JSON has escapes
    assert [json.loads(line)["text"] for line in out.splitlines()] == texts


@posix
@pytest.mark.parametrize("closed", ["<&- 2>&-", ">&-"])
def test_streams_that_are_closed(bundle, recognizer, clips, closed):
    script = f'exec "$0" -m u2moe transcribe --model "$1" "$2" {closed}'
    command = ["sh", "-c", script, sys.executable, str(bundle.path), str(clips / "a.wav")]
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    if closed == ">&-":
        assert done.returncode == 1
        assert b"u2moe: error: stdout is closed: the output cannot be written\n" in done.stderr
    else:
        assert (done.returncode, done.stdout.decode()) == (0, recognizer.transcribe(clips / "a.wav").text + "\n")


@pytest.mark.skipif(not FULL.exists(), reason="the system has no full disk at hand")
def test_a_full_disk_names_stdout(bundle, clips):
    with FULL.open("wb") as full, started(bundle, clips / "a.wav", stdout=full, stderr=subprocess.PIPE) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.splitlines()[0] == b"u2moe: error: stdout: cannot be written: No space left on device"
    assert b"Exception ignored" not in err


@posix
def test_standard_input(bundle, recognizer, clips):
    with (clips / "a.wav").open("rb") as file, subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE) as cat:
        code, out, err = finished(bundle, "-f", "json", "-", stdin=cat.stdout)
        cat.stdout.close()
    assert (code, err) == (0, b"")
    assert (json.loads(out)["file"], json.loads(out)["text"]) == ("stdin", recognizer.transcribe(clips / "a.wav").text)


@pytest.mark.parametrize("file_format", ["txt", "tsv"])
def test_segments_are_printed_as_they_are_found(bundle, recognizer, sound, tmp_path, monkeypatch, file_format):
    soundfile.write(tmp_path / "long.wav", np.tile(sound, 30), 16_000)
    order = []
    transcript = recognizer.transcribe(tmp_path / "long.wav")
    assert len(transcript.segments) > 1
    monkeypatch.setattr("u2moe.runtime.cli.outputs.print_result", order.append)
    monkeypatch.setattr(cli.transcribe.ProgressBar, "show", lambda _, seconds: order.append(seconds))
    assert transcribe(bundle, "-f", file_format, tmp_path / "long.wav") == 0
    written = [item for item in order if isinstance(item, str)]
    assert "".join(written) == format_transcript(transcript, file_format)
    assert order.index(written[0]) < order.index(120.0)
    assert len(written) == len(transcript.segments)


@posix
@pytest.mark.parametrize(("arguments", "number", "status"), [
    (["-f", "json"], signal.SIGINT, 130),
    (["-o", "OUT"], signal.SIGTERM, 143),
    pytest.param([], signal.SIGINT, 130, marks=pytest.mark.endurance),
])  # fmt: skip
def test_ctrl_c_and_sigterm_keep_what_was_recognised(bundle, sound, tmp_path, arguments, number, status):
    """Ten hours of audio, interrupted after the first segments."""
    header = 44
    soundfile.write(tmp_path / "long.wav", np.tile(sound, 900), 16_000)
    assert (tmp_path / "long.wav").stat().st_size > header + 3600 * 32_000 - 1
    out = tmp_path / "out"
    arguments = [str(out) if argument == "OUT" else argument for argument in arguments]
    program = """
import sys
from u2moe.runtime import Recognizer, cli

real = Recognizer.segments
def segments(*arguments, **settings):
    for number, segment in enumerate(real(*arguments, **settings)):
        if number == 2:
            sys.stderr.write("two\\n")
            sys.stderr.flush()
        yield segment
Recognizer.segments = segments
sys.exit(cli.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "transcribe", "--model", str(bundle.path), *arguments]
    command, pipe = [*command, str(tmp_path / "long.wav")], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8") as process:
        assert process.stderr.readline() == "two\n"
        process.send_signal(number)
        printed, err = process.communicate(timeout=120)
    assert process.returncode == status
    assert "long.wav: interrupted; the text so far is kept" in err
    if "-o" in arguments:
        assert [file.name for file in out.iterdir()] == ["long.txt.partial"]
        printed = (out / "long.txt.partial").read_text(encoding="utf-8")
    if "json" in arguments:
        found = json.loads(printed)
        assert len(found["segments"]) >= 2
        assert found["complete"] is False
    else:
        assert len(printed.splitlines()) >= 2


def test_a_file_that_was_cut_off_is_recognised_and_told(bundle, clips, capsys):
    content = (clips / "a.wav").read_bytes()
    (clips / "a.wav").write_bytes(content[: len(content) // 2])
    assert transcribe(bundle, clips) == 1
    out, err = capsys.readouterr()
    assert re.match(r".*a\.wav\t.+\n.*b\.wav\t.+\n$", out)
    assert "a.wav: contains 63978 of the 128000 bytes of audio stated in its header: it is truncated" in err
    assert err.endswith("1 of 2 files failed\n")


def test_warnings_are_lines(bundle, clips, sound, capsys, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.audio.files.has_media", lambda: False)
    soundfile.write(clips / "a.wav", np.stack([sound, -sound], axis=1), 16_000)
    (clips / "c.m4a").touch()
    for _ in range(2):
        assert transcribe(bundle, clips) == 0
        assert capsys.readouterr().err.splitlines() == [
            f"u2moe: warning: {clips}: cannot read {clips / 'c.m4a'} (media files need: {install_command('media')})",
            f"u2moe: warning: {clips / 'a.wav'}: its channels cancel each other when averaged: choose one channel",
        ]
    assert transcribe(bundle, "--channel", "0", clips / "a.wav") == 0
    assert capsys.readouterr().err == ""
