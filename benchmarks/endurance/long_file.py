"""Is a file of several hours recognised as well as its recordings, and as well as when cut by hand?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from u2moe.benchmarks.endurance.cuts import Cuts, cuts_of, logged
from u2moe.benchmarks.endurance.memory import Memory, resident_mb
from u2moe.benchmarks.endurance.portions import Samples
from u2moe.runtime import Recognizer, Transcript
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.text.word_errors import Recording, WordErrors, words

_PAUSES_S = (0.3, 2.0)
"""Seconds between the recordings of the long file; some end an utterance, some do not."""
_NOISE = 1e-4
"""Standard deviation of the noise in them: no microphone records digital silence."""


@dataclass(frozen=True, kw_only=True)
class LongFile:
    """A file of many recordings, recognised as a whole with full context.

    Attributes:
        audio_s: seconds of audio; `wall_s`: how long it took.
        num_recordings: recordings in it; `num_words`: words of their transcripts.
        num_recognised: words recognised in the file; `num_recognised_by_hand`: in its samples cut by hand in the middle
            of the pauses; `num_recognised_alone`: in the separate recordings, without pauses and noise at their ends.
        num_errors, num_errors_by_hand, num_errors_alone: word errors of these, recording by recording.
        cuts: how the file was cut.
        memory: memory of the process.
    """

    audio_s: float
    wall_s: float
    num_recordings: int
    num_words: int
    num_recognised: int
    num_recognised_by_hand: int
    num_recognised_alone: int
    num_errors: int
    num_errors_by_hand: int
    num_errors_alone: int
    cuts: Cuts
    memory: Memory


def run_long_file(
    recognizer: Recognizer, recordings: Sequence[Recording], hours: float, random: np.random.Generator
) -> LongFile:
    """Recognise a long file, its samples cut by hand, and the separate recordings."""
    rate = recognizer.bundle.manifest.features.sample_rate
    measured: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "long.flac"
        placed = list(_write_long(file, recordings, hours, random, rate))
        begin = time.perf_counter()
        watched, utterances = logged(recognizer)
        transcript = watched.transcribe(file, on_progress=lambda seconds: measured.append((seconds, resident_mb())))
        wall_s = time.perf_counter() - begin
        cuts = cuts_of(recognizer, utterances, round(transcript.duration * rate), file)
        ends = [end for _, end in placed]
        by_hand = [recognizer.transcribe(part).text for part in _parts(file, ends)]
    texts = _texts_until(ends, transcript)
    alone = {recording.path: recognizer.transcribe(recording.path).text for recording, _ in placed}
    each_alone = [alone[recording.path] for recording, _ in placed]
    errors = [WordErrors() for _ in range(3)]
    for (recording, _), *recognised in zip(placed, texts, by_hand, each_alone, strict=True):
        for count, text in zip(errors, recognised, strict=True):
            count.add(recording.transcript, text)
    return LongFile(
        audio_s=transcript.duration,
        wall_s=wall_s,
        num_recordings=len(placed),
        num_words=errors[0].num_words,
        num_recognised=_num_words(texts),
        num_recognised_by_hand=_num_words(by_hand),
        num_recognised_alone=_num_words(each_alone),
        num_errors=errors[0].num_errors,
        num_errors_by_hand=errors[1].num_errors,
        num_errors_alone=errors[2].num_errors,
        cuts=cuts,
        memory=Memory(
            start_mb=next(mb for seconds, mb in measured if seconds >= transcript.duration / 10),
            end_mb=measured[-1][1],
        ),
    )


def _parts(file: Path, ends: Sequence[float]) -> Iterator[Samples]:
    """Samples of a file, cut at these seconds."""
    with soundfile.SoundFile(file) as source:
        for end in ends:
            yield source.read(round(end * source.samplerate) - source.tell(), dtype="float32")


def _texts_until(ends: Sequence[float], transcript: Transcript) -> list[str]:
    """The words of a transcript, grouped by these end times: a word belongs where its middle is."""
    recognised = [word for segment in transcript.segments for word in segment.words]
    places = np.searchsorted(np.array(ends), [(word.start + word.end) / 2 for word in recognised]).clip(
        max=len(ends) - 1
    )
    texts: list[list[str]] = [[] for _ in ends]
    for word, place in zip(recognised, places.tolist(), strict=True):
        texts[place].append(word.word)
    return [" ".join(text) for text in texts]


def _num_words(texts: Sequence[str]) -> int:
    return sum(len(words(text)) for text in texts)


def _write_long(
    file: Path, recordings: Sequence[Recording], hours: float, random: np.random.Generator, rate: int
) -> Iterator[tuple[Recording, float]]:
    """Write recordings with a pause after each; yields each with the time of the middle of the pause after it."""
    time_s = 0.0
    with soundfile.SoundFile(file, "w", rate, 1, "PCM_16") as target:
        while time_s < 3600 * hours:
            recording = recordings[int(random.integers(len(recordings)))]
            clip, pause_s = read_audio(recording.path, rate), random.uniform(*_PAUSES_S)
            pause = _NOISE * random.standard_normal(int(pause_s * rate))
            target.write(np.concatenate([clip, pause]))
            time_s += (len(clip) + len(pause)) / rate
            yield recording, time_s - len(pause) / rate / 2
