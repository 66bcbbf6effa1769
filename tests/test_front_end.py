"""The comparison of front ends, and of the encoder's values in two runtimes."""

import sys

import numpy as np
import pytest
import soundfile

from u2moe.benchmarks.quality import front_end
from u2moe.benchmarks.runtimes import first_difference
from u2moe.runtime.bundle.manifest import FeatureConfig
from u2moe.runtime.recognizer import DEMO_FOLDER

CONFIG = FeatureConfig()


@pytest.fixture(scope="module")
def ends():
    return front_end.front_ends({"features.onnx": DEMO_FOLDER / "features.onnx"})


def test_errors_tell_double_from_single_precision(ends, sound):
    found = front_end.errors(ends, sound[:16_000], CONFIG)
    assert list(found) == ["numpy", "features.onnx", "kaldi-native-fbank"]
    for name in ("numpy", "features.onnx"):
        assert found[name]["largest"] < 2e-6  # half of what lies between neighbours from 16 to 32, and rounding
        assert found[name]["last_bits"] < 1e-3


def test_blocks_of_a_long_recording_are_the_whole(ends, sound):
    long = np.tile(sound, 6)  # longer than two blocks
    whole = ends["numpy"](long[np.newaxis])
    for name in ("features.onnx", "kaldi-native-fbank"):
        np.testing.assert_allclose(ends[name](long[np.newaxis]), whole, rtol=0, atol=0.1)


def test_another_python_on_this_processor_gives_the_same(ends, sound):
    here = front_end.digests(ends, front_end.speech(8, CONFIG.sample_rate))
    assert set(front_end.same_elsewhere(sys.executable, {}, here).values()) == {True}
    assert front_end.digests(ends, sound) != here


def test_the_page_shows_times_and_errors(ends):
    names = ("numpy", "features.onnx", "kaldi-native-fbank")
    loads = (front_end._COLD, "1 stream", "128 streams")
    error = {"largest": 1e-6, "mean": 1e-7, "last_bits": 0.25}
    results = {
        "times": {load: dict.fromkeys(names, 0.5) for load in loads},
        "errors": dict.fromkeys(names, error),
        "elsewhere": {"aarch64": {"numpy": True, "features.onnx": True, "kaldi-native-fbank": False}},
    }
    shown = front_end.values(results)
    assert "| 128 streams | 0.50 | 0.50 | 0.50 |" in shown["table"]
    assert "| aarch64 | same | same | differs |" in shown["errors"]
    assert "25.00%" in shown["errors"]


@pytest.mark.slow
def test_the_same_runtime_differs_in_nothing(quantized, tmp_path, sound):
    soundfile.write(tmp_path / "a.wav", sound[:24_000], 16_000)
    found = first_difference.measure(quantized("int8").path, tmp_path / "a.wav", {"here": sys.executable})
    assert found == {"here": {"first": None, "rounded": None, "before": 0.0, "after": 0.0}}


def test_the_first_differences_are_found():
    names = [("a", "MatMul in `x`"), ("q", "QuantizeLinear in `x`"), ("output", "`y`")]
    base = {"a": np.zeros(3, np.float32), "q": np.zeros(3, np.uint8), "output": np.zeros(3, np.float32)}
    sums = {**base, "a": np.array([0, 1e-6, 0], np.float32), "output": np.full(3, 1e-6, np.float32)}
    steps = {**sums, "q": np.array([0, 0, 1], np.uint8), "output": np.full(3, 0.5, np.float32)}
    found = first_difference.differences(names, [base, base, base], [base, sums, steps])
    assert (found["first"]["chunk"], found["first"]["place"], found["first"]["num_different"]) == (
        1,
        "MatMul in `x`",
        1,
    )
    assert (found["rounded"]["chunk"], found["rounded"]["place"]) == (2, "QuantizeLinear in `x`")
    assert found["before"] == pytest.approx(1e-6)
    assert found["after"] == 0.5
    shown = first_difference.values({"found": {"clip": {"web": found}}})["table"]
    assert "| clip | web | chunk 2, MatMul in `x`: 1 of 3 by up to 1e-06 | chunk 3," in shown
