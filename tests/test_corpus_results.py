"""Results of a run: status, merging, word errors, and the command line."""

import csv
import dataclasses
import json
import math
import shutil
import signal

import numpy as np
import pytest
import soundfile
from corpora import ToyChoice, rows_in, write_corpus, write_list
from tones import RATE, say

from u2moe.runtime import CorpusError
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.cli import main
from u2moe.runtime.corpus.entry import Shard
from u2moe.runtime.corpus.results import GroupScore, merge, read_outcomes, score
from u2moe.runtime.corpus.rows import as_line
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.corpus.runner import CorpusOptions, run_corpus

ONE = CorpusOptions(block_size=4, num_workers=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), 6)
    lines = [json.loads(line) for line in corpus.read_text().splitlines()]
    lines[1] |= {"txt": f"{lines[1]['txt']} A", "set": "dev"}  # one word is missing
    lines[3] |= {"wav": "missing.wav", "txt": "A B"}
    del lines[4]["txt"], lines[0]["speaker"]
    run_corpus(write_list(corpus, lines), corpus.parent / "out", ToyChoice(), ONE)
    return corpus.parent / "out"


def test_scores_by_speaker_and_field_and_intervals_of_resampled_utterances(results):
    outcomes = list(read_outcomes(OutputFolder(str(results))))
    found = score(outcomes, by="speaker", num_worst=3)
    num_words = sum(len(outcome.reference.split()) for outcome in outcomes if outcome.reference is not None)
    assert (found.total.num_errors, found.total.num_words, found.total.num_utterances) == (3, num_words, 5)
    assert (found.num_failed, found.num_without_transcript) == (1, 1)
    assert {name: group.num_errors for name, group in found.groups.items()} == {
        "s0": 2, "s1": 1, "s2": 0, "unknown": 0,
    }  # fmt: skip
    assert [(worst.key, worst.num_errors) for worst in found.worst] == [("k3", 2), ("k1", 1)]
    assert [worst.key for worst in score(outcomes, num_worst=1).worst] == ["k3"]
    assert (found.report.num_insertions, found.report.num_deletions, found.report.num_substitutions) == (0, 3, 0)
    assert found.report.confusions["A", ""] == 2
    assert list(score(outcomes, by="set").groups) == ["dev", "unknown"]
    assert sum(group.num_utterances for group in score(outcomes, by="length").groups.values()) == 5
    lasting = [dataclasses.replace(outcomes[0], duration=duration) for duration in (30.0, 2.0, 29.9, 1.9)]
    assert list(score(lasting, by="length").groups) == ["0 to 2 s", "2 to 5 s", "20 to 30 s", "30 s and more"]
    with pytest.raises(CorpusError, match="no utterance has a transcript"):
        score(outcome for outcome in outcomes if outcome.reference is None)
    # Compare with a plain bootstrap, and with the standard error of a mean
    rng = np.random.default_rng(1)
    errors, lengths = rng.binomial(10, 0.2, 400), np.full(400, 10)
    group = GroupScore()
    assert group.interval() == (0.0, 0.0)  # without words
    for number in range(400):
        group.add(int(errors[number]), int(lengths[number]))
    drawn = rng.integers(0, 400, (1000, 400))
    expected = np.quantile(errors[drawn].sum(1) / lengths[drawn].sum(1), [0.025, 0.975])
    assert group.interval() == pytest.approx(tuple(expected), abs=0.003)
    assert np.subtract(*group.interval()[::-1]) == pytest.approx(2 * 1.96 * np.sqrt(0.2 * 0.8 / 4000), rel=0.15)


def test_merge_has_every_row_once_in_order_and_none_missing(results, tmp_path):
    folder = OutputFolder(str(results))
    assert merge(folder, tmp_path / "all.jsonl") == 6
    assert merge(folder, tmp_path / "all.csv") == 6
    assert [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()] == rows_in(results)
    with (tmp_path / "all.csv").open(encoding="utf-8", newline="") as table:
        names = ("text", "speaker")  # the first row has no speaker
        merged = [[row[name] for name in names] for row in csv.DictReader(table)]
    assert merged == [[row.get(name, "") for name in names] for row in rows_in(results)]
    with pytest.raises(ValueError, match=r"all\.txt: the name must end in \.jsonl, \.csv or \.parquet"):
        merge(folder, tmp_path / "all.txt")
    half = dataclasses.replace(ONE, shard=Shard(index=1, count=2))
    run_corpus(results.parent / "data.list", tmp_path / "out", ToyChoice(), half)
    with pytest.raises(CorpusError, match="4 utterances are missing"):
        merge(OutputFolder(str(tmp_path / "out")), tmp_path / "half.jsonl")
    assert not (tmp_path / "half.jsonl").exists()


