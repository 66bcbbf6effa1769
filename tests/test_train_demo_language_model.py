"""The script for the language model of the package, on a few sentences in place of the Debian packages."""
# ruff: noqa: E402 - the recipe is a folder of scripts, which has to be put on the path first

import gzip
import lzma
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")

RECIPE = Path(__file__).parents[1] / "examples" / "train_demo"
sys.path.insert(0, str(RECIPE))
import games
import language_model
import withheld
from wordnet import write_wordnet

from u2moe.runtime import LanguageModel
from u2moe.runtime.language.kneser_ney import TrainingOptions


def test_models_are_made_without_the_sentences_of_the_tests(tmp_path, monkeypatch):
    share = tmp_path / "debian/usr/share"
    write_wordnet(share)
    (share / "games/fortunes").mkdir(parents=True)
    (share / "games/fortunes/wisdom").write_text("Never feed a sleeping dragon.\n%\nThe secret sentence is here.\n")
    (share / "doc/anarchism").mkdir(parents=True)
    (share / "doc/anarchism/a.html").write_text("<p>Some <b>articles</b> are long. Others are not.</p>")
    (share / "dictd").mkdir()
    (share / "dictd/gcide.dict.dz").write_bytes(gzip.compress(b"A dictionary explains many words. "))
    table = b"text\tsplit\nLook behind you\ttrain\nNobody knows this\ttest\n"
    (tmp_path / "queen.tsv.xz").write_bytes(lzma.compress(table))
    monkeypatch.setattr(games, "TABLES", tmp_path)
    (tmp_path / "test").mkdir()
    for name in (*withheld.TESTS, *withheld.VALIDATION[1:]):
        (tmp_path / "test" / f"{name}.tsv").write_text("a.flac\tTHE SECRET SENTENCE IS\n")
    sizes = {name: (TrainingOptions(order=2), 8) for name in language_model.SIZES}
    monkeypatch.setattr(language_model, "SIZES", sizes)
    monkeypatch.setattr(language_model, "NUM_SPOKEN", 20)
    places = ["--work-dir", tmp_path, "--debian", tmp_path / "debian"]
    monkeypatch.setattr(sys, "argv", ["", *map(str, places), "--output", str(tmp_path / "out")])
    language_model.main()
    text = (tmp_path / "out/general.txt").read_text(encoding="utf-8")
    for sentence in ("the dog barked loudly", "never feed a sleeping dragon", "some articles are long",
                     "a dictionary explains many words"):  # fmt: skip
        assert f"{sentence}\n" in text
    assert "secret" not in text
    assert (tmp_path / "out/game.txt").read_text(encoding="utf-8") == "look behind you\n"
    assert {path.stem for path in (tmp_path / "out").glob("*.lm")} == set(sizes)
    assert "behind" in LanguageModel.open(tmp_path / "out/game.lm").ngrams.words
