import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import soundfile
from fbanks import CONFIG, CONFIGS, plain_fbank
from hypothesis import given
from hypothesis import strategies as st
from manifests import edit_manifest

from u2moe.export.feature_parity import compare_features
from u2moe.quantize import quantize_bundle, recipe
from u2moe.runtime import Bundle, Recognizer
from u2moe.runtime.errors import ParityError
from u2moe.runtime.features import Fbank
from u2moe.runtime.graph.features import features_graph
from u2moe.runtime.graph.file import save_graph
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.session import SessionSettings

FLOOR = np.log(np.finfo(np.float32).eps)
WITHIN_REACH = 15.0
"""Nats (65 dB) below the loudest band of its frame; quieter bands drown in the rounding of single precision."""
CLIPS = [soundfile.read(file, dtype="float32")[0] for file in sorted(DEMO_FOLDER.glob("clips/*.flac"))]


@pytest.fixture(scope="module")
def front_end(bundle):
    """A function from a configuration to a function from samples [n] to features [frames, mel]."""

    def build(config=CONFIG):
        model = dataclasses.replace(bundle.manifest.model, feature_size=config.num_mel_bins)
        manifest = dataclasses.replace(bundle.manifest, model=model, features=config)
        content = ir.to_proto(features_graph(manifest)).SerializeToString()
        session = onnxruntime.InferenceSession(content, SessionSettings().session_options())
        return lambda samples: session.run(None, {"samples": np.asarray(samples, np.float32)[np.newaxis]})[0][0]

    return build


def kaldi(samples, config=CONFIG):
    fbank = Fbank(config)
    return np.concatenate((fbank.accept(samples), fbank.finish()))


@pytest.mark.parametrize("config", CONFIGS)
def test_speech_equals_kaldis_definition(front_end, config):
    features = front_end(config)
    for samples in CLIPS:
        found, exact, theirs = features(samples), plain_fbank(samples, config), kaldi(samples, config)
        assert found.shape == exact.shape == theirs.shape
        off = np.abs(found - exact)
        assert off[exact > exact.max(axis=1, keepdims=True) - WITHIN_REACH].max() < 1e-3
        assert off.max() < 1e-2
        is_exact = np.abs(theirs - exact) < 1e-4
        assert is_exact.mean() > 0.9
        assert np.abs(found - theirs)[is_exact].max() < 1e-2
        assert off.mean() < 1e-4


def signals():
    seconds = np.arange(16_000) / 16_000
    noise = np.random.default_rng(0).standard_normal(16_000)
    return {
        "silence": np.zeros(16_000),
        "a constant": np.full(16_000, 0.3),
        "the largest constant": np.full(16_000, 1.0),
        "noise on a constant": 0.5 + 1e-3 * noise,
        "the last bit of 16": np.round(noise) / 32768,
        "clipped": np.clip(3 * np.sin(2 * np.pi * 200 * seconds), -1, 1),
        "a click": np.eye(1, 16_000, 200)[0],
    }


@pytest.mark.parametrize("name", signals())
def test_extreme_signals(front_end, name):
    samples = signals()[name].astype(np.float32)
    np.testing.assert_allclose(front_end()(samples), plain_fbank(samples, CONFIG), rtol=0, atol=1e-3)


def test_constants_and_silence_are_the_floor_exactly(front_end):
    features = front_end()
    for level in (0.0, 0.3, -0.1, 1.0):
        np.testing.assert_allclose(features(np.full(1000, level)), FLOOR, rtol=1e-6)


@pytest.mark.parametrize("num_samples", [0, 1, 239, 240, 399, 400, 559, 560])
def test_a_frame_needs_a_whole_window(front_end, num_samples):
    assert front_end()(np.ones(num_samples)).shape == kaldi(np.ones(num_samples, np.float32)).shape


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=10))
def test_any_blocks_of_frames_are_the_frames_of_the_whole(front_end, sound, sizes):
    features = front_end()
    whole, start = features(sound), 0
    for size in sizes:
        frames = features(sound[start * 160 : (start + size - 1) * 160 + 400])
        np.testing.assert_allclose(frames, whole[start : start + len(frames)], rtol=0, atol=1e-4)
        start += size


def test_a_batch_equals_each_of_it(bundle, sound):
    content = ir.to_proto(features_graph(bundle.manifest)).SerializeToString()
    session = onnxruntime.InferenceSession(content, SessionSettings().session_options())
    rows = np.stack([sound[:8000], sound[8000:16_000]])
    for row, found in zip(rows, session.run(None, {"samples": rows})[0], strict=True):
        np.testing.assert_allclose(found, kaldi(row), rtol=0, atol=5e-3)


def test_every_bundle_has_it(bundle, quantized):
    for each in (bundle, quantized("int8"), Bundle.open(DEMO_FOLDER)):
        assert "features.onnx" in each.manifest.files
        assert compare_features(each.path / "features.onnx", each.manifest).num_values > 10_000


@pytest.mark.slow
def test_a_bundle_from_before_loads_and_gets_it_when_quantized(bundle, tmp_path, sound):
    old = tmp_path / "old"
    old.mkdir()
    for name in (*bundle.manifest.files, "bundle.json"):
        (old / name).write_bytes((bundle.path / name).read_bytes())
    (old / "features.onnx").unlink()
    edit_manifest(old, lambda content: content["files"].pop("features.onnx"))
    expected = Recognizer.from_pretrained(bundle.path).transcribe(sound)
    assert Recognizer.from_pretrained(old).transcribe(sound) == expected
    again, _ = quantize_bundle(old, tmp_path / "int8", recipe("int8"))
    assert "features.onnx" in again.manifest.files


def test_a_changed_graph_is_refused(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.graph.features._PREEMPHASIS", 0.9)
    save_graph(features_graph(bundle.manifest), tmp_path / "features.onnx")
    with pytest.raises(ParityError, match="features differ from kaldi-native-fbank by"):
        compare_features(tmp_path / "features.onnx", bundle.manifest)
