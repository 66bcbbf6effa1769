import dataclasses
import resource

import numpy as np
import pytest
from fbanks import CONFIG, CONFIGS, plain_fbank
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime.errors import BundleError, StreamError
from u2moe.runtime.features import Fbank
from u2moe.runtime.manifest import FeatureConfig


@pytest.mark.parametrize("config", CONFIGS)
def test_features_equal_kaldis_definition(config, sound):
    fbank = Fbank(config)
    frames = np.concatenate((fbank.accept(sound), fbank.finish()))
    expected = plain_fbank(sound, config)
    assert frames.shape == expected.shape
    # kaldi-native-fbank computes in single precision: 1e-4 of a log energy is 0.01 % of the energy.
    np.testing.assert_allclose(frames, expected, atol=2e-3)
    assert np.abs(frames - expected).mean() < 1e-4


def test_silence_is_the_floor():
    frames = Fbank(CONFIG).accept(np.zeros(1000, np.float32))
    np.testing.assert_allclose(frames, np.log(np.finfo(np.float32).eps), rtol=1e-6)


@given(splits=st.lists(st.integers(0, 3000), max_size=30))
def test_any_split_gives_the_same_frames(sound, splits):
    whole = Fbank(CONFIG).accept(sound)
    fbank = Fbank(CONFIG)
    parts, start = [], 0
    for length in splits:
        parts.append(fbank.accept(sound[start : start + length]))
        start += length
    parts += [fbank.accept(sound[start:]), fbank.finish()]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(("num_samples", "num_frames"), [(0, 0), (1, 0), (399, 0), (400, 1), (559, 1), (560, 2)])
def test_a_frame_needs_a_whole_window(num_samples, num_frames):
    fbank = Fbank(CONFIG)
    frames = np.concatenate((fbank.accept(np.ones(num_samples, np.float32)), fbank.finish()))
    assert frames.shape == (num_frames, 80)


@pytest.mark.parametrize(
    "config", [FeatureConfig(num_mel_bins=500), FeatureConfig(frame_length_ms=1, frame_shift_ms=1)]
)
def test_front_ends_that_make_no_sense(config):
    with pytest.raises(BundleError, match="cannot be computed"):
        Fbank(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sample_rate": 10}, "sample_rate must be between"),
        ({"num_mel_bins": 2}, "num_mel_bins must be between 3 and 1000, got 2"),
        ({"frame_shift_ms": 0.0}, "frame_shift_ms and frame_length_ms must be between"),
        ({"frame_shift_ms": 26.0}, "no longer than the frame, got 26.0 and 25.0"),
        ({"frame_length_ms": 1e9}, "frame_length_ms must be between"),
    ],
)
def test_front_ends_that_are_refused_unseen(values, message):
    with pytest.raises(ValueError, match=message):
        FeatureConfig(**values)


def test_use_after_finish():
    fbank = Fbank(dataclasses.replace(CONFIG))
    fbank.finish()
    with pytest.raises(StreamError):
        fbank.accept(np.zeros(1, np.float32))
    with pytest.raises(StreamError):
        fbank.finish()


def test_memory_is_flat():
    fbank = Fbank(CONFIG)
    minute = np.random.default_rng(0).standard_normal(960_000).astype(np.float32) * 0.1
    fbank.accept(minute)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        fbank.accept(minute)
    # Ten minutes of features would take 19 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000
