"""From the blocks of a recording to the results of its segments, as they are found. Stores none of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from u2moe.runtime.errors import AudioError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt

    from u2moe.runtime.recognizer import Recognizer
    from u2moe.runtime.result import Result
    from u2moe.runtime.stream import Stream
    from u2moe.runtime.vad import VoiceActivityDetector


class Blocks:
    """Blocks of samples up to the end of a recording, or to where it breaks off. Can be iterated over only once.

    The first block is read immediately, so that an unreadable recording is refused before any work is done.

    Attributes:
        num_samples: samples so far.
        error: why no more can be read; None until then, and at the end of an undamaged recording.

    Args:
        blocks: samples at the model's rate, float32 [n] each.
        sample_rate: the model's, in Hz.
        on_progress: called with the seconds so far when the next block is requested.

    Raises:
        AudioError: no samples can be read.
    """

    def __init__(
        self,
        blocks: Iterator[npt.NDArray[np.float32]],
        sample_rate: int,
        on_progress: Callable[[float], object] | None = None,
    ) -> None:
        self.num_samples = 0
        self.error: AudioError | None = None
        self._blocks = filter(len, blocks)
        self._sample_rate = sample_rate
        self._on_progress = on_progress
        self._first = next(self._blocks, None)

    @property
    def duration(self) -> float:
        """Seconds so far."""
        return self.num_samples / self._sample_rate

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        block = self._first
        while block is not None:
            self.num_samples += len(block)
            yield block
            if self._on_progress is not None:
                self._on_progress(self.duration)
            try:
                block = next(self._blocks, None)
            except AudioError as error:
                self.error = error
                return


def recognize(
    recognizer: Recognizer, stream: Stream, blocks: Blocks, vad: VoiceActivityDetector | None
) -> Iterator[Result]:
    """Final results of the segments of a recording, each as soon as it is found.

    Args:
        recognizer: decodes the stream.
        stream: receives the samples; new or reset.
        blocks: blocks of the recording.
        vad: detects speech, each stretch of which is recognised as a separate source; None: the whole recording is one
            source.
    """
    if vad is None:
        return _whole(recognizer, stream, blocks)
    if not hasattr(vad, "speech"):
        raise ValueError(f"vad must be a VoiceActivityDetector or None, got {vad!r}")
    rate = recognizer.bundle.manifest.features.sample_rate
    if rate != vad.sample_rate:
        raise ValueError(f"the voice activity detector needs audio at {vad.sample_rate} Hz, the model's is {rate} Hz")
    return _speech(recognizer, stream, blocks, vad)


def _whole(recognizer: Recognizer, stream: Stream, blocks: Blocks) -> Iterator[Result]:
    rate = recognizer.bundle.manifest.features.sample_rate
    for block in blocks:
        stream.accept_waveform(rate, block)
        recognizer.decode_streams([stream])
        yield from stream.take_segments()
    stream.input_finished()
    recognizer.decode_streams([stream])
    yield from stream.take_segments()


def _speech(recognizer: Recognizer, stream: Stream, blocks: Blocks, vad: VoiceActivityDetector) -> Iterator[Result]:
    num_segments = begin = 0
    for speech in vad.speech(blocks):
        if speech.begins:
            stream.reset()
            begin = speech.start
        stream.accept_waveform(vad.sample_rate, speech.samples)
        if speech.ends:
            stream.input_finished()
        recognizer.decode_streams([stream])
        for segment in stream.take_segments():
            yield segment.moved(begin / vad.sample_rate, num_segments)
            num_segments += 1
