import dataclasses
import json
import shutil

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.studies import calibration
from u2moe.benchmarks.studies.calibration import area_under_roc, fit, reliability, write_calibration
from u2moe.runtime import Bundle
from u2moe.runtime.bundle.manifest import Calibration
from u2moe.runtime.decoding.rescoring import word_confidence


def drawn(shape=lambda confidence: confidence, num=20_000):
    """Draw words that are correct with probability `shape` of their confidence."""
    random = np.random.default_rng(0)
    confidences = random.random(num)
    return confidences, random.random(num) < shape(confidences)


def test_confidences_that_are_honest_or_equally_sure_and_their_fit():
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
    assert reliability(drawn(np.square))["expected_error"] == pytest.approx(1 / 6, abs=0.01)  # mean of x - x²
    assert area_under_roc((np.full(9, 0.5), np.arange(9) % 2 == 0)) == 0.5
    assert area_under_roc((np.full(3, 0.5), np.ones(3, bool))) is None
    assert reliability((np.zeros(0), np.zeros(0, bool)))["bins"] == []
    confidences, right = drawn()
    scale, bias = fit((1 / (1 + np.exp(-(np.log(confidences / (1 - confidences)) + 1) / 2)), right))
    assert (scale, bias) == (pytest.approx(2, abs=0.1), pytest.approx(-1, abs=0.1))
    scale, _ = fit((np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])))
    assert 0 < scale < 10  # the search ends when all are separated


@pytest.mark.slow
def test_the_fit_is_written_into_the_bundle_on_top_of_what_it_says(bundle, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    assert write_calibration(folder, 2.0, 0.5) == Calibration(scale=2.0, bias=0.5)
    assert Bundle.open(folder).manifest == dataclasses.replace(
        bundle.manifest, calibration=Calibration(scale=2.0, bias=0.5)
    )
    both = write_calibration(folder, 3.0, 0.25)
    assert both == Calibration(scale=6.0, bias=1.75) == Bundle.open(folder).manifest.calibration
    expected = word_confidence(
        [word_confidence([0.3], Calibration(scale=2.0, bias=0.5))], Calibration(scale=3.0, bias=0.25)
    )
    assert word_confidence([0.3], both) == pytest.approx(expected)
    with pytest.raises(ValueError, match="scale must be a number above 0"):
        write_calibration(folder, -1.0, 0.0)
    assert Bundle.open(folder).manifest.calibration == both
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in bundle.path.iterdir())


@pytest.mark.slow
def test_the_report_of_the_command(bundle, recognizer, sound, tmp_path, capsys):
    """All words are correct, except the one with the lowest confidence."""
    soundfile.write(tmp_path / "a.wav", sound, 16_000)
    recognized = [word for segment in recognizer.transcribe(tmp_path / "a.wav").segments for word in segment.words]
    wrong = min(recognized, key=lambda word: word.confidence)
    said = " ".join(word.word for word in recognized if word is not wrong)
    (tmp_path / "test.tsv").write_text(f"a.wav\t{said}\n", encoding="utf-8")
    file = tmp_path / "calibration.json"
    calibration.main([str(bundle.path), str(tmp_path / "test.tsv"), "--results", str(file)])
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["sets"]["test"] == results["sets"]["all"]
    assert results["sets"]["test"]["num_words"] == len(recognized) > 1
    assert results["sets"]["test"]["right"] == pytest.approx(1 - 1 / len(recognized), abs=1e-4)
    assert results["sets"]["test"]["area"] == 1.0
    assert calibration.values(results)["table"] in capsys.readouterr().out
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    calibration.main([str(folder), str(tmp_path / "test.tsv"), "--fit"])
    written = Bundle.open(folder).manifest.calibration
    assert f"scale {written.scale}, bias {written.bias}" in capsys.readouterr().out
