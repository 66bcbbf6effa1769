"""Does the recogniser last? Hours of audio at full speed, many streams at once, random portions; memory and texts.

    python -m u2moe.benchmarks.endurance.soak BUNDLE TEST.tsv... [--hours 1] [--streams 64] [--output soak.json]

One stream hears recordings one after the other for hours. Several hear a few each, together, alone, and in random
portions. A file of as many hours is recognised as a whole. Every frame must be in one of its pieces, and each piece say
what the graphs alone hear in its samples (`cuts`); and recordings must be recognised about as well in the file, with
pauses between them, as where it is cut amid these by hand. Exits with 1 on a failure.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.benchmarks.endurance.cuts import Cuts, cuts_of, logged
from u2moe.benchmarks.results.provenance import publish, sentence
from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer
from u2moe.runtime.audio import read_audio
from u2moe.runtime.corpus.word_errors import Recording, WordErrors, read_manifest, words

if TYPE_CHECKING:
    from u2moe.runtime import Result, Transcript

Samples = npt.NDArray[np.float32]

STREAMED = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())
_STEP_S = 1.0
"""Seconds fed to each stream between two decodes, on average."""
_PAUSES_S = (0.3, 2.0)
"""Seconds between the recordings of the long file: some end an utterance, some do not."""
_NOISE = 1e-4
"""Deviation of the noise in them: digital silence is not what a microphone hears."""
_MOST_GROWTH = 1.1
"""Memory at the end, over what it was after a tenth of the time, from which on it counts as growing."""
_MOST_WORSE = 0.02
"""Words, of all, that the long file may have more or fewer, or more wrong, than cut by hand."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident megabytes of the process after a tenth of a run, and at its end. They should be about equal."""

    start_mb: float
    end_mb: float

    @property
    def grew(self) -> bool:
        """Whether there is more at the end."""
        return self.end_mb > _MOST_GROWTH * self.start_mb


@dataclass(frozen=True, kw_only=True)
class LongStream:
    """A stream that heard recordings for hours.

    Attributes:
        audio_s: seconds of audio; `wall_s`: how long it took.
        num_segments: segments that it gave; `num_disordered`: how many of them came twice, late or early.
        cuts: what was cut.
        memory: of the process.
    """

    audio_s: float
    wall_s: float
    num_segments: int
    num_disordered: int
    cuts: Cuts
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class ManyStreams:
    """Streams that were decoded at once.

    Attributes:
        num_streams: how many; `audio_s`: seconds of audio of all of them.
        num_different: how many gave other segments than alone; `num_split_different`: than alone in random portions.
        together_s, alone_s: seconds that these took.
    """

    num_streams: int
    audio_s: float
    num_different: int
    num_split_different: int
    together_s: float
    alone_s: float


@dataclass(frozen=True, kw_only=True)
class LongFile:
    """A file of recordings one after the other, recognised as a whole with full context.

    Attributes:
        audio_s: seconds of audio; `wall_s`: how long it took.
        num_recordings: recordings in it; `num_words`: words of their transcripts.
        num_heard, num_heard_by_hand, num_heard_alone: words recognised in the file, in its samples cut amid the pauses
            by hand, and in its recordings alone, which have no pauses and no noise at their ends.
        num_errors, num_errors_by_hand, num_errors_alone: word errors of these, recording by recording.
        cuts: what was cut.
        memory: of the process.
    """

    audio_s: float
    wall_s: float
    num_recordings: int
    num_words: int
    num_heard: int
    num_heard_by_hand: int
    num_heard_alone: int
    num_errors: int
    num_errors_by_hand: int
    num_errors_alone: int
    cuts: Cuts
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class SoakReport:
    """What was tried and found."""

    stream: LongStream
    streams: ManyStreams
    file: LongFile

    @property
    def failures(self) -> list[str]:
        """What is wrong, in words."""
        file, streams = self.file, self.streams
        cuts = (self.stream.cuts, file.cuts)
        more = abs(file.num_heard - file.num_heard_by_hand) / max(file.num_heard_by_hand, 1)
        worse = (file.num_errors - file.num_errors_by_hand) / max(file.num_words, 1)
        found = {
            "memory of the long stream grew": self.stream.memory.grew,
            "memory of the long file grew": file.memory.grew,
            "segments out of order": self.stream.num_disordered > 0,
            "streams together gave another text": streams.num_different > 0,
            "random portions gave another text": streams.num_split_different > 0,
            "frames were lost or heard twice at cuts": any(cut.num_lost or cut.num_doubled for cut in cuts),
            "pieces of the long file say what is not in their samples": bool(file.cuts.num_different),
            "the long file is recognised worse than cut by hand": max(more, worse) > _MOST_WORSE,
        }
        return [name for name, is_so in found.items() if is_so]


