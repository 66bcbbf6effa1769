"""Recordings of noise, for tests of quantization."""

import numpy as np
import soundfile


def write_noise(folder, number, length):
    """Write recordings of noise that rises and falls at another rate in each, and return the folder."""
    for index in range(number):
        noise = np.random.default_rng(index).standard_normal(length)
        samples = noise * np.abs(np.sin(np.arange(length) / (1000 + 900 * index))) * 0.2
        soundfile.write(folder / f"{index}.wav", samples.astype(np.float32), 16_000)
    return folder
