"""The leaderboard's form of a measurement: columns, word errors after a normaliser, RTFx."""

import json
import re
import sys

import soundfile

from u2moe.benchmarks.studies import run_eval


def test_a_list_is_measured_in_the_form_of_the_leaderboard(bundle, recognizer, sound, tmp_path, monkeypatch, capsys):
    """With whatever normaliser its checkout has, here one that writes all words in small letters."""
    (tmp_path / "normalizer.py").write_text(
        "class EnglishTextNormalizer:\n    def __call__(self, s): return s.lower()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "normalizer", raising=False)
    monkeypatch.chdir(tmp_path)
    for name, samples in (("a.wav", sound[:16_000]), ("b.wav", sound)):
        soundfile.write(name, samples, 16_000, subtype="FLOAT")
    text = recognizer.transcribe(sound[:16_000]).text
    references = f"a.wav\t{text} WORD\nb.wav\tignore time segment in scoring\n"
    (tmp_path / "data.tsv").write_text(references, encoding="utf-8")
    run_eval.main(["--model_id", str(bundle.path), "--dataset", "data.tsv"])
    (file,) = (tmp_path / "results").glob("MODEL_*_DATASET_data.tsv_data.tsv_test.jsonl")
    (row,) = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert list(row) == ["audio_filepath", "duration", "time", "text", "pred_text"]
    assert (row["duration"], row["text"], row["pred_text"]) == (1.0, f"{text} WORD", text)
    found = re.search(r"WER: ([\d.]+) % RTFx: ([\d.]+)", capsys.readouterr().out)
    num_words = len(text.split()) + 1
    assert float(found[1]) == round(100 / num_words, 2)
    assert abs(float(found[2]) - 1 / row["time"]) < 0.01
