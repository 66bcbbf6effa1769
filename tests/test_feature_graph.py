import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import soundfile
from fbanks import CONFIG, CONFIGS, WENET, any_config, plain_fbank
from hypothesis import given

from u2moe.export.comparison import compare_features
from u2moe.runtime import Bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.errors import BundleError, ParityError
from u2moe.runtime.graph.features import features_graph
from u2moe.runtime.graph.file import save_graph
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.settings import SessionSettings

CLIPS = [soundfile.read(file, dtype="float32")[0] for file in sorted(DEMO_FOLDER.glob("clips/*.flac"))]
LAST_BIT = 2e-6
"""Distance of neighbours in single precision, for features up to 32. Sums in another order may round to either."""


@pytest.fixture(scope="module")
def front_end(bundle):
    """A function from a configuration to a function from samples [batch, n] to features [batch, frames, mel]."""

    def build(config=CONFIG):
        model = dataclasses.replace(bundle.manifest.model, feature_size=config.size)
        manifest = dataclasses.replace(bundle.manifest, model=model, features=config)
        content = ir.to_proto(features_graph(manifest)).SerializeToString()
        session = onnxruntime.InferenceSession(content, SessionSettings().session_options())
        return lambda samples: session.run(None, {"samples": np.asarray(samples, np.float32)})[0]

    return build


def check_equal(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=LAST_BIT)
    # MFCC of silence are sums of zero except for rounding
    assert (np.abs(found - expected) > 1e-12).mean() < 1e-3


@pytest.mark.parametrize("config", [*CONFIGS, *WENET.values()])
def test_speech_equals_that_of_python(front_end, config):
    features = front_end(config)
    for samples in CLIPS:
        check_equal(features([samples])[0], fbank(samples, config))


@given(config=any_config())
def test_all_front_ends_that_a_manifest_can_state(front_end, config):
    noise = np.random.default_rng(0).standard_normal(config.frame_len + 2 * config.shift_len) * 0.1
    samples = noise.astype(np.float32)
    try:
        expected = fbank(samples, config)
    except BundleError:
        with pytest.raises(BundleError, match="cannot be computed"):
            front_end(config)
        return
    np.testing.assert_allclose(front_end(config)([samples])[0], expected, rtol=0, atol=LAST_BIT)


SECONDS, NOISE = np.arange(16_000) / 16_000, np.random.default_rng(0).standard_normal(16_000)
SIGNALS = {
    "silence": np.zeros(16_000),
    "a constant": np.full(16_000, 0.3),
    "the largest constant": np.full(16_000, 1.0),
    "noise on a constant": 0.5 + 1e-3 * NOISE,
    "the last bit of 16": np.round(NOISE) / 32768,
    "clipped": np.clip(3 * np.sin(2 * np.pi * 200 * SECONDS), -1, 1),
    "a click": np.eye(1, 16_000, 200)[0],
}


@pytest.mark.parametrize("name", SIGNALS)
def test_extreme_signals(front_end, name):
    samples = SIGNALS[name].astype(np.float32)
    found = front_end()([samples])[0]
    for expected in (fbank(samples, CONFIG), plain_fbank(samples, CONFIG)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=LAST_BIT)


def test_a_batch_equals_each_of_it(front_end, sound):
    rows = np.stack([sound[:8000], sound[8000:16_000]])
    for row, found in zip(rows, front_end()(rows), strict=True):
        check_equal(found, fbank(row, CONFIG))


def test_every_bundle_has_it_and_a_changed_one_is_refused(bundle, quantized, tmp_path, monkeypatch):
    for each in (bundle, quantized("int8"), Bundle.open(DEMO_FOLDER)):
        assert "features.onnx" in each.manifest.files
        found = compare_features(each.path / "features.onnx", each.manifest)
        assert found.num_values > 10_000
        assert found.difference <= LAST_BIT
    monkeypatch.setattr("u2moe.runtime.graph.features.PREEMPHASIS", 0.9)
    save_graph(features_graph(bundle.manifest), tmp_path / "features.onnx")
    with pytest.raises(ParityError, match="features differ from the runtime's by"):
        compare_features(tmp_path / "features.onnx", bundle.manifest)
