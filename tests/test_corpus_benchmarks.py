"""The measurements of corpora, on small ones."""

import json
import os

import pytest

from u2moe.benchmarks.endurance import kills, long_manifest
from u2moe.benchmarks.peers import corpora


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_kills_of_a_small_corpus(tmp_path, capsys):
    file = tmp_path / "kills.json"
    assert kills.main([str(tmp_path), "--files", "160", "--kills", "2", "--output", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert (found["num_keys"], found["num_rows"], found["num_blocks"], found["num_different"]) == (160, 160, 4, 0)
    assert "160, 160" in capsys.readouterr().out


def test_what_differs_is_reported():
    found = kills.Report(num_files=2, num_keys=2, num_rows=3, num_different=1)
    assert found.failures == ["keys are not there exactly once", "files differ from the undisturbed run"]


def test_a_manifest_that_is_long(tmp_path, capsys):
    assert long_manifest.main([str(tmp_path), "--lines", "3000"]) == 0
    assert "3,000" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_cases_of_ours_recognise_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    manifest = corpora.make_corpus(tmp_path / "corpus", 4)
    found = {name: corpora.run_case(name, manifest, tmp_path / name) for name in ("loop", "one")}
    assert found["loop"]["audio_s"] == pytest.approx(found["one"]["audio_s"], abs=0.01)
    assert found["one"]["failed"] == 0
    assert all(0 < case["seconds"] < case["whole_s"] for case in found.values())
