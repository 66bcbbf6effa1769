"""The public face of one source: samples in, results out. What happens in between is in `source` and `pipeline`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from u2moe.runtime.audio import as_samples
from u2moe.runtime.utterance import State

if TYPE_CHECKING:
    import numpy.typing as npt

    from u2moe.runtime.decoding import DecodingOptions
    from u2moe.runtime.result import Result
    from u2moe.runtime.source import Source


class Stream:
    """Recognises one source, one utterance after the other. Made by `Recognizer.create_stream`.

    Samples go in by `accept_waveform` in any portions: how they are split changes nothing. `Recognizer.decode_streams`
    does the work; `get_result` is what is known of the utterance at hand. After `input_finished` and a decode it is
    final, and `reset` makes the stream ready for another source.

    With `DecodingOptions.endpoint` utterances end by its rules, to the frame. `take_segments` hands over each finished
    one once, and the stream goes on, its times counted from its first sample. Without, there is one utterance.

    One thread may feed while another decodes; a second that decodes gets a StreamError. Memory is flat but for what the
    second pass needs, encoder output (dim * 4 bytes per encoder frame) until the utterance ends, and the caches, as
    long as the left context.

    Attributes:
        source: what the recogniser decodes. Not part of the public interface: it may change with any version.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def options(self) -> DecodingOptions:
        """How this stream is decoded: `search` is chosen, and `chunk_size` None means full context."""
        return self.source.options

    def accept_waveform(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of one channel.

        Args:
            sample_rate: in Hz, the same throughout; any rate is converted to the model's.
            samples: float32 in [-1, 1] or int16 [n], any length.

        Raises:
            StreamError: the input was finished, or decoding has failed.
            AudioError: samples or rate that cannot be used; nothing was appended.
        """
        self.source.accept(sample_rate, as_samples(samples))

    def input_finished(self) -> None:
        """Say that no samples follow. The next decode flushes the last, shorter chunk.

        Raises:
            StreamError: it was said before, or decoding has failed.
        """
        self.source.finish()

    def get_result(self) -> Result:
        """What is recognised of the utterance at hand so far, or finally. Cheap; does no work on audio."""
        return self.source.result()

    def is_endpoint(self) -> bool:
        """Whether an utterance has ended: `take_segments` returns something."""
        return self.source.has_segments

    def take_segments(self) -> list[Result]:
        """Final results of the utterances that ended since the last call, each once; none of those without words."""
        return self.source.take_segments()

    def reset(self) -> None:
        """Forget everything: the next samples are those of a new source, at time zero."""
        self.source.reset()

    @property
    def is_ready(self) -> bool:
        """Whether there is work for `decode_streams`."""
        return self.source.state in (State.WINDOWS, State.SEARCHED)

    @property
    def duration(self) -> float:
        """Seconds of audio accepted."""
        return self.source.duration
