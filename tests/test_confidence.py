import copy
import dataclasses
import itertools
import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.benchmarks.studies.calibration import write_calibration
from u2moe.quantize import RECIPES, quantize_bundle
from u2moe.runtime import Bundle, DecodingOptions, Recognizer
from u2moe.runtime.bundle.manifest import Calibration
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.decoding.rescoring import word_confidence


def test_words_are_as_sure_as_their_tokens_and_calibration_is_kept_by_quantization(bundle, tmp_path):
    assert word_confidence([0.9, 0.2, 0.8], None) == 0.2
    assert word_confidence([0.8], None) == 0.8
    assert word_confidence([0.8], Calibration()) == pytest.approx(0.8)
    assert word_confidence([0.5], Calibration(scale=2.0)) == 0.5
    assert word_confidence([0.8], Calibration(scale=2.0)) == pytest.approx(16 / 17)  # odds of 4 become 16
    assert word_confidence([0.5], Calibration(bias=math.log(3))) == pytest.approx(0.75)
    # A calibration is added to existing graphs, and later changed: the graphs must still fit the manifest
    calibration = Calibration(scale=1.5, bias=-0.5)
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    write_calibration(folder, calibration.scale, calibration.bias)
    Bundle.open(folder).load()
    assert Bundle.open(folder).manifest.metadata() == bundle.manifest.metadata()
    quantized, _ = quantize_bundle(folder, tmp_path / "int8", RECIPES["int8"])
    assert quantized.manifest.calibration == calibration
    # As described in the embedding guide
    assert Bundle.open(DEMO_FOLDER).manifest.calibration is not None


@given(st.lists(st.floats(0, 1), min_size=2).map(sorted), st.floats(0.01, 100), st.floats(-1000, 1000))
def test_calibration_keeps_the_order_and_is_a_probability(confidences, scale, bias):
    found = [word_confidence([confidence], Calibration(scale=scale, bias=bias)) for confidence in confidences]
    assert all(0 <= confidence <= 1 for confidence in found)
    assert all(a <= b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("search", ["ctc_prefix_beam", "attention_rescoring"])
def test_confidences_are_what_the_bundle_says_they_are_worth(bundle, model, sound, search):
    calibration = Calibration(scale=1.5, bias=-0.5)
    other = copy.copy(model)
    other.manifest = dataclasses.replace(model.manifest, calibration=calibration)
    plain, scaled = (
        Recognizer(bundle, which, DecodingOptions(search=search)).transcribe(sound).segments for which in (model, other)
    )
    expected = [word_confidence([word.confidence], calibration) for segment in plain for word in segment.words]
    assert [word.confidence for segment in scaled for word in segment.words] == pytest.approx(expected)
    assert expected
    for before, after in zip(plain, scaled, strict=True):
        assert after.confidence == pytest.approx(sum(word.confidence for word in after.words) / len(after.words))
        assert (after.text, after.nbest) == (before.text, before.nbest)  # the ranking is unchanged
