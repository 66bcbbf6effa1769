"""Runs over corpora: each utterance gets one row, even with damaged files, kills, repetitions and shards."""

import dataclasses
import os
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import soundfile
from corpora import ToyChoice, assert_survives_kill, crashing, files_in, listed, rows_in, write_list
from hypothesis import given
from hypothesis import strategies as st
from tones import RATE, say, toy_recognizer

from u2moe.runtime import CorpusError, DecodingOptions
from u2moe.runtime.corpus import run_folder
from u2moe.runtime.corpus.entry import AudioFile, Entry, Shard, cut_into_blocks, range_of
from u2moe.runtime.corpus.lists import ListOptions, read_utterances
from u2moe.runtime.corpus.pool import num_cores
from u2moe.runtime.corpus.recognition import BATCH_LEN, BlockRecognizer
from u2moe.runtime.corpus.rows import RowMaker
from u2moe.runtime.corpus.run_folder import LEASE_S, Claims
from u2moe.runtime.corpus.runner import CorpusOptions, run_corpus

ONE = CorpusOptions(block_size=4, num_workers=1)


def test_every_utterance_has_its_row_in_order(corpus, undisturbed):
    rows = rows_in(undisturbed)
    assert [(row["key"], row["text"], row["speaker"]) for row in rows] == [
        (line["key"], line["txt"], line["speaker"]) for line in listed(corpus)
    ]
    for row, line in zip(rows, listed(corpus), strict=True):
        transcript = toy_recognizer().transcribe(corpus.with_name(line["wav"]))
        assert row["duration"] == round(transcript.duration, 3)
        assert (row["error"], row["options"], row["reference"]) == (None, {}, line["txt"])
        words = [word for segment in row["segments"] for word in segment["words"]]
        expected = [word for segment in transcript.segments for word in segment.words]
        for word, other in zip(words, expected, strict=True):
            assert (word["word"], word["start"], word["end"]) == (other.word, other.start, other.end)
            assert word["confidence"] == pytest.approx(other.confidence, abs=1e-4)
    assert sorted(files_in(undisturbed)) == [
        "000000000000-000000000004.jsonl", "000000000004-000000000008.jsonl", "000000000008-000000000010.jsonl"
    ]  # fmt: skip


def test_a_second_run_does_what_is_missing(corpus, undisturbed, tmp_path):
    run_corpus(corpus, tmp_path, ToyChoice(), ONE)
    assert files_in(tmp_path) == files_in(undisturbed)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("blocks/*/*")}
    removed = sorted(before)[1]
    removed.unlink()
    for place in (tmp_path, removed.parent, tmp_path / "claims"):  # left by killed processes
        for name, age_s in ((".0123456789abcdef.part", 7200), (".fedcba9876543210.part", 60)):
            (place / name).touch()
            os.utime(place / name, (time.time() - age_s,) * 2)
    progress = run_corpus(corpus, tmp_path, ToyChoice(), ONE)
    assert (progress.num_before, progress.num_done, progress.total) == (6, 4, 10)
    parts = list(tmp_path.rglob(".*.part"))
    assert [file.name for file in parts] == [".fedcba9876543210.part"] * 3
    for file in parts:
        file.unlink()
    assert files_in(tmp_path) == files_in(undisturbed)
    after = {file: file.stat().st_mtime_ns for file in tmp_path.glob("blocks/*/*")}
    assert {file for file in before if before[file] != after[file]} == {removed}


@pytest.mark.slow
def test_workers_that_load_the_model_themselves_give_the_same(corpus, undisturbed, tmp_path):
    run_corpus(corpus, tmp_path, ToyChoice(can_be_forked=False), dataclasses.replace(ONE, num_workers=2))
    assert files_in(tmp_path) == files_in(undisturbed)


