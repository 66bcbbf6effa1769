"""What the pages on language models say of the recordings of the tiny model."""

import json

import pytest
import soundfile
from language_models import random_arpa

from u2moe.benchmarks.studies import language_models


@pytest.mark.slow
def test_the_script_measures_what_pages_show(bundle, sound, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.decoding.language_model_weights.FIRST_GRID", {"weight": (0.2,)})
    monkeypatch.setattr("u2moe.runtime.decoding.language_model_weights.SECOND_GRID", {"rescoring_weight": (0.5,)})
    for name in ("test", "dev"):
        soundfile.write(tmp_path / f"{name}.wav", sound[:30_000], 16_000)
        (tmp_path / f"{name}.tsv").write_text(f"{name}.wav\tA B\n", encoding="utf-8")
    (tmp_path / "toy.arpa").write_text(random_arpa(1, "AB", 2), encoding="utf-8")
    (tmp_path / "text.txt").write_text("a b\n", encoding="utf-8")
    sets = [str(tmp_path / "test.tsv"), str(tmp_path / "dev.tsv")]
    model = ["--model", "toy", str(tmp_path / "toy.arpa"), str(tmp_path / "text.txt"), "dev"]
    output = tmp_path / "results.json"
    assert language_models.main([str(bundle.path), "--sets", *sets, *model, "--output", str(output)]) == 0
    results = json.loads(output.read_text(encoding="utf-8"))
    shown = language_models.values(results)
    assert "| all tests | 2 |" in shown["first_pass"]
    assert "dev (development)" in shown["second_pass"]
    assert shown["table"] in capsys.readouterr().out
