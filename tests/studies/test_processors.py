"""The study of processors, with this one as another."""

import json
import shlex
import sys

import pytest
import soundfile

from u2moe.benchmarks.studies.processors import main, values

pytestmark = pytest.mark.slow


def test_a_twin_differs_in_nothing(exported, sound, tmp_path, capsys):
    for name, samples in (("one", sound), ("two", sound[:16_000])):
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
    (tmp_path / "list.tsv").write_text("one.wav\tA B C\ntwo.wav\tD\n", encoding="utf-8")
    options = [f"--processor=twin={shlex.join([sys.executable])}", f"--list={tmp_path / 'list.tsv'}"]
    bundle = f"--bundle=float32={exported('moe_tiny')}"
    assert main([bundle, *options, f"--output={tmp_path / 'found.json'}"]) == 0
    results = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    here, twin = results["found"]["float32"].values()
    assert here == twin
    assert list(here) == ["full context", "chunk 16"]
    for own in here.values():
        assert (own["num_recordings"], own["num_words"], own["num_other_texts"]) == (2, 4, 0)
    assert values(results)["table"] in capsys.readouterr().out


def test_a_bundle_needs_a_name(capsys):
    with pytest.raises(SystemExit):
        main(["--bundle", "folder"])
    assert "NAME=VALUE" in capsys.readouterr().err
