"""Computes features.npy.xz with WeNet's front end (torchaudio's Kaldi features): python features.py WENET."""

import sys
from pathlib import Path

import numpy as np
import torch
import wenet_model

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent / "toys"))

from packed import write_arrays  # noqa: E402 - in the folder above

FRONT_ENDS = {
    "fbank": {},
    "fbank_hamming": {"num_mel_bins": 40, "window_type": "hamming"},
    "fbank_hanning": {"window_type": "hanning"},
    "fbank_blackman": {"window_type": "blackman", "frame_length": 32, "frame_shift": 16},
    "fbank_rectangular": {"window_type": "rectangular"},
    "mfcc": {"num_ceps": 23},  # its default requests more coefficients than its default number of bands, which fails
    "mfcc_openasr2021": {"num_mel_bins": 40, "num_ceps": 40, "low_freq": 20, "high_freq": -400},
    "mfcc_edges": {"num_mel_bins": 20, "num_ceps": 13, "low_freq": 0, "high_freq": 3500},
}
"""Arguments of WeNet's compute_fbank and compute_mfcc."""


def samples():
    """Return seeded noise that swells [n]: a third of a second at 8 kHz, as 16-bit integers."""
    random = np.random.default_rng(11)
    swell = np.abs(np.sin(np.arange(2700) / 400)) * 3000
    return (random.uniform(-1, 1, 2700) * swell).astype(np.int16)


if __name__ == "__main__":
    wenet_model.import_from(sys.argv[1])
    from wenet.dataset import processor

    wave = samples()
    results = {"samples": wave}
    for name, options in FRONT_ENDS.items():
        compute = processor.compute_mfcc if name.startswith("mfcc") else processor.compute_fbank
        audio = torch.from_numpy(wave / np.float32(32768)).unsqueeze(0).double()
        results[name] = compute({"key": "", "sample_rate": 8000, "wav": audio}, **options)["feat"].numpy()
    write_arrays(FOLDER / "features.npy.xz", results)
