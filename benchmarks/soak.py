"""Does the recogniser last? Hours of audio at full speed, many streams at once, and random portions; memory and texts.

Run as `python -m u2moe.benchmarks.soak BUNDLE AUDIO... [--hours 1] [--streams 64]`; prints JSON, exits 1 on a failure.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer
from u2moe.runtime.audio import find_audio, read_audio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from u2moe.runtime import Result

_STEP_S = 1.0
"""Seconds fed to each stream between two decodes, on average."""


@dataclass(frozen=True, kw_only=True)
class SoakReport:
    """What was tried and found.

    Attributes:
        audio_s: seconds of audio of the long run; `wall_s`: how long it took.
        num_segments: segments that the long run gave; `num_disordered`: how many of them came twice, late or early.
        start_mb: resident memory after a tenth of the long run; `end_mb`: at its end. They should be about equal.
        num_streams: streams decoded at once; `num_different`: how many gave other segments than alone.
        together_s, alone_s: seconds that these took.
        num_splits: clips fed again in other portions; `num_split_different`: how many then gave other segments.
    """

    audio_s: float
    wall_s: float
    num_segments: int
    num_disordered: int
    start_mb: float
    end_mb: float
    num_streams: int
    num_different: int
    together_s: float
    alone_s: float
    num_splits: int
    num_split_different: int

    @property
    def failed(self) -> bool:
        """Whether texts differed, segments were out of order, or memory grew by more than a tenth."""
        grew = self.end_mb > 1.1 * self.start_mb
        return grew or self.num_disordered + self.num_different + self.num_split_different > 0


def soak(
    recognizer: Recognizer, clips: Sequence[npt.NDArray[np.float32]], *, hours: float = 1.0, num_streams: int = 64
) -> SoakReport:
    """Run everything on `clips`, samples at the model's rate; one after the other, again and again, for `hours`."""
    random = np.random.default_rng(0)
    begin = time.perf_counter()
    segments, start_mb, audio_s = _long_run(recognizer, clips, hours, random)
    wall_s = time.perf_counter() - begin
    end_mb = resident_mb()
    sounds = [clips[i % len(clips)] for i in range(num_streams)]
    sounds = [np.roll(sound, i * 1600) for i, sound in enumerate(sounds)]
    begin = time.perf_counter()
    alone = [_hear(recognizer, [sound], None)[0] for sound in sounds]
    alone_s = time.perf_counter() - begin
    begin = time.perf_counter()
    together = _hear(recognizer, sounds, None)
    together_s = time.perf_counter() - begin
    split = [_hear(recognizer, [sound], random)[0] for sound in sounds]
    ends = [segment.end for segment in segments]
    return SoakReport(
        audio_s=audio_s,
        wall_s=wall_s,
        num_segments=len(segments),
        num_disordered=sum(
            segment.segment != number or segment.start < (ends[number - 1] if number else 0)
            for number, segment in enumerate(segments)
        ),
        start_mb=start_mb,
        end_mb=end_mb,
        num_streams=num_streams,
        num_different=sum(_said(a) != _said(b) for a, b in zip(alone, together, strict=True)),
        together_s=together_s,
        alone_s=alone_s,
        num_splits=len(split),
        num_split_different=sum(_said(a) != _said(b) for a, b in zip(alone, split, strict=True)),
    )


def resident_mb() -> float:
    """Resident memory of this process in megabytes; of Linux only, elsewhere 0."""
    gc.collect()
    status = Path("/proc/self/statm")
    return int(status.read_text(encoding="ascii").split()[1]) * 4096 / 1e6 if status.exists() else 0.0


def _long_run(
    recognizer: Recognizer, clips: Sequence[npt.NDArray[np.float32]], hours: float, random: np.random.Generator
) -> tuple[list[Result], float, float]:
    """Segments of one stream, memory after a tenth of it, and its length."""
    rate = recognizer.bundle.manifest.features.sample_rate
    stream, segments, start_mb = recognizer.create_stream(), [], 0.0
    while stream.duration < 3600 * hours:
        clip = clips[int(random.integers(len(clips)))]
        for portion in _portions(clip, random, rate):
            stream.accept_waveform(rate, portion)
            recognizer.decode_streams([stream])
            segments += stream.take_segments()
        if not start_mb and stream.duration > 360 * hours:
            start_mb = resident_mb()
    stream.input_finished()
    recognizer.decode_streams([stream])
    return [*segments, *stream.take_segments()], start_mb, stream.duration


def _hear(
    recognizer: Recognizer, sounds: Sequence[npt.NDArray[np.float32]], random: np.random.Generator | None
) -> list[list[Result]]:
    """Segments of each of several streams, fed in equal portions (None) or random ones."""
    rate = recognizer.bundle.manifest.features.sample_rate
    streams = [recognizer.create_stream() for _ in sounds]
    portions = [_portions(sound, random, rate) for sound in sounds]
    for step in range(max(map(len, portions))):
        for stream, own in zip(streams, portions, strict=True):
            if step < len(own):
                stream.accept_waveform(rate, own[step])
        recognizer.decode_streams(streams)
    for stream in streams:
        stream.input_finished()
    recognizer.decode_streams(streams)
    return [stream.take_segments() for stream in streams]


def _portions(
    samples: npt.NDArray[np.float32], random: np.random.Generator | None, rate: int
) -> list[npt.NDArray[np.float32]]:
    step = int(_STEP_S * rate)
    if random is None:
        return np.split(samples, range(step, len(samples), step))
    return np.split(samples, np.sort(random.integers(0, len(samples) + 1, len(samples) // step)))


def _said(segments: list[Result]) -> list[tuple[str, list[float]]]:
    return [(segment.text, segment.times) for segment in segments]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description="Long audio, many streams, random portions: memory and texts.")
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("audio", type=Path, nargs="+", help="audio files, and folders of them")
    parser.add_argument("--hours", type=float, default=1.0, help="of audio in the long run (default: 1)")
    parser.add_argument("--streams", type=int, default=64, help="decoded at once (default: 64)")
    args = parser.parse_args(argv)
    options = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())
    recognizer = Recognizer.from_pretrained(args.bundle, options=options)
    rate = recognizer.bundle.manifest.features.sample_rate
    clips = [read_audio(file, rate) for file in find_audio(args.audio)]
    report = soak(recognizer, clips, hours=args.hours, num_streams=args.streams)
    print(json.dumps({**asdict(report), "failed": report.failed}))
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
