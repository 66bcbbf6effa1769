"""Faults around `u2moe transcribe`: names, encodings, closed streams, full disks, damaged recordings, Ctrl-C."""

import io
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

from u2moe.export import exporter, sherpa
from u2moe.quantize import quantizer
from u2moe.runtime import cli
from u2moe.runtime.cli import outputs
from u2moe.runtime.installation import install_command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_once")]

has_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full disk at hand")
posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX systems")


def command(bundle, *arguments):
    return [sys.executable, "-m", "u2moe", "transcribe", "--model", str(bundle.path), *map(str, arguments)]


def test_paths_that_cannot_be_looked_up_and_names_that_have_no_room_for_the_suffix(bundle, clips, capsys):
    (clips / "empty").mkdir()
    long, longest = (clips / f"{'n' * length}.au" for length in (250, 252))  # .json fits; .json.partial would not
    (clips / "b.wav").rename(long)
    longest.symlink_to(clips / "a.wav")
    paths = [clips / ("n" * 300), clips / "a.wav", clips / "empty", "nul\0.wav", long]
    for output in ([], ["-f", "json", "-o", clips / "out", longest]):
        assert transcribe(bundle, *output, *paths) == 1
        out, err = capsys.readouterr()
        assert [line.split("\t")[0] for line in out.splitlines()] == ([] if output else [str(paths[1]), str(long)])
        for told in ("File name too long", "embedded null", "empty: contains no audio files", " files failed"):
            assert told in err
    assert "nnn.json: cannot be written: File name too long" in err
    assert err.endswith("u2moe: error: 4 of 6 files failed\n")
    assert sorted(file.name for file in (clips / "out").glob("[a-z]*")) == ["a.json", f"{long.stem}.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow only names in Unicode")
def test_names_that_are_no_text(bundle, clips, capsys):
    name = os.fsdecode(b"caf\xe9.wav")
    (clips / "b.wav").rename(clips / name)
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command(bundle, clips), env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[-1].startswith(os.fsencode(clips / name))
    assert transcribe(bundle, "-f", "json", clips) == 0
    assert os.fsencode(json.loads(capsys.readouterr().out.splitlines()[-1])["file"]) == os.fsencode(clips / name)
    for file_format in ("txt", "json"):
        assert transcribe(bundle, "-f", file_format, "-o", clips / "out", clips) == 0
        assert f"caf\udce9.{file_format}" in [file.name for file in (clips / "out").iterdir()]


def test_a_text_that_stdout_cannot_encode(bundle, recognizer, clips, capsys, monkeypatch):
    texts = [recognizer.transcribe(clips / name).text for name in ("a.wav", "b.wav")]
    assert not any(text.isascii() for text in texts)
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="cp1252", write_through=True))
    assert transcribe(bundle, clips, clips / "missing.wav") == 1
    err = capsys.readouterr().err
    assert err.count(" cannot be written to stdout in ") == 2
    assert "set PYTHONIOENCODING=utf-8, or use --output" in err
    assert err.endswith("3 of 3 files failed\n")
    assert printed.getvalue() == b""
    assert transcribe(bundle, "-f", "json", clips) == 0
    assert capsys.readouterr().err == ""  # JSON has escapes
    assert [json.loads(line)["text"] for line in printed.getvalue().splitlines()] == texts


@posix
@pytest.mark.parametrize(("redirection", "told"), [
    ("<&- 2>&-", None), (">&-", b"stdout is closed: the output cannot be written"),
    pytest.param(">/dev/full", b"stdout: cannot be written: No space left on device", marks=has_full_disk),
])  # fmt: skip
def test_streams_that_are_closed_or_full(bundle, recognizer, clips, redirection, told):
    words = ["sh", "-c", f'exec "$0" "$@" {redirection}', *command(bundle, clips / "a.wav")]
    done = subprocess.run(words, capture_output=True, check=False, timeout=120)
    if told is None:
        assert (done.returncode, done.stdout.decode()) == (0, recognizer.transcribe(clips / "a.wav").text + "\n")
    else:
        assert (done.returncode, done.stderr.splitlines()[0]) == (1, b"u2moe: error: " + told)
        assert b"Exception ignored" not in done.stderr
        words = ["sh", "-c", f'exec "$0" -m u2moe --help {redirection}', sys.executable]
        assert subprocess.run(words, stderr=subprocess.PIPE, check=True).stderr == b""


def test_a_reader_that_goes_away_is_no_traceback(bundle, clips):
    reader, writer = os.pipe()
    os.close(reader)
    for words, status in ((command(bundle, clips, clips, clips), 1), ([sys.executable, "-m", "u2moe"], 0)):
        done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, b"Traceback" in done.stderr) == (status, False)
    os.close(writer)


INTERRUPTED = """
import sys, time
from u2moe.runtime import Recognizer, cli

real = Recognizer.segments
def segments(*arguments, **settings):
    for number, segment in enumerate(real(*arguments, **settings)):
        if number == 2:
            sys.stderr.write("two\\n")
            sys.stderr.flush()
            time.sleep(60)
        yield segment
Recognizer.segments = segments
sys.exit(cli.main(sys.argv[1:]))
"""