def soak(bundle: Path, recordings: Sequence[Recording], *, hours: float = 1.0, num_streams: int = 64) -> SoakReport:
    """Try everything on recordings, drawn at random again and again."""
    streaming, whole = Recognizer.from_pretrained(bundle, options=STREAMED), Recognizer.from_pretrained(bundle)
    random = np.random.default_rng(0)
    return SoakReport(
        stream=hear_long(streaming, recordings, hours, random),
        streams=hear_many(streaming, recordings, num_streams, random),
        file=read_long(whole, recordings, hours, random),
    )


def resident_mb() -> float:
    """Resident memory of this process in megabytes; of Linux only, elsewhere 0."""
    gc.collect()
    status = Path("/proc/self/statm")
    return int(status.read_text(encoding="ascii").split()[1]) * 4096 / 1e6 if status.exists() else 0.0


def hear_long(
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
        for portion in _portions(clip, random, rate):
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


def hear_many(
    recognizer: Recognizer, recordings: Sequence[Recording], num_streams: int, random: np.random.Generator
) -> ManyStreams:
    """Decode many streams together, then each alone, and each alone in random portions."""
    rate = recognizer.bundle.manifest.features.sample_rate
    drawn = random.integers(len(recordings), size=(num_streams, 3)).tolist()
    sounds = [np.concatenate([read_audio(recordings[place].path, rate) for place in places]) for places in drawn]
    begin = time.perf_counter()
    together = _hear(recognizer, sounds, None)
    middle = time.perf_counter()
    alone = [_hear(recognizer, [sound], None)[0] for sound in sounds]
    end = time.perf_counter()
    split = [_hear(recognizer, [sound], random)[0] for sound in sounds]
    return ManyStreams(
        num_streams=num_streams,
        audio_s=sum(map(len, sounds)) / rate,
        num_different=sum(_said(a) != _said(b) for a, b in zip(alone, together, strict=True)),
        num_split_different=sum(_said(a) != _said(b) for a, b in zip(alone, split, strict=True)),
        together_s=middle - begin,
        alone_s=end - middle,
    )


def read_long(
    recognizer: Recognizer, recordings: Sequence[Recording], hours: float, random: np.random.Generator
) -> LongFile:
    """Recognise a long file, its samples cut by hand, and its recordings alone."""
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
    for (recording, _), *heard in zip(placed, texts, by_hand, each_alone, strict=True):
        for count, text in zip(errors, heard, strict=True):
            count.add(recording.transcript, text)
    return LongFile(
        audio_s=transcript.duration,
        wall_s=wall_s,
        num_recordings=len(placed),
        num_words=errors[0].num_words,
        num_heard=_num_words(texts),
        num_heard_by_hand=_num_words(by_hand),
        num_heard_alone=_num_words(each_alone),
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
    """The words of a transcript, those whose middle comes before each of these seconds, and not before the last one."""
    heard = [word for segment in transcript.segments for word in segment.words]
    places = np.searchsorted(np.array(ends), [(word.start + word.end) / 2 for word in heard]).clip(max=len(ends) - 1)
    texts: list[list[str]] = [[] for _ in ends]
    for word, place in zip(heard, places.tolist(), strict=True):
        texts[place].append(word.word)
    return [" ".join(text) for text in texts]


def _num_words(texts: Sequence[str]) -> int:
    return sum(len(words(text)) for text in texts)


def _write_long(
    file: Path, recordings: Sequence[Recording], hours: float, random: np.random.Generator, rate: int
) -> Iterator[tuple[Recording, float]]:
    """Write recordings with pauses after each; gives each, and the seconds in the middle of the pause after it."""
    time_s = 0.0
    with soundfile.SoundFile(file, "w", rate, 1, "PCM_16") as target:
        while time_s < 3600 * hours:
            recording = recordings[int(random.integers(len(recordings)))]
            clip, pause_s = read_audio(recording.path, rate), random.uniform(*_PAUSES_S)
            pause = _NOISE * random.standard_normal(int(pause_s * rate))
            target.write(np.concatenate([clip, pause]))
            time_s += (len(clip) + len(pause)) / rate
            yield recording, time_s - len(pause) / rate / 2


def _hear(recognizer: Recognizer, sounds: Sequence[Samples], random: np.random.Generator | None) -> list[list[Result]]:
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


def _portions(samples: Samples, random: np.random.Generator | None, rate: int) -> list[Samples]:
    step = int(_STEP_S * rate)
    if random is None:
        return np.split(samples, range(step, len(samples), step))
    return np.split(samples, np.sort(random.integers(0, len(samples) + 1, len(samples) // step)))


def _said(segments: list[Result]) -> list[tuple[str, list[float]]]:
    return [(segment.text, segment.times) for segment in segments]


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    stream, streams, file = (results[name] for name in ("stream", "streams", "file"))

    def flat(memory: Mapping[str, float]) -> str:
        return f"{memory['start_mb']:.0f} MB after a tenth, {memory['end_mb']:.0f} MB at the end"

    def cut(cuts: Mapping[str, int]) -> str:
        return f"{cuts['num_pieces']} pieces, frames lost {cuts['num_lost']}, doubled {cuts['num_doubled']}"

    def at(part: Mapping[str, float]) -> str:
        return f"{part['audio_s'] / 3600:.2f} h of audio in {part['wall_s']:.0f} s"

    num = streams["num_streams"]
    found = {
        "one stream, chunk 16, left 4": [
            at(stream),
            f"{stream['num_segments']} segments, {stream['num_disordered']} out of order",
            cut(stream["cuts"]),
            flat(stream["memory"]),
        ],
        f"{num} streams at once": [
            f"{streams['audio_s'] / 60:.0f} min in {streams['together_s']:.1f} s",
            f"{streams['alone_s']:.1f} s one by one",
            f"other texts or times than alone: {streams['num_different']} of {num}",
            f"alone in random portions: {streams['num_split_different']} of {num}",
        ],
        "one file, full context": [
            at(file),
            f"{file['num_recordings']} recordings with {file['num_words']} words",
            f"{file['num_heard']} words, {file['num_heard_by_hand']} cut by hand, {file['num_heard_alone']} alone",
            f"{file['num_errors']} errors, {file['num_errors_by_hand']} cut by hand, {file['num_errors_alone']} alone",
            cut(file["cuts"]) + f", pieces that say something else than their samples: {file['cuts']['num_different']}",
            flat(file["memory"]),
        ],
    }
    rows = [f"| {run} | {'; '.join(findings)} |" for run, findings in found.items()]
    head = (
        "Demo model, one thread, at full speed. Recordings are heard in the long file, in the same samples cut "
        "by hand amid the pauses between them, and alone, without pauses and their noise. "
    ) + sentence(results)
    return "\n".join([head, "", "| run | what was found |", "| --- | --- |", *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        prog="python -m u2moe.benchmarks.endurance.soak", description=__doc__.splitlines()[0]
    )
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("manifests", type=Path, nargs="+", help="lists of recordings: path<TAB>transcript")
    parser.add_argument("--hours", type=float, default=1.0, help="of audio in the long runs (default: 1)")
    parser.add_argument("--streams", type=int, default=64, help="decoded at once (default: 64)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    recordings = [recording for manifest in args.manifests for recording in read_manifest(manifest)]
    report = soak(args.bundle, recordings, hours=args.hours, num_streams=args.streams)
    publish(args.bundle, {**asdict(report), "failures": report.failures}, table, args.output)
    for failure in report.failures:
        print(f"FAILED: {failure}")
    return int(bool(report.failures))


if __name__ == "__main__":
    sys.exit(main())
