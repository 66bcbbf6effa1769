"""The workload of benchmarks: an utterance, and one round of work in each mode. Imports only the runtime."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime import Bundle, Model
from u2moe.runtime.audio.files import find_audio
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle.manifest import ModelConfig
from u2moe.runtime.bundle_location import find_bundle
from u2moe.runtime.model.encoder import Encoder, Windows, required_cache_size
from u2moe.runtime.model.features import fbank

Frames = npt.NDArray[np.float32]
Run = Callable[[], Any]

CHUNK_SIZE, NUM_LEFT_CHUNKS = 16, 4
NUM_WARM_CHUNKS = NUM_LEFT_CHUNKS + 1  # Chunks before the measurement. They fill the left context.
FRAME_S = 0.04  # seconds per encoder frame in all presets
CHUNK_S = CHUNK_SIZE * FRAME_S
NUM_STREAMS = 8
UTTERANCE_S = 10.0
NUM_HYPOTHESES, NUM_TOKENS = 10, 40  # in the second pass; ten seconds of fast speech have 40 tokens
ALTERNATIVES = (36, 32, 28, 24)
"""Token positions at which hypotheses differ. Their prefixes are then as alike as those of ten seconds of speech."""
LOUDNESS, LOUDNESS_DEVIATION = 11.0, 3.0  # of log-mel energies, for which random checkpoints are normalised
NUM_CHUNKS = {"streaming": 8, "streaming-8": 3}  # measured per round, after the warm-up chunks


def clips() -> list[Path]:
    """Return the paths of the demo model's recordings. Raises BundleError if it is not installed."""
    return find_audio([find_bundle(None) / "clips"])


def speech(seconds: float, rate: int) -> npt.NDArray[np.float32]:
    """Return `seconds` of real speech [n]. The bundled clips are repeated if necessary."""
    return np.resize(np.concatenate([read_audio(file, rate) for file in clips()]), round(seconds * rate))


def utterance(bundle: Bundle) -> Frames:
    """Return features [frames, mel] of ten seconds of real speech."""
    config = bundle.manifest.features
    frames = fbank(speech(UTTERANCE_S + 1, config.sample_rate), config)
    return frames[: round(UTTERANCE_S * 1000 / config.frame_shift_ms)]


def random_frames(bundle: Bundle) -> Frames:
    """Return ten seconds of random features [frames, mel] that are as loud as speech. Frames are independent."""
    num_frames = round(UTTERANCE_S * 1000 / bundle.manifest.features.frame_shift_ms)
    size = (num_frames, bundle.manifest.model.feature_size)
    return np.random.default_rng(0).normal(LOUDNESS, LOUDNESS_DEVIATION, size).astype(np.float32)


def audio_seconds(mode: str) -> float:
    """Return the seconds of audio, summed over all streams, that are processed in one round of a mode."""
    if mode in NUM_CHUNKS:
        return NUM_CHUNKS[mode] * CHUNK_S * (NUM_STREAMS if mode == "streaming-8" else 1)
    return UTTERANCE_S


def one_round(mode: str, model: Model, frames: Frames) -> Run:
    """Return a function that runs one round of a mode on features [frames, mel], without feature extraction and search.

    Modes are "streaming" and "streaming-8", chunks of one or eight streams whose left context is full; "full", full
    context; and "second-pass", the decoders on ten hypotheses.
    """
    if mode == "full":
        return lambda: model.ctc(model.encode(frames))
    if mode == "second-pass":
        encoder_out, last = model.encode(frames), model.config.vocab_size - 1
        first = np.random.default_rng(0).integers(3, last + 1, NUM_TOKENS)
        hypotheses = np.tile(first, (NUM_HYPOTHESES, 1))  # they share prefixes, as in a beam search
        for bit, place in enumerate(ALTERNATIVES):
            differs = np.arange(NUM_HYPOTHESES) >> bit & 1 == 1
            hypotheses[differs, place] = 2 if first[place] == last else last
        return lambda: model.rescore(encoder_out, hypotheses.tolist())
    rounds = streaming_round(model.encoder, frames, NUM_STREAMS if mode == "streaming-8" else 1, NUM_CHUNKS[mode])
    if model.config.static is not None:  # the graph contains the CTC head
        return rounds
    return lambda: [model.ctc(row) for output in rounds() for row in output]


def streaming_round(encoder: Encoder, frames: Frames, num_streams: int, num_chunks: int) -> Callable[[], list[Frames]]:
    """Return a function that encodes `num_chunks` chunks of every stream, all with full left context.

    As in a stream, positions advance from call to call. Native kernels would else reuse results cached by position.
    """
    chunks = list(complete_windows(encoder.config, frames, num_streams))
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


def complete_windows(
    config: ModelConfig, frames: Frames, num_streams: int = 1, chunk_size: int = CHUNK_SIZE
) -> Iterator[Frames]:
    """Yield the features of all streams, chunk by chunk [streams, time, mel], from different seconds of `frames`."""
    cutters = [Windows(config, chunk_size) for _ in range(num_streams)]
    for stream, cutter in enumerate(cutters):
        cutter.accept(np.roll(frames, -100 * stream, axis=0))
    while all(cutter.ready() for cutter in cutters):
        yield np.stack([window for cutter in cutters if (window := cutter.take()) is not None])
