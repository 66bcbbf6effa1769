"""Public interface for recognising one source. `stream_state` and `pipeline` implement it."""

import numpy.typing as npt

from u2moe.runtime.audio.arrays import as_samples, checked_rate
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.result import Result


class Stream:
    """A stream that recognises one source, one utterance at a time. `Recognizer.create_stream` creates streams.

    `accept_waveform` takes samples. It does not matter how they are split into buffers. `Recognizer.decode_streams`
    does the work. `get_result` returns the partial or final result of the current utterance. After `input_finished` and
    a call to `decode_streams`, the result is final. `reset` prepares the stream for another source.

    The rules of `DecodingOptions.endpoint` end utterances at any encoder frame, even within a chunk. `take_segments`
    returns each finished utterance once. The stream then continues; times still count from its first sample. Without
    rules, the whole stream is one utterance.

    One thread may feed the stream while another decodes it. A second decoding thread gets a StreamError. Memory use is
    constant, with two exceptions. Until an utterance ends, the second pass needs dim * 4 bytes per encoder frame.
    Caches grow with the left context.

    Attributes:
        state: state of the stream. It is not public, and may change with any version.
    """

    def __init__(self, state: StreamState) -> None:
        self.state = state

    @property
    def options(self) -> DecodingOptions:
        """Decoding options in which every default is filled in. If `chunk_size` is None, full context is used."""
        return DecodingOptions(**vars(self.state.options))

    def accept_waveform(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of one channel.

        Args:
            sample_rate: sample rate in Hz; must be the same in every call. Samples are converted to the model's rate.
            samples: float32 in [-1, 1] or int16 [n], of any length.

        Raises:
            StreamError: the input is finished, or decoding has failed.
            AudioError: the samples or the rate are invalid. Nothing was appended.
        """
        rate, accepted = checked_rate(sample_rate), as_samples(samples)
        with self.state.input() as extractor:
            extractor.accept(rate, accepted)

    def input_finished(self) -> None:
        """Finish the input. The next call to `decode_streams` decodes the last, shorter chunk.

        Raises:
            StreamError: the input is already finished, or decoding has failed.
        """
        with self.state.input() as extractor:
            extractor.finish()

    def get_result(self) -> Result:
        """Return the partial or final result of the current utterance. The call is cheap and does not decode."""
        return self.state.result()

    def is_endpoint(self) -> bool:
        """Return whether `take_segments` would return any results."""
        return bool(self.state.segments)

    def take_segments(self) -> list[Result]:
        """Return the final results of utterances that ended since the last call, except those without words."""
        return self.state.take_segments()

    def reset(self) -> None:
        """Discard all audio and results. Waits while another thread is decoding. Times start at zero again.

        Raises:
            StreamError: this thread is decoding the stream.
        """
        self.state.reset()

    @property
    def failure(self) -> BaseException | None:
        """Error that made decoding fail; None: no failure. After a failure, audio is lost: reset the stream."""
        return self.state.failure

    @property
    def is_ready(self) -> bool:
        """Whether `decode_streams` has work for this stream."""
        with self.state.lock:
            return self.state.extractor.has_window or self.state.is_searched

    @property
    def missing_s(self) -> float:
        """Seconds of audio that must still arrive before the next chunk is complete; 0 if `decode_streams` has work.

        Before the first sound, and while the resampler holds back samples, the value is too low.
        """
        with self.state.lock:
            return self.state.extractor.missing_s

    @property
    def duration(self) -> float:
        """Seconds of audio accepted so far."""
        return self.state.extractor.duration