def test_a_damaged_file_is_named_and_done_again(results, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(results, out)
    damaged = out / "blocks" / "000000" / "000000000004-000000000006.jsonl"
    whole = damaged.read_bytes()
    for content in (whole[:-20], b'{"text": "A"}\n', b"[1]\n"):
        damaged.write_bytes(content)
        assert main(["corpus", "score", str(out)]) == 1
        assert f"u2moe: error: {damaged}: is damaged: " in capsys.readouterr().err
        retry = dataclasses.replace(ONE, retry_failed=True)
        assert run_corpus(results.parent / "data.list", out, ToyChoice(), retry).num_before == 0
        assert damaged.read_bytes() == whole


@pytest.mark.slow
def test_results_are_in_parquet_with_warnings_and_nemos_fields_and_in_json_what_it_has(results, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    from u2moe.runtime.corpus.parquet import write  # noqa: PLC0415 - an extra

    def as_parquet(*rows):
        assert write([rows[:1], rows[1:]], tmp_path / "some.parquet") == len(rows)
        return pq.read_table(tmp_path / "some.parquet").to_pylist()

    assert merge(OutputFolder(str(results)), tmp_path / "all.parquet") == 6
    found, expected = pq.read_table(tmp_path / "all.parquet").to_pylist(), rows_in(results)
    for name in ("key", "text", "segments", "error"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    assert sum(row["error"] is None for row in found) == 5
    plain = {"key": "a", "text": "b", "duration": 1.0, "segments": [], "error": None, "model": "m", "options": {}}
    found = as_parquet(plain, plain | {"warnings": ["c", "d"]})
    assert [row["warnings"] for row in found] == [None, ["c", "d"]]
    row = {
        "audio_filepath": "a\udcff.wav", "text": "b", "lang": [1], "key": "a", "pred_text": "c", "read_duration": 1.0,
        "segments": [], "model": "m", "options": {"beam_size": 3}, "error": None,
    }  # fmt: skip
    for found in as_parquet(row, row):
        assert (found["pred_text"], json.loads(found["options"])) == ("c", {"beam_size": 3})
        assert json.loads(found["fields"]) == {"audio_filepath": "a\udcff.wav", "text": "b", "lang": [1]}
    row = plain | {"key": "a\ud800", "fields": {"snr": math.nan, "all": [math.inf]}}
    found = json.loads(as_line(row), parse_constant=pytest.fail)
    assert found["fields"] == {"snr": None, "all": [None]}
    (found,) = as_parquet(row)
    assert found["key"] == "a\\ud800"
    assert json.loads(found["fields"]) == {"snr": None, "all": [None]}


def test_status_shows_warnings_and_the_first_errors_and_counts_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.cli.corpus._NUM_PROBLEMS", 2)
    monkeypatch.setattr("u2moe.runtime.cli.corpus.model_choice", lambda _: ToyChoice())
    samples = say("AB", [0.15] * 2)[0]
    soundfile.write(tmp_path / "anti.wav", np.stack([samples, -samples], axis=1), RATE, subtype="FLOAT")
    (tmp_path / "list.txt").write_text("anti.wav\n" + "".join(f"{number}.wav\n" for number in range(5)))
    arguments, out = ["corpus", str(tmp_path / "list.txt"), "--workers", "1"], str(tmp_path / "out")
    assert main([*arguments, out]) == 1
    assert "1 of 6 utterances have warnings: 'u2moe corpus status OUT'" in capsys.readouterr().err
    assert main(["corpus", "status", out]) == 1
    told = f"warning: {tmp_path}/anti.wav: its channels cancel each other when averaged: choose one channel"
    assert [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["anti.wav", told], *([f"{number}.wav", f"{tmp_path}/{number}.wav: no such file"] for number in range(2)),
        ["and 3 more errors"], ["5 failed"],
    ]  # fmt: skip
    assert main([*arguments, str(tmp_path / "one"), "--channel", "0"]) == 1
    assert "warning" not in capsys.readouterr().err
    assert rows_in(tmp_path / "one")[0]["text"] == "A B"


@pytest.mark.slow
def test_the_command_line(tmp_path, capsys):
    out, clips = str(tmp_path / "out"), DEMO_FOLDER / "clips"
    lines = [line.split("\t") for line in (clips / "transcripts.txt").read_text().splitlines()]
    list_path = tmp_path / "list.tsv"
    list_path.write_text("".join(f"{clips / name}\t{text}\n" for name, text in lines) + "missing.wav\tA\n")
    arguments = ["corpus", str(list_path), out, "--workers", "1", "--block-size", "3"]
    before = signal.getsignal(signal.SIGTERM)
    assert main(arguments) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    error = capsys.readouterr().err
    assert "4 utterances, 0.00 hours of audio in" in error
    assert "1 of 4 utterances failed: their rows have an error" in error
    assert main(arguments) == 0
    assert "0 utterances" in capsys.readouterr().err
    assert main([*arguments, "--beam-size", "3"]) == 1
    assert "the run began with options.beam_size null, but it is now 3" in capsys.readouterr().err
    assert main(["corpus", "status", out]) == 1
    status = capsys.readouterr().out
    assert "4 of 4 utterances, 2 blocks\nmissing.wav\t" in status
    assert status.endswith("missing.wav: no such file\n1 failed\n")
    assert main(["corpus", "score", out, "--worst", "1", "--by", "length"]) == 0
    scored = capsys.readouterr().out
    assert "1 failed, in whole or in part" in scored
    assert "0 insertions, 1 deletions, 0 substitutions in 1 of 4 utterances\nmost confused: A > (nothing) 1\n" in scored
    assert scored.endswith("missing.wav: 1 errors, 1 words\n  - A\n  + \n")
    assert main(["corpus", "score", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["num_utterances"] == 4
    assert main(["corpus", "merge", out, str(tmp_path / "all.jsonl")]) == 0
    texts = [json.loads(line)["text"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert texts == [text for _, text in lines] + [""]