def test_another_run_is_refused(corpus, undisturbed, tmp_path):
    other, one_channel = write_list(tmp_path / "data.list", listed(corpus)[:1]), ListOptions(channel=0)
    for changed, message in (
        ({"model": ToyChoice(threshold=18.0)}, "model"),
        ({"model": ToyChoice(options=DecodingOptions(beam_size=3))}, "options"),
        ({"model": ToyChoice(hotwords_digest="0")}, "hotwords"),
        ({"options": dataclasses.replace(ONE, block_size=5)}, "block size 4, but it is now 5"),
        ({"options": dataclasses.replace(ONE, list_options=one_channel)}, "channel null, but it is now 0"),
        ({"list_path": other}, "list digest"),
    ):
        arguments = {"list_path": corpus, "output": undisturbed, "model": ToyChoice(), "options": ONE, **changed}
        with pytest.raises(CorpusError, match=f"the run began with {message}"):
            run_corpus(**arguments)


def test_what_fails_becomes_a_row_and_is_tried_again_where_that_is_asked_for(corpus, tmp_path):
    soundfile.write(tmp_path / "long.wav", np.concatenate([say("ABC", [0.2] * 3)[0]] * 20), RATE)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "long.wav").read_bytes()[:-RATE])
    (tmp_path / "text.wav").write_text("no audio")
    lines = [
        {"key": "missing", "wav": "missing.wav"}, {"key": "text", "wav": "text.wav"}, {"key": "cut", "wav": "cut.wav"},
        {"wav": "no key"}, {"key": "empty", "wav": "long.wav", "start": 900},
        {"key": "good", "wav": str(corpus.with_name("0.wav"))}, {"key": "long", "wav": "long.wav"},
    ]  # fmt: skip
    list_path, options = write_list(tmp_path / "data.list", lines), dataclasses.replace(ONE, block_size=5)
    progress = run_corpus(list_path, tmp_path / "out", ToyChoice(), options)
    assert (progress.num_done, progress.num_failed) == (7, 5)
    rows = {row["key"]: row for row in rows_in(tmp_path / "out")}
    for key, error in {
        "missing": "no such file", "text": "cannot be read as audio", "cut": "it is truncated",
        "data.list:4": "line 4: key must be a non-empty string, got None", "empty": "has no audio from 900 s",
    }.items():  # fmt: skip
        assert error in rows[key]["error"]
    (tmp_path / "missing.wav").write_bytes(corpus.with_name("0.wav").read_bytes())
    assert run_corpus(list_path, tmp_path / "out", ToyChoice(), options).num_done == 0
    again = run_corpus(list_path, tmp_path / "out", ToyChoice(), dataclasses.replace(options, retry_failed=True))
    assert (again.num_before, again.num_done, again.num_failed) == (2, 5, 4)
    assert rows_in(tmp_path / "out")[0]["text"] == rows["good"]["text"] == listed(corpus)[0]["txt"]
    for key in ("long", "cut"):
        transcript = toy_recognizer().transcribe(tmp_path / f"{key}.wav")
        assert rows[key]["text"] == transcript.text
        assert len(rows[key]["segments"]) == len(transcript.segments) > 1


def test_channels_are_chosen_and_warnings_about_audio_are_in_its_row_and_others_go_where_they_went(tmp_path, recwarn):
    left, right = (say(words, [0.15] * 2)[0] for words in ("AB", "BC"))
    left, right = (channel[: min(len(left), len(right))] for channel in (left, right))
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], axis=1), RATE)
    soundfile.write(tmp_path / "anti.wav", np.stack([left, -left], axis=1), RATE, subtype="FLOAT")
    stereo = write_list(tmp_path / "data.list", [{"key": name, "wav": f"{name}.wav"} for name in ("two", "anti")])
    for channel, texts, num_warned in ((0, ["A B", "A B"], 0), (1, ["B C", "A B"], 0), (None, None, 1)):
        options = dataclasses.replace(ONE, list_options=ListOptions(channel=channel))
        progress = run_corpus(stereo, tmp_path / f"{channel}", ToyChoice(), options)
        two, anti = rows_in(tmp_path / f"{channel}")
        assert texts in (None, [two["text"], anti["text"]])
        assert (progress.num_failed, progress.num_warned, "warnings" in two) == (0, num_warned, False)
    (warning,) = anti["warnings"]
    assert warning.endswith("anti.wav: its channels cancel each other when averaged: choose one channel")

    # Only warnings about audio belong to a row, not those of onnxruntime, for example
    class Warner(RowMaker):
        def of_transcript(self, *arguments):
            warnings.warn("other", UserWarning, stacklevel=1)
            return super().of_transcript(*arguments)

    rows = BlockRecognizer(ToyChoice().load(), Warner(model="m", options={})).recognize(list(read_utterances(stereo)))
    assert len(rows[1]["warnings"]) == 1
    assert {str(warning.message) for warning in recwarn} == {"other"}


