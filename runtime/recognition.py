"""Recognition loops: for a recording, which is read to its end, and a live source, which delivers audio over time."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.arrays import convert
from u2moe.runtime.audio.raw import File, RawAudio
from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.decoding.vad import VoiceActivityDetector
from u2moe.runtime.errors import AudioError
from u2moe.runtime.result import Result, Transcript, moved
from u2moe.runtime.stream import Stream
from u2moe.runtime.text.vocabulary import join_texts

Buffers = Iterator[npt.NDArray[np.float32]]  # Samples of one channel, as one buffer after another
Decode = Callable[[list[Stream]], None]  # Function that decodes streams, such as `Recognizer.decode_streams`


def samples_of(
    audio: File | RawAudio | npt.ArrayLike | Buffers,
    model_rate: int,
    sample_rate: float | None = None,
    channel: int | None = None,
    track: int | None = None,
) -> Buffers:
    """Return audio in buffers at the model's sample rate. For the arguments, see `Recognizer.transcribe`."""
    if isinstance(audio, str | os.PathLike | bytes | bytearray | memoryview | RawAudio) or hasattr(audio, "read"):
        if sample_rate is not None:
            raise ValueError("sample_rate is only for arrays: a file has its own")
        return read_blocks(cast("File | RawAudio", audio), model_rate, channel=channel, track=track)
    if channel is not None or track is not None:
        raise ValueError("channel and track are only for files: an array has one channel")
    if isinstance(audio, Iterator):
        if sample_rate is not None:
            raise ValueError("sample_rate is only for arrays: buffers must have the model's sample rate")
        return audio
    return convert(cast("npt.ArrayLike", audio), model_rate if sample_rate is None else sample_rate, model_rate)


class RecordingReader:
    """Iterator over the buffers of a recording. It stops at the end or at damaged data, and can be used only once.

    The first buffer is read immediately, so that an unreadable recording fails (AudioError) before any other work.
    `buffers` contain samples at `sample_rate`, float32 [n] each. `on_progress` is called with the seconds read so far,
    each time the next buffer is requested.
    """

    def __init__(
        self, buffers: Buffers, sample_rate: int, on_progress: Callable[[float], object] | None = None
    ) -> None:
        self.num_samples = 0  # read so far
        self.has_ended = False
        self.error: AudioError | None = None  # why reading stopped early; None if the recording is undamaged
        self.sample_rate = sample_rate
        self._buffers = filter(len, buffers)
        self._on_progress = on_progress
        self._first = next(self._buffers, None)

    @property
    def duration(self) -> float:
        """Seconds of audio read so far."""
        return self.num_samples / self.sample_rate

    def __iter__(self) -> Buffers:
        buffer = self._first
        while buffer is not None:
            self.num_samples += len(buffer)
            yield buffer
            if self._on_progress is not None:
                self._on_progress(self.duration)
            try:
                buffer = next(self._buffers, None)
            except AudioError as error:
                self.error, buffer = error, None
        self.has_ended = True


def recognize(
    decode: Decode, stream: Stream, reader: RecordingReader, vad: VoiceActivityDetector | None = None
) -> Iterator[Result]:
    """Return an iterator over the final results of a recording. Each is available as soon as its segment ends.

    `decode` may postpone work. The caller must then decode the stream after the iteration, and take the remaining
    results. `stream` must be new or reset. Each stretch of speech that `vad` finds is recognised as a separate source;
    None: the whole recording is one source.
    """
    if vad is None:
        return _whole(decode, stream, reader)
    if not hasattr(vad, "speech"):
        raise ValueError(f"vad must be a VoiceActivityDetector or None, got {vad!r}")
    if reader.sample_rate != vad.sample_rate:
        needed = f"the voice activity detector needs audio at {vad.sample_rate} Hz"
        raise ValueError(f"{needed}, but the model needs {reader.sample_rate} Hz")
    return _speech(decode, stream, reader, vad)


def _whole(decode: Decode, stream: Stream, reader: RecordingReader) -> Iterator[Result]:
    for buffer in reader:
        stream.accept_waveform(reader.sample_rate, buffer)
        decode([stream])
        yield from stream.take_segments()
    stream.input_finished()
    decode([stream])
    yield from stream.take_segments()


def _speech(decode: Decode, stream: Stream, reader: RecordingReader, vad: VoiceActivityDetector) -> Iterator[Result]:
    num_segments = begin = 0
    for speech in vad.speech(reader):
        if speech.begins:
            stream.reset()
            begin = speech.start
        stream.accept_waveform(vad.sample_rate, speech.samples)
        if speech.ends:
            stream.input_finished()
        decode([stream])
        for segment in stream.take_segments():
            yield moved(segment, begin / vad.sample_rate, num_segments)
            num_segments += 1


class LiveRecognition:
    """Recogniser of one live source. `accept` and `finish` yield new results.

    New results are the final result of each segment, and a partial result if its text or its number of committed words
    has changed. An empty partial result withdraws the previous one. If decoding fails, finished segments are yielded
    before the error is raised. `stream` must have endpoint rules.
    """

    def __init__(self, decode: Decode, stream: Stream) -> None:
        self.stream = stream
        self.shown = ""  # text of the last partial result; empty after a segment
        self._num_committed = 0
        self._decode_streams = decode

    def accept(self, sample_rate: float, samples: npt.ArrayLike) -> Iterator[Result]:
        """Recognise more samples; see `Stream.accept_waveform`."""
        self.stream.accept_waveform(sample_rate, samples)
        return self._decode()

    def finish(self) -> Iterator[Result]:
        """Finish the source, and recognise the rest of it."""
        self.stream.input_finished()
        return self._decode()

    def results(self, num_alternatives: int = 0) -> list[Result]:
        """Return new results of a stream that the caller decodes. A partial one has up to `num_alternatives`."""
        found = self.stream.take_segments()
        partial = self.stream.state.result(num_alternatives)
        before = ("", 0) if found else (self.shown, self._num_committed)
        now = ("", 0) if partial.is_final else (partial.text, partial.num_committed)
        self.shown, self._num_committed = now
        return found if now == before else [*found, replace(partial, is_final=False)]

    def _decode(self) -> Iterator[Result]:
        try:
            self._decode_streams([self.stream])
        except Exception:
            yield from self.stream.take_segments()
            raise
        yield from self.results()


def until_damage(reader: RecordingReader, results: Iterator[Result]) -> Iterator[Result]:
    """Yield the results of a recording. If an error ended reading early, raise it afterwards."""
    yield from results
    if reader.error is not None:
        raise reader.error


def transcript_of(segments: Sequence[Result], duration: float, error: Exception | None = None) -> Transcript:
    """Join `segments` (final results, in order) into a transcript, which is incomplete if there is an `error`."""
    text, reason = join_texts([segment.text for segment in segments]), None if error is None else str(error)
    return Transcript(text=text, duration=duration, segments=list(segments), complete=error is None, error=reason)
