"""Public interface for recognising one source. `stream_state` and `pipeline` do the work."""

from __future__ import annotations

import numpy.typing as npt

from u2moe.runtime.audio.arrays import as_samples, checked_rate
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.decoding.utterance import Phase
from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.result import Result


class Stream:
    """A stream that recognises one source, one utterance at a time. `Recognizer.create_stream` creates it.

    `accept_waveform` takes samples; their split into buffers does not matter. `Recognizer.decode_streams` does the
    work. `get_result` returns the partial or final result of the current utterance. After `input_finished` and a call
    of `decode_streams`, the result is final. `reset` prepares the stream for another source.

    The rules of `DecodingOptions.endpoint` end utterances, exact to the frame. `take_segments` returns each finished
    utterance once. The stream continues, with times from its first sample. Without rules, the stream is one utterance.

    One thread may feed while another decodes; a second decoding thread gets a StreamError. Memory use is constant with
    two exceptions. Until an utterance ends, the second pass needs dim * 4 bytes per encoder frame. Caches grow with the
    left context.

    Attributes:
        state: state of the stream. Not public: it may change with any version.
    """

    def __init__(self, state: StreamState) -> None:
        self.state = state

    @property
    def options(self) -> DecodingOptions:
        """Decoding options with all defaults filled in. A `chunk_size` of None means full context."""
        return DecodingOptions(**vars(self.state.options))

    def accept_waveform(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of one channel.

        Args:
            sample_rate: sample rate in Hz, the same in every call. Samples are converted to the model's rate.
            samples: float32 in [-1, 1] or int16 [n], any length.

        Raises:
            StreamError: the input is finished, or decoding has failed.
            AudioError: invalid samples or rate; nothing was appended.
        """
        rate, accepted = checked_rate(sample_rate), as_samples(samples)
        with self.state.input() as extractor:
            extractor.accept(rate, accepted)

    def input_finished(self) -> None:
        """Finish the input. The next decode flushes the last, shorter chunk.

        Raises:
            StreamError: the input is already finished, or decoding has failed.
        """
        with self.state.input() as extractor:
            extractor.finish()

    def get_result(self) -> Result:
        """Return the partial or final result of the current utterance. Cheap; does not decode."""
        return self.state.result()

    def is_endpoint(self) -> bool:
        """Return whether an utterance has ended and `take_segments` has a result."""
        return bool(self.state.segments)

    def take_segments(self) -> list[Result]:
        """Return the final results of utterances that ended since the last call. Omits utterances without words."""
        return self.state.take_segments()

    def reset(self) -> None:
        """Discard everything. The next samples start a new source at time zero. Waits for a thread that is decoding.

        Raises:
            StreamError: this thread is decoding the stream.
        """
        self.state.reset()

    @property
    def failure(self) -> BaseException | None:
        """Error that made decoding fail; None: no failure. Audio was lost, and the stream must be reset."""
        return self.state.failure

    @property
    def is_ready(self) -> bool:
        """Whether there is work for `decode_streams`."""
        return self.state.phase in (Phase.WINDOWS, Phase.SEARCHED)

    @property
    def missing_s(self) -> float:
        """Seconds of audio that the next chunk still needs before `decode_streams` has work; 0 if it is complete.

        The value is too low before the first sound, and while the resampler holds back samples.
        """
        with self.state.lock:
            return self.state.extractor.missing_s

    @property
    def duration(self) -> float:
        """Seconds of audio accepted."""
        return self.state.extractor.duration
