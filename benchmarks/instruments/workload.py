"""An utterance, and one round of work in each mode. Imports only the runtime."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle.manifest import ModelConfig
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.model.encoder import Encoder, Windows, required_cache_size
from u2moe.runtime.model.features import fbank
from u2moe.runtime.model.model import Model

Frames = npt.NDArray[np.float32]
Run = Callable[[], Any]

CHUNK_SIZE, NUM_LEFT_CHUNKS = 16, 4
NUM_WARM_CHUNKS = NUM_LEFT_CHUNKS + 1
"""Chunks that fill the left context before measuring starts."""
FRAME_S = 0.04
"""Of an encoder frame of all presets."""
CHUNK_S = CHUNK_SIZE * FRAME_S
NUM_STREAMS = 8
UTTERANCE_S = 10.0
NUM_HYPOTHESES, NUM_TOKENS = 10, 40
"""For the second pass; ten seconds of fast speech have 40 tokens."""
ALTERNATIVES = (36, 32, 28, 24)
"""Tokens in which hypotheses differ: they share half of their prefixes, as the first ten do that the demo finds for ten
seconds, from left to right a quarter stays, from right to left three quarters."""
LOUDNESS, LOUDNESS_DEVIATION = 11.0, 3.0
"""Of log-mel energies, as the random checkpoints normalise them."""
NUM_CHUNKS = {"streaming": 8, "streaming-8": 3}
"""Chunks of one round, after the warm ones."""


def clips() -> list[Path]:
    """Return the recordings of the demo model."""
    return find_audio([DEMO_FOLDER / "clips"])


def speech(seconds: float, rate: int) -> npt.NDArray[np.float32]:
    """`seconds` of real speech: the bundled clips, repeated as needed."""
    return np.resize(np.concatenate([read_audio(file, rate) for file in clips()]), round(seconds * rate))


def utterance(bundle: Bundle) -> Frames:
    """Features [frames, mel] of ten seconds of real speech."""
    config = bundle.manifest.features
    frames = fbank(speech(UTTERANCE_S + 1, config.sample_rate), config)
    return frames[: round(UTTERANCE_S * 1000 / config.frame_shift_ms)]


def random_frames(bundle: Bundle) -> Frames:
    """Features [frames, mel] of ten seconds, independent from frame to frame, as loud as speech."""
    num_frames = round(UTTERANCE_S * 1000 / bundle.manifest.features.frame_shift_ms)
    size = (num_frames, bundle.manifest.model.feature_size)
    return np.random.default_rng(0).normal(LOUDNESS, LOUDNESS_DEVIATION, size).astype(np.float32)


def audio_seconds(mode: str) -> float:
    """Seconds of audio in one round of a mode, for all streams together."""
    if mode in NUM_CHUNKS:
        return NUM_CHUNKS[mode] * CHUNK_S * (NUM_STREAMS if mode == "streaming-8" else 1)
    return UTTERANCE_S


def one_round(mode: str, model: Model, frames: Frames) -> Run:
    """Return a function that runs one round of a mode, without search and features.

    Args:
        mode: "streaming" or "streaming-8", chunks of one stream or of eight in steady state; "full", full context;
            "second-pass", the decoders over ten hypotheses.
        model: sessions of a bundle.
        frames: features of an utterance [frames, mel].
    """
    if mode == "full":
        return lambda: model.ctc(model.encode(frames))
    if mode == "second-pass":
        encoder_out = model.encode(frames)
        hypotheses = nbest(model.config.vocab_size)
        return lambda: model.rescore(encoder_out, hypotheses)
    rounds = streaming_round(model.encoder, frames, NUM_STREAMS if mode == "streaming-8" else 1, NUM_CHUNKS[mode])
    return lambda: [model.ctc(row) for output in rounds() for row in output]


def nbest(vocab_size: int) -> list[list[int]]:
    """Hypotheses that share what those of a beam share."""
    first, last = np.random.default_rng(0).integers(3, vocab_size, NUM_TOKENS), vocab_size - 1
    hypotheses = np.tile(first, (NUM_HYPOTHESES, 1))
    for bit, place in enumerate(ALTERNATIVES):
        differs = np.arange(NUM_HYPOTHESES) >> bit & 1 == 1
        hypotheses[differs, place] = 2 if first[place] == last else last
    found: list[list[int]] = hypotheses.tolist()
    return found


def streaming_round(encoder: Encoder, frames: Frames, num_streams: int, num_chunks: int) -> Callable[[], list[Frames]]:
    """Return a function that encodes `num_chunks` chunks of every stream, starting with a full left context.

    Positions go on from call to call, as those of a stream do: native kernels keep what they have computed of them.
    """
    chunks = list(windows(encoder.config, frames, num_streams))
    caches = encoder.start(num_streams)
    required = required_cache_size(CHUNK_SIZE, NUM_LEFT_CHUNKS)
    for chunk in chunks[:NUM_WARM_CHUNKS]:
        _, caches = encoder.step(chunk, caches, required_cache_size=required)
    following = chunks[NUM_WARM_CHUNKS:][:num_chunks]
    rounds = itertools.count()

    def run() -> list[Frames]:
        state, outputs = replace(caches, offset=caches.offset + next(rounds) * CHUNK_SIZE * num_chunks), []
        for chunk in following:
            output, state = encoder.step(chunk, state, required_cache_size=required)
            outputs.append(np.asarray(output))
        return outputs

    return run


def windows(config: ModelConfig, frames: Frames, num_streams: int = 1) -> Iterator[Frames]:
    """Features of chunks [streams, frames, mel]; all streams get the same features, each starting at another second."""
    cutters = [Windows(config, CHUNK_SIZE) for _ in range(num_streams)]
    for stream, cutter in enumerate(cutters):
        cutter.accept(np.roll(frames, -100 * stream, axis=0))
    while all(cutter.ready() for cutter in cutters):
        yield np.stack([window for cutter in cutters if (window := cutter.take()) is not None])
