"""Do streams decoded together give the same results as each alone, and as each alone in random portions?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from u2moe.benchmarks.endurance.portions import Samples, portions
from u2moe.runtime import Recognizer, Result
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.text.word_errors import Recording


@dataclass(frozen=True, kw_only=True)
class ManyStreams:
    """Streams that were decoded at once.

    Attributes:
        num_streams: number of streams; `audio_s`: seconds of audio in all of them.
        num_different: streams whose segments differ from those alone; `num_split_different`: from those alone in random
            portions.
        together_s, alone_s: seconds that these took.
    """

    num_streams: int
    audio_s: float
    num_different: int
    num_split_different: int
    together_s: float
    alone_s: float


def run_many_streams(
    recognizer: Recognizer, recordings: Sequence[Recording], num_streams: int, random: np.random.Generator
) -> ManyStreams:
    """Decode many streams together, then each alone, and each alone in random portions."""
    rate = recognizer.bundle.manifest.features.sample_rate
    drawn = random.integers(len(recordings), size=(num_streams, 3)).tolist()
    sounds = [np.concatenate([read_audio(recordings[place].path, rate) for place in places]) for places in drawn]
    begin = time.perf_counter()
    together = _recognise(recognizer, sounds, None)
    middle = time.perf_counter()
    alone = [_recognise(recognizer, [sound], None)[0] for sound in sounds]
    end = time.perf_counter()
    split = [_recognise(recognizer, [sound], random)[0] for sound in sounds]
    return ManyStreams(
        num_streams=num_streams,
        audio_s=sum(map(len, sounds)) / rate,
        num_different=sum(_content(a) != _content(b) for a, b in zip(alone, together, strict=True)),
        num_split_different=sum(_content(a) != _content(b) for a, b in zip(alone, split, strict=True)),
        together_s=middle - begin,
        alone_s=end - middle,
    )


def _recognise(
    recognizer: Recognizer, sounds: Sequence[Samples], random: np.random.Generator | None
) -> list[list[Result]]:
    """Segments of each of several streams, fed in equal portions (None) or random ones."""
    rate = recognizer.bundle.manifest.features.sample_rate
    streams = [recognizer.create_stream() for _ in sounds]
    fed = [portions(sound, random, rate) for sound in sounds]
    for step in range(max(map(len, fed))):
        for stream, own in zip(streams, fed, strict=True):
            if step < len(own):
                stream.accept_waveform(rate, own[step])
        recognizer.decode_streams(streams)
    for stream in streams:
        stream.input_finished()
    recognizer.decode_streams(streams)
    return [stream.take_segments() for stream in streams]


def _content(segments: list[Result]) -> list[tuple[str, list[float]]]:
    return [(segment.text, segment.times) for segment in segments]
