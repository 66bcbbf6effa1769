import _ctypes
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from fbanks import CONFIG, CONFIGS, WENET, any_config, plain_banks, plain_fbank
from hypothesis import given
from hypothesis import strategies as st
from packed import read_arrays

from u2moe.runtime import Recognizer
from u2moe.runtime.bundle.manifest import FeatureConfig
from u2moe.runtime.errors import BundleError
from u2moe.runtime.model import features
from u2moe.runtime.model.features import FeatureStream, fbank

ALL_CONFIGS = [*CONFIGS, *WENET.values()]
GOLDEN = read_arrays(Path(__file__).parent / "golden" / "features.npy.xz")
THREADS = Path("/proc/self/task")
LAST_BIT = 2e-6
"""Distance between neighbouring float32 values up to 32. Sums in another order may round to either."""


@pytest.fixture(scope="module", params=["numpy", "native"])
def library(request):
    """Return the library that computes features; None: numpy does."""
    if request.param == "numpy":
        return None
    library = pytest.importorskip("u2moe_kernels", exc_type=ImportError).library_path()
    assert features._native(library, CONFIG) is not None, "reinstall u2moe-kernels"
    return library


def test_streams_use_the_library_of_their_model(recognizer, sound, monkeypatch):
    used = []
    monkeypatch.setattr(features, "_native", lambda library, _config: used.append(library))
    recognizer.transcribe(sound)
    assert set(used) == {pytest.importorskip("u2moe_kernels", exc_type=ImportError).library_path()}


@pytest.mark.parametrize("name", WENET)
def test_features_equal_wenets(name, library):
    """The golden values of windows, MFCC and band edges come from WeNet's front end; see golden/README.md."""
    found = fbank((GOLDEN["samples"] / 32768).astype(np.float32), WENET[name], library)
    assert found.shape == GOLDEN[name].shape
    # WeNet's band weights are float32. MFCC sums their errors and multiplies them by at most 12.
    np.testing.assert_allclose(found, GOLDEN[name], rtol=0, atol=1e-3 if WENET[name].num_ceps else 1e-4)


@given(config=st.sampled_from(CONFIGS) | any_config())
def test_all_front_ends_that_a_manifest_can_state_equal_kaldis_definition(config, library):
    noise = np.random.default_rng(0).standard_normal(config.frame_len + 2 * config.shift_len) * 0.1
    samples = noise.astype(np.float32)
    try:
        found = fbank(samples, config, library)
    except BundleError:
        assert not plain_banks(config, 1 << (config.frame_len - 1).bit_length()).any(axis=1).all()
        return
    expected = plain_fbank(samples, config)
    assert found.shape == expected.shape == (3, config.num_mel_bins)
    # Kaldi excludes points on the edge of a band, where their weight is 0.
    np.testing.assert_allclose(found, expected, rtol=0, atol=LAST_BIT)


@pytest.mark.parametrize("level", [0.0, 0.3, -0.1, 1.0])
def test_silence_and_constants_are_the_floor(level, library):
    frames = fbank(np.full(1000, level, np.float32), CONFIG, library)
    assert np.array_equal(frames, np.full((4, 80), np.log(np.finfo(np.float32).eps), np.float32))


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 20)), max_size=20), st.sampled_from(ALL_CONFIGS))
def test_any_split_gives_the_same_frames(sound, library, steps, config):
    stream, parts, start = FeatureStream(config, library), [], 0
    for num_samples, num_frames in [*steps, (len(sound), len(sound))]:
        stream.accept(sound[start : start + num_samples])
        start = min(start + num_samples, len(sound))
        parts.append(stream.take(num_frames))
        assert 0 < stream.num_needed(stream.num_ready + 1) - start <= config.frame_len
    assert np.array_equal(np.concatenate(parts), fbank(sound, config, library))


@given(first=st.integers(0, 200), num_frames=st.integers(1, 200), config=st.sampled_from(ALL_CONFIGS))
def test_a_frame_does_not_depend_on_those_beside_it(first, num_frames, config, sound, library):
    whole = fbank(sound, config, library)
    samples = sound[first * config.shift_len :][: (num_frames - 1) * config.shift_len + config.frame_len]
    alone = fbank(samples, config, library)
    assert np.array_equal(alone, whole[first : first + num_frames])


def test_a_library_of_an_earlier_version_has_no_features(sound):
    found = fbank(sound, CONFIG, Path(_ctypes.__file__))  # some library without the function
    assert np.array_equal(found, fbank(sound, CONFIG))


def test_samples_may_change_after_they_were_accepted_and_no_thread_is_started(sound):
    stream, buffer = FeatureStream(CONFIG), sound.copy()
    stream.accept(buffer)
    buffer[:] = 0
    assert np.array_equal(stream.take(1000), fbank(sound, CONFIG))
    # BLAS would start a thread per core and keep them running
    before = len(list(THREADS.iterdir()))
    fbank(np.tile(sound, 4), CONFIG)
    assert len(list(THREADS.iterdir())) <= before


@pytest.mark.parametrize("config", [
    FeatureConfig(num_mel_bins=500),
    FeatureConfig(frame_length_ms=1, frame_shift_ms=1),
    FeatureConfig(sample_rate=1000, frame_length_ms=1, frame_shift_ms=1),  # a frame of one sample
])  # fmt: skip
def test_front_ends_that_make_no_sense(config, bundle, model):
    with pytest.raises(BundleError, match="cannot be computed: a mel band contains no FFT bin"):
        FeatureStream(config)
    changed = dataclasses.replace(bundle.manifest.model, feature_size=config.num_mel_bins)
    manifest = dataclasses.replace(bundle.manifest, features=config, model=changed)
    bundle = type(bundle)(bundle.path, manifest, bundle.tokens)
    with pytest.raises(BundleError, match="cannot be computed"):
        Recognizer(bundle, model)


@pytest.mark.parametrize(("values", "message"), [
    ({"frame_shift_ms": 26.0}, r"frame_shift_ms must be at most frame_length_ms \(25.0\), got 26.0"),
    ({"num_ceps": 81}, r"num_ceps must be at most num_mel_bins \(80\), got 81"),
    ({"low_hz": 9000.0}, "which may be at most half the sample_rate 16000, got 9000.0 and 0.0"),
    ({"high_hz": -8000.0}, "low_hz must be at least 0 and below high_hz"),
])  # fmt: skip
def test_front_ends_that_are_refused_unseen(values, message):
    with pytest.raises(ValueError, match=message):
        FeatureConfig(**values)
