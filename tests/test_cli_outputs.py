"""`u2moe transcribe -o`: what is there, what made it, what several runs do to each other."""

import hashlib
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
from u2moe.runtime.bundle.writer import BundleWriter

pytestmark = pytest.mark.slow


@pytest.fixture
def run(bundle, clips, capsys):
    """Transcribe `clips`; the texts that are there then, and what was said on stderr."""

    def transcribe(*arguments, model=bundle, expected=0):
        out = clips / "out"
        assert (
            cli.main(["transcribe", "--model", str(model.path), "-o", str(out), *map(str, arguments), str(clips)])
            == expected
        )
        texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(out.glob("[ab]*"))}
        return texts, capsys.readouterr().err

    return transcribe


def overwrite(clips, text="old"):
    """Replace the texts by another, as if it were what the last run wrote, to see which are written again."""
    for file in (clips / "out").glob("*.txt"):
        before, after = file.read_bytes(), text.encode()
        file.write_bytes(after)
        records = clips / "out" / ".u2moe.jsonl"
        digests = [hashlib.sha256(content).hexdigest().encode() for content in (before, after)]
        records.write_bytes(records.read_bytes().replace(*digests))


def test_what_nothing_changed_for_is_kept(run, clips):
    run()
    overwrite(clips)
    texts, err = run()
    assert set(texts.values()) == {"old"}
    assert err == f"2 of 2 are already in {clips / 'out'}\n"


@pytest.mark.parametrize(
    "options",
    [
        ["--beam-size", "3"], ["--chunk-size", "8"], ["--ctc-weight", "0.5"], ["--stream"], ["--search", "ctc_greedy"],
        ["--channel", "0"],
    ],
)  # fmt: skip
def test_other_options_write_again(run, clips, options):
    first, _ = run()
    overwrite(clips)
    texts, err = run(*options)
    assert "old" not in texts.values()
    assert f"2 in {clips / 'out'} are of another model, other options or changed recordings: written again\n" in err
    overwrite(clips, "older")
    assert run()[0] == first  # and back


def test_other_hotwords_write_again(run, clips, bundle):
    names = clips / "names.list"
    names.write_text(bundle.tokens[5], encoding="utf-8")
    run("--hotwords", names)
    overwrite(clips)
    names.write_text(bundle.tokens[6], encoding="utf-8")
    assert "old" not in run("--hotwords", names)[0].values()


def test_another_model_writes_again(run, clips, bundle, tmp_path_factory):
    with BundleWriter(tmp_path_factory.mktemp("other") / "bundle") as staging:
        for name in bundle.manifest.files:
            staging.add(name, bundle.path / name)
        staging.add("notes.txt", "another bundle")
        other = staging.finish(bundle.manifest)
    run()
    overwrite(clips)
    assert "old" not in run(model=other)[0].values()


def test_a_changed_recording_is_recognised_again(run, clips, sound):
    first, _ = run()
    overwrite(clips)
    soundfile.write(clips / "b.wav", sound[:40_000], 16_000)
    texts, err = run()
    assert texts["a.txt"] == "old"
    assert texts["b.txt"] not in ("old", first["b.txt"])
    assert "1 of 2 are already in" in err


def test_parts_of_recordings_are_told_apart(run, bundle, clips, capsys):
    def transcribe(start, end):
        line = {"key": "a", "wav": str(clips / "a.wav"), "start": start, "end": end}
        (clips / "data.list").write_text(json.dumps(line) + "\n", encoding="utf-8")
        arguments = ["--manifest", str(clips / "data.list"), "-o", str(clips / "parts")]
        assert cli.main(["transcribe", "--model", str(bundle.path), *arguments]) == 0
        return capsys.readouterr().err

    assert "already" not in transcribe(0.0, 1.0)
    assert "1 of 1 are already in" in transcribe(0.0, 1.0)
    assert "changed recordings: written again" in transcribe(0.5, 1.5)


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


def test_overwrite_writes_all(run, clips):
    first, _ = run()
    overwrite(clips)
    (clips / "out" / "a.txt").write_text("mine", encoding="utf-8")
    texts, err = run()
    assert texts == {"a.txt": "mine", "b.txt": "old"}
    assert "1 in" in err
    assert "were not written by u2moe, or edited since: kept" in err
    assert run("--overwrite")[0] == first


def test_records_that_a_killed_process_left_unfinished(run, clips):
    first, _ = run()
    records = clips / "out" / ".u2moe.jsonl"
    records.write_bytes(records.read_bytes() + b'[1]\n{"output": "a.t')
    (clips / "out" / "b.txt").unlink()
    assert run()[0] == first
    assert run()[1] == f"2 of 2 are already in {clips / 'out'}\n"


def test_a_record_without_its_file_does_not_count(run, clips):
    """As where a process was killed between the two: what is there is still of the other options."""
    run()
    old = (clips / "out" / "a.txt").read_bytes()
    texts, _ = run("--beam-size", "2", "--search", "ctc_prefix_beam", "--chunk-size", "8")
    assert texts["a.txt"].encode() != old
    (clips / "out" / "a.txt").write_bytes(old)
    _, err = run("--beam-size", "2", "--search", "ctc_prefix_beam", "--chunk-size", "8")
    assert "1 in" in err
    assert "written again" in err


def test_two_processes_with_the_same_folder_both_finish(bundle, clips, sound):
    for number in range(6):
        soundfile.write(clips / f"c{number}.wav", sound[: 20_000 + 4000 * number], 16_000)
    command = [
        sys.executable,
        "-m",
        "u2moe",
        "transcribe",
        "--model",
        str(bundle.path),
        "-o",
        str(clips / "out"),
        str(clips),
    ]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    names = sorted(file.name for file in (clips / "out").iterdir())
    assert names == [".u2moe.jsonl", "a.txt", "b.txt", *(f"c{number}.txt" for number in range(6))]
    for line in (clips / "out" / ".u2moe.jsonl").read_text(encoding="utf-8").split("\n"):
        assert not line or json.loads(line)["output"] in names


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
    monkeypatch.setattr("u2moe.runtime.cli.transcribe.make_recognizer", lambda _: pytest.fail("the work has begun"))
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
    assert f"{clips / 'a.flac'}: not complete: {clips / 'out' / 'a.txt.partial'}\n" in err
    assert err.endswith("u2moe: error: 1 of 2 files failed\n")
    soundfile.write(clips / "a.flac", sound, 16_000)  # it was only being copied
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
    soundfile.write(clips / f"{'p' * 250}.au", sound, 16_000)  # whose partial transcript would have none
    out = clips / "out"
    assert cli.main(["transcribe", "--model", str(bundle.path), "-f", "json", "-o", str(out), str(clips)]) == 1
    assert sorted(file.name for file in out.glob("[a-z]*")) == ["a.json", "b.json", f"{'p' * 250}.json"]
    err = capsys.readouterr().err
    assert "nnn.json: cannot be written: File name too long" in err
    assert err.endswith("u2moe: error: 1 of 4 files failed\n")
