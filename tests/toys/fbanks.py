"""Kaldi's filter banks in double precision, and front ends to try them on."""

import numpy as np
from hypothesis import strategies as st

from u2moe.runtime.bundle.manifest import FeatureConfig

CONFIG = FeatureConfig()


def mel(frequency):
    return 1127.0 * np.log(1.0 + frequency / 700.0)


def plain_banks(config, padded_len):
    """Return triangles on the mel scale [mel, points]."""
    points = np.linspace(mel(20.0), mel(config.sample_rate / 2), config.num_mel_bins + 2)
    bins = mel(np.arange(padded_len // 2) * config.sample_rate / padded_len)
    rising = (bins - points[:-2, None]) / (points[1:-1] - points[:-2])[:, None]
    return np.maximum(0, np.minimum(rising, (points[2:, None] - bins) / (points[2:] - points[1:-1])[:, None]))


def plain_fbank(samples, config):
    """Return Kaldi's filter banks as defined by torchaudio.compliance.kaldi.fbank, in double precision."""
    samples = samples.astype(np.float64) * 32768
    window_len = int(config.sample_rate * config.frame_length_ms / 1000)
    shift = int(config.sample_rate * config.frame_shift_ms / 1000)
    num_frames = 1 + (len(samples) - window_len) // shift if len(samples) >= window_len else 0
    padded_len = 1 << (window_len - 1).bit_length()
    povey = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_len) / (window_len - 1))) ** 0.85
    banks = plain_banks(config, padded_len)
    frames = np.zeros((num_frames, config.num_mel_bins))
    for i in range(num_frames):
        frame = samples[i * shift : i * shift + window_len]
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate((frame[:1], frame[:-1]))
        power = np.abs(np.fft.rfft(frame * povey, padded_len)) ** 2
        frames[i] = np.log(np.maximum(banks @ power[: padded_len // 2], np.finfo(np.float32).eps))
    return frames


CONFIGS = [
    CONFIG,
    FeatureConfig(num_mel_bins=40),
    FeatureConfig(sample_rate=8000, num_mel_bins=23),
    FeatureConfig(sample_rate=11_025, num_mel_bins=40),  # a frame of 275.625 samples, a shift of 110.25
    FeatureConfig(frame_length_ms=32.0, frame_shift_ms=16.0),
]


@st.composite
def any_config(draw):
    """Draw a front end that a manifest can contain, with frames that are fast to compute."""
    length = draw(st.integers(4, 240)) / 4  # kaldi-native-fbank stores it in single precision
    return FeatureConfig(
        sample_rate=draw(st.integers(1000, 48_000)), num_mel_bins=draw(st.integers(3, 128)), frame_length_ms=length,
        frame_shift_ms=draw(st.integers(4, round(4 * length))) / 4,
    )  # fmt: skip


WENET = {
    "fbank": FeatureConfig(sample_rate=8000, num_mel_bins=23),
    "fbank_hamming": FeatureConfig(sample_rate=8000, num_mel_bins=40, window="hamming"),
    "fbank_hanning": FeatureConfig(sample_rate=8000, num_mel_bins=23, window="hanning"),
    "fbank_blackman": FeatureConfig(sample_rate=8000, num_mel_bins=23, window="blackman", frame_length_ms=32.0,
        frame_shift_ms=16.0),
    "fbank_rectangular": FeatureConfig(sample_rate=8000, num_mel_bins=23, window="rectangular"),
    "mfcc": FeatureConfig(sample_rate=8000, num_mel_bins=23, num_ceps=23),
    "mfcc_openasr2021": FeatureConfig(sample_rate=8000, num_mel_bins=40, num_ceps=40, high_hz=-400.0),
    "mfcc_edges": FeatureConfig(sample_rate=8000, num_mel_bins=20, num_ceps=13, low_hz=0.0, high_hz=3500.0),
}  # fmt: skip
"""The front ends of golden/features.npy.xz."""
