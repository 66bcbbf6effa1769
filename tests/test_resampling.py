import sys

import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from u2moe.runtime.audio.arrays import Resampler, SincResampler

RATES = [(8000, 16_000), (44_100, 16_000), (48_000, 16_000), (16_000, 8000), (44_056, 16_000), (22_050, 16_000)]


def resampled(samples, rates, sizes=()):
    resampler, parts, start = SincResampler(*rates), [], 0
    for size in [*sizes, len(samples)]:
        parts.append(resampler.resample_chunk(samples[start : start + size]))
        start += size
    return np.concatenate([*parts, resampler.resample_chunk(np.zeros(0, np.float32), last=True)])


@pytest.mark.slow
@settings(max_examples=20)
@given(rates=st.sampled_from(RATES), sizes=st.lists(st.integers(0, 3000), max_size=8))
def test_any_split_gives_the_same_samples(sound, rates, sizes):
    samples = sound[:5000]
    assert np.array_equal(resampled(samples, rates, sizes), resampled(samples, rates))


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("num_samples", [0, 1, 7, 4410])
def test_it_gives_as_many_samples_as_soxr(sound, rates, num_samples):
    samples = sound[:num_samples]
    stream = soxr.ResampleStream(*rates, 1, dtype="float32", quality="HQ")
    assert len(resampled(samples, rates)) == len(stream.resample_chunk(samples, last=True))


@pytest.mark.parametrize("rates", RATES)
def test_tones_within_the_band_stay(rates):
    source, target = rates
    frequency = 0.4 * min(rates)
    tone = 0.5 * np.sin(2 * np.pi * frequency * np.arange(source // 3) / source)
    found = resampled(tone.astype(np.float32), rates)
    expected = 0.5 * np.sin(2 * np.pi * frequency * np.arange(len(found)) / target)
    assert np.abs(found - expected)[500:-500].max() < 1e-4


@pytest.mark.parametrize("rates", [(48_000, 16_000), (44_100, 16_000), (16_000, 8000)])
def test_what_the_new_rate_cannot_hold_is_removed(rates):
    source, target = rates
    tone = np.sin(2 * np.pi * 0.55 * target * np.arange(source) / source).astype(np.float32)
    assert 20 * np.log10(np.abs(resampled(tone, rates)[500:-500]).max()) < -80


def test_it_takes_the_place_of_soxr(sound, monkeypatch):
    theirs = Resampler(48_000, 16_000)
    expected = np.concatenate([theirs.accept(sound), theirs.finish()])
    monkeypatch.setitem(sys.modules, "soxr", None)
    ours = Resampler(48_000, 16_000)
    found = np.concatenate([ours.accept(sound), ours.finish()])
    assert len(found) == len(expected)
    middle = slice(500, -500)
    assert np.abs(found - expected)[middle].mean() < 0.1 * np.abs(expected)[middle].mean()
    assert np.array_equal(Resampler(16_000, 16_000).accept(sound), sound)
