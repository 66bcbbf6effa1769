"""What the pages on language models say of the recordings of the tiny model."""

import json

import pytest
import soundfile
from language_models import random_arpa

from u2moe.benchmarks.studies import language_models
from u2moe.runtime import LanguageModel

ARPA = "\\data\\\nngram 1=4\n\n\\1-grams:\n-1 a\n-2 b\n-1 <unk>\n-0.5 </s>\n\n\\end\\\n"


def test_overlap_counts_different_ngrams():
    tests = {"one": [["a", "b", "c"], ["a", "b"]], "two": [["x"]]}
    assert language_models.overlaps(tests, [["b", "c", "a"], ["z", "a"]], 2) == {"one": 0.5, "two": 0}
    assert language_models.overlaps(tests, [["x"]], 1) == {"one": 0, "two": 1}


def test_perplexity_is_of_the_words_that_are_known(tmp_path):
    (tmp_path / "a.arpa").write_text(ARPA, encoding="utf-8")
    ngrams = LanguageModel.open(tmp_path / "a.arpa").ngrams
    found, unknown = language_models.perplexity(ngrams, [["a", "b", "zz"], ["a"]])
    assert found == pytest.approx(10 ** ((1 + 2 + 0.5 + 1 + 0.5) / 5))
    assert unknown == 0.25


@pytest.mark.slow
def test_the_script_measures_what_pages_show(bundle, sound, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.corpus.language_model_tuning.FIRST_GRID", {"weight": (0.2,)})
    monkeypatch.setattr("u2moe.runtime.corpus.language_model_tuning.SECOND_GRID", {"rescoring_weight": (0.5,)})
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
    assert results["models"]["toy"]["overlap"]["test"] == [1, 0, 0, 0]
    shown = language_models.values(results)
    assert "| all tests | 2 |" in shown["first_pass"]
    assert "dev (development)" in shown["second_pass"]
    assert shown["table"] in capsys.readouterr().out
