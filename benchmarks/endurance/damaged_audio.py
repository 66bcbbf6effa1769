"""Clips in many formats with some of their bytes changed, recognised as files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.benchmarks.endurance.damage import damaged, one_of
from u2moe.runtime import Recognizer

FORMATS = (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"),
           ("AIFF", "PCM_24"), ("MP3", "MPEG_LAYER_III"), ("CAF", "PCM_16"), ("W64", "PCM_16"),
           ("OGG", "OPUS"), ("AU", "PCM_16"), ("WAV", "IMA_ADPCM"))  # fmt: skip
OTHER_BYTES = 0.02
"""Share of files that are random bytes."""


def use_damaged_audio(
    recognizer: Recognizer, clips: list[npt.NDArray[np.float32]], folder: Path
) -> Callable[[np.random.Generator], str]:
    """A function that recognises a damaged file, and returns whether it was "accepted", or "partly" read."""
    rate, file = recognizer.bundle.manifest.features.sample_rate, folder / "audio"
    originals = [encoded(clip, rate, *file_format) for clip in clips for file_format in FORMATS]

    def use(random: np.random.Generator) -> str:
        file.write_bytes(damaged_audio(originals, random))
        return "accepted" if recognizer.transcribe(file).complete else "partly"

    return use


def encoded(clip: npt.NDArray[np.float32], rate: int, file_format: str, subtype: str) -> bytes:
    """A clip as a file; libsndfile draws the serial numbers of Ogg streams itself."""
    with tempfile.TemporaryFile() as file:
        soundfile.write(file, clip, rate, subtype=subtype, format=file_format)
        file.seek(0)
        return file.read()


def damaged_audio(originals: Sequence[bytes], random: np.random.Generator) -> bytes:
    """One of the files with some bytes changed, or random bytes."""
    if random.random() < OTHER_BYTES:
        return random.bytes(int(random.integers(0, 5000)))
    return damaged(one_of(originals, random), random)
