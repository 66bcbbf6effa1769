"""Can one stream run for hours? It is fed recordings one after another, in random portions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from u2moe.benchmarks.endurance.cuts import Cuts, cuts_of, logged
from u2moe.benchmarks.endurance.memory import Memory, resident_mb
from u2moe.benchmarks.endurance.portions import portions
from u2moe.runtime import Recognizer
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.text.word_errors import Recording


@dataclass(frozen=True, kw_only=True)
class LongStream:
    """A stream that was fed hours of recordings.

    Attributes:
        audio_s: seconds of audio; `wall_s`: how long it took.
        num_segments: number of segments; `num_disordered`: those that were repeated or out of order.
        cuts: how the audio was cut.
        memory: memory of the process.
    """

    audio_s: float
    wall_s: float
    num_segments: int
    num_disordered: int
    cuts: Cuts
    memory: Memory


def run_long_stream(
    recognizer: Recognizer, recordings: Sequence[Recording], hours: float, random: np.random.Generator
) -> LongStream:
    """Feed one stream recordings in random portions."""
    rate = recognizer.bundle.manifest.features.sample_rate
    recognizer, utterances = logged(recognizer)
    stream = recognizer.create_stream()
    num_segments = num_disordered = 0
    start_mb = last_end = 0.0

    def take() -> None:
        nonlocal num_segments, num_disordered, last_end
        for segment in stream.take_segments():  # not kept: an hour of them takes 8 MB
            num_disordered += segment.segment != num_segments or segment.start < last_end
            num_segments, last_end = num_segments + 1, segment.end

    begin = time.perf_counter()
    while stream.duration < 3600 * hours:
        clip = read_audio(recordings[int(random.integers(len(recordings)))].path, rate)
        for portion in portions(clip, random, rate):
            stream.accept_waveform(rate, portion)
            recognizer.decode_streams([stream])
            take()
        if not start_mb and stream.duration > 360 * hours:
            start_mb = resident_mb()
    stream.input_finished()
    recognizer.decode_streams([stream])
    take()
    return LongStream(
        audio_s=stream.duration,
        wall_s=time.perf_counter() - begin,
        num_segments=num_segments,
        num_disordered=num_disordered,
        cuts=cuts_of(recognizer, utterances, round(stream.duration * rate)),
        memory=Memory(start_mb=start_mb, end_mb=resident_mb()),
    )