def test_rows_for_nemo_keep_its_fields_and_folders_of_something_else_are_refused(corpus, tmp_path):
    line = {"audio_filepath": str(corpus.with_name("0.wav")), "duration": 1, "text": "b", "lang": "en"}
    run_corpus(write_list(tmp_path / "list.json", [line]), tmp_path / "out", ToyChoice(), ONE)
    (row,) = rows_in(tmp_path / "out")
    assert {name: row[name] for name in line} == line
    assert row["pred_text"] == listed(corpus)[0]["txt"]
    (tmp_path / "mine.txt").touch()
    with pytest.raises(CorpusError, match=r"contains files but no run\.json"):
        run_corpus(corpus, tmp_path, ToyChoice(), ONE)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"run\.json: does not describe a run"):
        run_corpus(corpus, tmp_path, ToyChoice(), ONE)


def test_shards_share_a_folder(corpus, undisturbed, tmp_path):
    for index in (2, 0, 1):
        run_corpus(corpus, tmp_path, ToyChoice(), dataclasses.replace(ONE, shard=Shard(index=index, count=3)))
        assert len(files_in(tmp_path)) == (2, 0, 1).index(index) + 1
    assert files_in(tmp_path) == files_in(undisturbed)
    for text in ("", "1", "2/2", "0/0", "-1/2", "a/b"):
        with pytest.raises(ValueError, match="shard must be i/n"):
            Shard.parse(text)


@given(num=st.integers(0, 40), size=st.integers(1, 12), count=st.integers(1, 5))
def test_blocks_cover_a_list_once(num, size, count):
    utterances = [Entry(key=str(i), source=AudioFile(path="x")) for i in range(num)]
    blocks = list(cut_into_blocks(iter(utterances), size))
    assert [utterance for block in blocks for utterance in block.entries] == utterances
    for block in blocks:
        assert range_of(f"blocks/{block.file_name}") == (block.start, block.stop)
        assert sum(block.number in Shard(index=i, count=count) for i in range(count)) == 1
        assert block.entries[0].key == str(block.start)


