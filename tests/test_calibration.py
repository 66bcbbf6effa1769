import json

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks import calibration
from u2moe.benchmarks.calibration import area_under_roc, information, reliability


def drawn(shape=lambda confidence: confidence, num=20_000):
    """Words that are right as often as `shape` of their confidence says."""
    random = np.random.default_rng(0)
    confidences = random.random(num)
    return confidences, random.random(num) < shape(confidences)


def test_honest_confidence_lies_on_the_diagonal():
    found = reliability(drawn())
    assert found["num_words"] == 20_000
    assert found["right"] == pytest.approx(0.5, abs=0.02)
    assert found["expected_error"] < 0.02
    assert len(found["bins"]) == 10
    assert sum(item["num_words"] for item in found["bins"]) == 20_000
    for item in found["bins"]:
        assert item["from"] <= item["confidence"] <= item["to"]
        assert item["right"] == pytest.approx(item["confidence"], abs=0.04)
    assert found["area"] == pytest.approx(5 / 6, abs=0.01)  # by integration
    assert found["information"] == pytest.approx(1 - 0.5 / np.log(2), abs=0.01)


def test_overconfidence_shows():
    honest, proud = reliability(drawn()), reliability(drawn(np.square))
    assert proud["expected_error"] == pytest.approx(1 / 6, abs=0.01)  # mean of x - x²
    assert proud["information"] < honest["information"]


def test_words_that_are_equally_sure_say_nothing():
    assert area_under_roc((np.full(9, 0.5), np.arange(9) % 2 == 0)) == 0.5
    assert area_under_roc((np.array([0.1, 0.9]), np.array([False, True]))) == 1.0
    assert area_under_roc((np.array([0.1, 0.9]), np.array([True, False]))) == 0.0
    assert information((np.full(8, 0.5), np.arange(8) % 2 == 0)) == 0.0
    for right in (np.ones(3, bool), np.zeros(3, bool)):
        assert area_under_roc((np.full(3, 0.5), right)) is information((np.full(3, 0.5), right)) is None
    assert reliability((np.zeros(0), np.zeros(0, bool)))["bins"] == []


def test_the_report_of_the_command(bundle, recognizer, sound, tmp_path, capsys):
    """Of two words heard, one is right."""
    soundfile.write(tmp_path / "a.wav", sound, 16_000)
    heard = [word.word for segment in recognizer.transcribe(tmp_path / "a.wav").segments for word in segment.words]
    (tmp_path / "test.tsv").write_text(f"a.wav\t{' '.join(heard[1:])}\n", encoding="utf-8")
    file = tmp_path / "calibration.json"
    assert calibration.main([str(bundle.path), str(tmp_path / "test.tsv"), "--output", str(file)]) == 0
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["sets"]["test"] == results["sets"]["all"]
    assert results["sets"]["test"]["num_words"] == len(heard) > 1
    assert results["sets"]["test"]["right"] == pytest.approx(1 - 1 / len(heard), abs=1e-4)
    assert calibration.table(results) in capsys.readouterr().out
