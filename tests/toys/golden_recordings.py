"""Recordings of speech, and WeNet's results for them with networks of each kind, from `golden/recordings.py`."""

import functools
import json
import lzma
from pathlib import Path

import numpy as np
import soundfile

from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.model.features import fbank

FILE = Path(__file__).parents[1] / "golden" / "recordings.json.xz"
CLIPS = DEMO_FOLDER / "clips"
NUM_RECORDINGS = 20
BEAM_SIZE = 10
WEIGHTS = {"ctc_weight": 0.5, "reverse_weight": 0.3}
CHUNK_SIZE, NUM_LEFT_CHUNKS = 6, 2
BLANK_BIAS = 3.0
"""Added to the score of the blank: as in trained networks, most frames are blank."""


def known():
    """Return the results by name of a configuration, with numbers of `recordings`. "whole" and possibly "chunks"
    contain tokens and times of all hypotheses, and the decoder's choice (null: there is no decoder)."""
    return json.loads(lzma.decompress(FILE.read_bytes())) if FILE.exists() else {}


@functools.cache
def all_speech():
    return np.concatenate([soundfile.read(path, dtype="float32")[0] for path in sorted(CLIPS.glob("*.flac"))])


def features(number, front_end):
    """Return features [frames, size] of a recording: 0.7 to 1.6 s from the demo's clips, some faster and louder."""
    speech, length = all_speech(), 11200 + 720 * (number % 21)
    start = number * 33331 % (len(speech) - 2 * length)
    cut = speech[start : start + 2 * length : 1 + number % 2][:length]
    return fbank(cut * np.float32(0.4 + 0.1 * (number % 6)), front_end)