CTRL_C_IN_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        name == "numpy" and os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from u2moe.__main__ import main
main()
"""


@posix
def test_ctrl_c_while_modules_load_is_no_traceback():
    process = subprocess.run([sys.executable, "-c", CTRL_C_IN_IMPORT, "doctor"], capture_output=True, check=False)
    assert (process.returncode, process.stderr) == (-signal.SIGINT, b"")


@posix
@pytest.mark.parametrize(("arguments", "number", "status"), [
    (["-f", "json"], signal.SIGINT, 130), (["-o", "OUT"], signal.SIGTERM, 143),
])  # fmt: skip
def test_ctrl_c_and_sigterm_keep_what_was_recognised(bundle, sound, tmp_path, arguments, number, status):
    soundfile.write(tmp_path / "long.wav", np.tile(sound, 20), 16_000)
    out = tmp_path / "out"
    arguments = [str(out) if argument == "OUT" else argument for argument in arguments]
    words = command(bundle, *arguments, tmp_path / "long.wav")
    words, pipe = [words[0], "-c", INTERRUPTED, *words[3:]], subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, encoding="utf-8") as process:
        assert process.stderr.readline() == "two\n"
        process.send_signal(number)
        printed, err = process.communicate(timeout=120)
    assert process.returncode == status
    assert "long.wav: interrupted; the text so far is kept" in err
    if "-o" in arguments:
        assert [file.name for file in out.iterdir()] == ["long.txt.partial"]
        assert len((out / "long.txt.partial").read_text(encoding="utf-8").splitlines()) >= 2
    else:
        found = json.loads(printed)
        assert (len(found["segments"]), found["complete"]) == (2, False)


def test_a_file_that_was_cut_off_is_recognised_and_told(bundle, clips, capsys):
    content = (clips / "a.wav").read_bytes()
    (clips / "a.wav").write_bytes(content[: len(content) // 2])
    assert transcribe(bundle, clips) == 1
    out, err = capsys.readouterr()
    assert re.match(r".*a\.wav\t.+\n.*b\.wav\t.+\n$", out)
    assert "a.wav: contains 63978 of the 128000 bytes of audio stated in its header: it is truncated" in err
    assert err.endswith("1 of 2 files failed\n")
    soundfile.write(clips / "none.wav", np.zeros(0), 16_000)
    for options in ([], ["--stream"]):
        assert transcribe(bundle, *options, clips / "none.wav") == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "none.wav: contains no samples" in err


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


def test_two_processes_with_the_same_folder_both_finish(bundle, clips, sound):
    for number in range(3):
        soundfile.write(clips / f"c{number}.wav", sound[: 20_000 + 4000 * number], 16_000)
    again = command(bundle, "-o", clips / "out", clips)
    processes = [subprocess.Popen(again, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    names = sorted(file.name for file in (clips / "out").iterdir())
    assert names == ["a.txt", "b.txt", "c0.txt", "c1.txt", "c2.txt"]


def test_output_folders_are_checked_before_the_work_begins(bundle, tmp_path, capsys, monkeypatch):
    for module, name in ((quantizer, "read_features"), (exporter.Checkpoint, "open"), (sherpa, "supported_graphs")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the work has begun"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    for line in ("quantize", "export", "convert --profile sherpa-onnx"):
        for name, reason in (("out", "is not empty"), ("out/precious/new", "cannot be written")):
            assert cli.main([*line.split(), str(bundle.path), str(tmp_path / name)]) == 1
            assert f"u2moe: error: {tmp_path / name}: {reason}" in capsys.readouterr().err
    for name in (None, tmp_path / "new", tmp_path / "out" / "precious"):
        outputs.try_to_write(name)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "precious").read_text() == "kept"


def test_folders_that_cannot_be_written_and_full_disks_end_the_work(bundle, clips, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    def touch(*_, **__):
        raise PermissionError(13, "Permission denied", str(clips / "out"))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert transcribe(bundle, "-o", clips / "out", clips) == 1  # stops after the first file
    told = f"u2moe: error: {clips / 'out' / 'a.txt'}: cannot be written: No space left on device\n"
    assert capsys.readouterr().err == told
    assert list((clips / "out").glob("[!.]*")) == []
    monkeypatch.setattr("pathlib.Path.touch", touch)
    monkeypatch.setattr("u2moe.runtime.cli.transcribe.model_choice", lambda _: pytest.fail("the work has begun"))
    assert transcribe(bundle, "-o", clips / "out", clips) == 1
    assert "Permission denied" in capsys.readouterr().err
    assert transcribe(bundle, "-o", clips / "a.wav", clips) == 1
    assert "a.wav: cannot be written: File exists" in capsys.readouterr().err


def test_what_was_recognised_before_damage_is_kept_apart(bundle, clips, sound, capsys):
    (clips / "a.wav").unlink()
    soundfile.write(clips / "a.flac", np.tile(sound, 12), 16_000)
    content = bytearray((clips / "a.flac").read_bytes())
    half = len(content) // 2
    content[half : half + 3000] = bytes(3000)
    (clips / "a.flac").write_bytes(content)
    assert transcribe(bundle, "-f", "json", clips / "a.flac") == 1
    printed, err = capsys.readouterr()
    found = json.loads(printed)
    assert found["segments"]
    assert found["complete"] is False
    assert "a.flac: cannot be read as audio" in found["error"]
    assert found["error"] in err
    out = clips / "out"
    assert transcribe(bundle, "-o", out, clips) == 1
    err = capsys.readouterr().err
    assert sorted(file.name for file in out.glob("[ab]*")) == ["a.txt.partial", "b.txt"]
    assert (out / "a.txt.partial").read_text(encoding="utf-8").strip()
    assert f"{clips / 'a.flac'}: incomplete: {out / 'a.txt.partial'}\n" in err
    assert err.endswith("u2moe: error: 1 of 2 files failed\n")
    soundfile.write(clips / "a.flac", sound, 16_000)  # it was still being copied
    assert transcribe(bundle, "-o", out, clips) == 0
    assert sorted(file.name for file in out.glob("[ab]*")) == ["a.txt", "b.txt"]
