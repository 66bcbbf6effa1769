"""`u2moe transcribe -o`: existing files, concurrent runs, damaged recordings."""

import io
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

from u2moe.runtime import cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("loaded_once")]


@pytest.fixture
def run(bundle, clips, capsys):
    """Transcribe `clips`; return the texts in the folder, and stderr."""

    def transcribe(*arguments, model=bundle, expected=0):
        out = clips / "out"
        assert (
            cli.main(["transcribe", "--model", str(model.path), "-o", str(out), *map(str, arguments), str(clips)])
            == expected
        )
        texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(out.glob("[ab]*"))}
        return texts, capsys.readouterr().err

    return transcribe


def test_what_comes_from_a_pipe_is_never_there_already(bundle, clips, sound, capsys, monkeypatch):
    soundfile.write(clips / "other.wav", sound[::-1], 16_000)
    for name in ("a.wav", "a.wav", "other.wav"):
        with (clips / name).open("rb") as stream:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
            assert cli.main(["transcribe", "--model", str(bundle.path), "-o", str(clips / "piped"), "-"]) == 0
        assert "already" not in capsys.readouterr().err
        text = (clips / "piped" / "stdin.txt").read_text(encoding="utf-8")
        assert cli.main(["transcribe", "--model", str(bundle.path), str(clips / name)]) == 0
        assert capsys.readouterr().out == text


def test_two_processes_with_the_same_folder_both_finish(bundle, clips, sound):
    for number in range(6):
        soundfile.write(clips / f"c{number}.wav", sound[: 20_000 + 4000 * number], 16_000)
    command = [sys.executable, "-m", "u2moe", "transcribe", "--model", bundle.path, "-o", clips / "out", clips]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    names = sorted(file.name for file in (clips / "out").iterdir())
    assert names == ["a.txt", "b.txt", *(f"c{number}.txt" for number in range(6))]


def test_what_killed_processes_left_is_removed(run, clips):
    (clips / "deep").mkdir()
    shutil.copy(clips / "a.wav", clips / "deep")
    (clips / "out" / "deep").mkdir(parents=True)
    for place in (clips / "out", clips / "out" / "deep"):
        for name, age_s in ((".0123456789abcdef.part", 7200), (".fedcba9876543210.part", 60)):
            (place / name).touch()
            os.utime(place / name, (time.time() - age_s,) * 2)
    run()
    assert [file.name for file in (clips / "out").rglob(".*.part")] == [".fedcba9876543210.part"] * 2


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(bundle, clips, capsys, monkeypatch):
    def touch(*_, **__):
        raise PermissionError(13, "Permission denied", str(clips / "out"))

    monkeypatch.setattr("pathlib.Path.touch", touch)
    monkeypatch.setattr("u2moe.runtime.cli.transcribe.model_choice", lambda _: pytest.fail("the work has begun"))
    assert cli.main(["transcribe", "--model", str(bundle.path), "-o", str(clips / "out"), str(clips)]) == 1
    assert "Permission denied" in capsys.readouterr().err


def damaged(clips, sound):
    soundfile.write(clips / "a.flac", np.tile(sound, 12), 16_000)
    (clips / "a.wav").unlink()
    content = bytearray((clips / "a.flac").read_bytes())
    half = len(content) // 2
    content[half : half + 3000] = bytes(3000)
    (clips / "a.flac").write_bytes(content)


def test_what_was_recognised_before_damage_is_kept_apart(run, clips, sound):
    damaged(clips, sound)
    texts, err = run(expected=1)
    assert sorted(texts) == ["a.txt.partial", "b.txt"]
    assert texts["a.txt.partial"].strip()
    assert f"{clips / 'a.flac'}: incomplete: {clips / 'out' / 'a.txt.partial'}\n" in err
    assert err.endswith("u2moe: error: 1 of 2 files failed\n")
    soundfile.write(clips / "a.flac", sound, 16_000)  # it was still being copied
    texts, _ = run()
    assert sorted(texts) == ["a.txt", "b.txt"]


def test_json_says_that_it_is_not_complete(bundle, clips, sound, capsys):
    damaged(clips, sound)
    assert cli.main(["transcribe", "--model", str(bundle.path), "-f", "json", str(clips / "a.flac")]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["segments"]
    assert found["complete"] is False
    assert "a.flac: cannot be read as audio" in found["error"]
    assert found["error"] in err


def test_a_name_that_has_no_room_for_the_suffix_is_one_failure(bundle, clips, sound, capsys):
    soundfile.write(clips / f"{'n' * 252}.au", sound, 16_000)
    soundfile.write(clips / f"{'p' * 250}.au", sound, 16_000)  # its partial transcript would have too long a name
    out = clips / "out"
    assert cli.main(["transcribe", "--model", str(bundle.path), "-f", "json", "-o", str(out), str(clips)]) == 1
    assert sorted(file.name for file in out.glob("[a-z]*")) == ["a.json", "b.json", f"{'p' * 250}.json"]
    err = capsys.readouterr().err
    assert "nnn.json: cannot be written: File name too long" in err
    assert err.endswith("u2moe: error: 1 of 4 files failed\n")