def test_short_utterances_are_decoded_together_on_the_cores_there_are(corpus, tmp_path, monkeypatch):
    recognizer = ToyChoice().load()
    utterances = list(read_utterances(corpus))
    rows = BlockRecognizer(recognizer, RowMaker(model="m", options={})).recognize(utterances)
    assert 1 < max(recognizer.model.session.batches) <= 8
    recognizer.model.session.fails = True  # then each is decoded separately
    failed = BlockRecognizer(recognizer, RowMaker(model="m", options={})).recognize(utterances)
    assert [row["text"] for row in rows] == [line["txt"] for line in listed(corpus)]
    assert {row["error"] for row in failed} == {"the device is gone"}
    quota = tmp_path / "cpu.max"
    quota.write_text("150000 100000\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 7, 5}, raising=False)
    assert num_cores(quota) == 2
    quota.write_text("max 100000\n")
    assert num_cores(quota) == num_cores(tmp_path / "none") == 4


def test_a_claim_holds_while_its_owner_lives(tmp_path, monkeypatch):
    claims = Claims(tmp_path)
    assert claims.take(3)
    imports = "from u2moe.runtime.corpus.run_folder import Claims"
    script = f"{imports}; c = Claims({str(tmp_path)!r}); print(c.take(3), c.take(4))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
    assert [(claim.number, claim.process) for claim in claims.held() if claim.number == 3] == [(3, os.getpid())]
    assert claims.take(4)  # the owner has ended
    claims.release(3)
    assert Claims(tmp_path).take(3)

    monkeypatch.setattr(run_folder.socket, "gethostname", lambda: "another")
    other = Claims(tmp_path)
    assert not other.take(4)
    claims.renew()
    os.utime(tmp_path / f"{4:012}", (time.time() - LEASE_S - 5,) * 2)
    assert other.take(4)
    other.close({3})  # the owner is alive
    assert [claim.number for claim in other.held()] == [3]
    os.utime(tmp_path / f"{3:012}", (time.time() - LEASE_S - 5,) * 2)
    other.close({4})
    assert [claim.number for claim in other.held()] == [3]
    other.close({3})
    assert other.held() == []


pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and shells")


@pytest.mark.slow
def test_a_file_that_kills_its_reader_becomes_a_row(corpus, tmp_path):
    list_path = crashing(corpus, tmp_path / "kaldi", "kill -SEGV $PPID; sleep 9")
    options = dataclasses.replace(ONE, list_options=ListOptions(allow_pipes=True))
    progress = run_corpus(list_path, tmp_path / "out", ToyChoice(), options)
    rows = rows_in(tmp_path / "out")
    assert (progress.num_deaths, progress.num_failed) == (2, 1)
    assert rows[2]["error"] == "left out: processes that recognised it died (SIGSEGV)"
    expected = [line["txt"] for line in listed(corpus)[:6]]
    assert [row["text"] for row in rows] == [*expected[:2], "", *expected[3:]]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_its_audio_counted_once(corpus, tmp_path):
    """The worker dies at the last utterance of its block."""
    lines = listed(corpus)
    folder, once = tmp_path / "kaldi", tmp_path / "once"
    folder.mkdir()
    command = f"test -e {once} || {{ touch {once}; kill -9 $PPID; sleep 9; }}; cat {corpus.with_name('1.wav')}"
    first = [lines[number % 9] for number in range(BATCH_LEN)]
    wavs = [f"k{number:02} {corpus.with_name(line['wav'])}\n" for number, line in enumerate(first)]
    (folder / "wav.scp").write_text("".join([*wavs, f"k99 {command} |\n"]), encoding="utf-8")
    options = CorpusOptions(num_workers=1, list_options=ListOptions(allow_pipes=True))
    seen = []
    out, note = tmp_path / "out", lambda found: seen.append(found.num_recognized)
    progress = run_corpus(folder, out, ToyChoice(), options, on_progress=note)
    assert (progress.num_deaths, progress.num_recognized, progress.num_done, progress.num_failed) == (1, 65, 65, 0)
    assert [row["text"] for row in rows_in(out)] == [line["txt"] for line in (*first, lines[1])]
    assert progress.seconds == pytest.approx(sum(row["duration"] for row in rows_in(out)), abs=0.1)
    assert max(seen) == 65


@pytest.mark.slow
def test_a_program_that_is_not_guarded_is_told_so(corpus, tmp_path):
    """Spawned workers import the program. Without the guard, each would start a run."""
    (tmp_path / "program.py").write_text(
        "import sys; from corpora import ToyChoice; from u2moe.runtime.corpus.runner import *\n"
        "run_corpus(sys.argv[1], sys.argv[2], ToyChoice(can_be_forked=False), CorpusOptions(num_workers=1))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(tmp_path / "program.py"), str(corpus), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "worker processes die at startup (exit status 1): does the program call run_corpus only under "
        "`if __name__ == '__main__':`?\n"
    )


@pytest.mark.slow
def test_a_run_whose_machine_fails_goes_on_elsewhere(corpus, tmp_path):
    """All processes of a run are killed at the same time; unfinished blocks leave nothing."""
    script = (
        "import sys; from corpora import ToyChoice; from u2moe.runtime.corpus.runner import *\n"
        "run_corpus(sys.argv[1], sys.argv[2], ToyChoice(), CorpusOptions(block_size=2, num_workers=2, "
        "list_options=ListOptions(allow_pipes=True)))"
    )
    assert_survives_kill(script, corpus, tmp_path)
    assert not list((tmp_path / "out" / "claims").glob("[0-9]*"))
