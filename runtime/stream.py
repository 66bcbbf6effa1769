"""The public interface of one source: samples in, results out. The work is done in `stream_state` and `pipeline`."""

from __future__ import annotations

import numpy.typing as npt

from u2moe.runtime.audio.arrays import as_samples, checked_rate
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.decoding.utterance import Phase
from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.result import Result


class Stream:
    """Recognises one source, one utterance at a time. Created by `Recognizer.create_stream`.

    `accept_waveform` takes samples in any buffers; the split does not matter. `Recognizer.decode_streams` does the
    work; `get_result` returns the partial or final result of the current utterance. After `input_finished` and a decode
    it is final, and `reset` prepares the stream for another source.

    With `DecodingOptions.endpoint`, utterances end by its rules, exact to the frame. `take_segments` returns each
    finished one once, and the stream continues, with times from its first sample. Otherwise there is one utterance.

    One thread may feed while another decodes; a second decoding thread gets a StreamError. Memory use is constant,
    except for the encoder output needed by the second pass (dim * 4 bytes per encoder frame, until the utterance ends)
    and caches as long as the left context.

    Attributes:
        state: what the recogniser decodes. Not public: it may change with any version.
    """

    def __init__(self, state: StreamState) -> None:
        self.state = state

    @property
    def options(self) -> DecodingOptions:
        """How this stream is decoded, with all defaults filled in; `chunk_size` None means full context."""
        return DecodingOptions(**vars(self.state.options))

    def accept_waveform(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of one channel.

        Args:
            sample_rate: sample rate in Hz, constant throughout; converted to the model's.
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
        """The partial or final result of the current utterance. Cheap; processes no audio."""
        return self.state.result()

    def is_endpoint(self) -> bool:
        """Whether an utterance has ended, so that `take_segments` returns something."""
        return bool(self.state.segments)

    def take_segments(self) -> list[Result]:
        """Final results of the utterances that ended since the last call, each once, except those without words."""
        return self.state.take_segments()

    def reset(self) -> None:
        """Discard everything: the next samples start a new source at time zero. Waits for a thread that is decoding.

        Raises:
            StreamError: it is this thread that is decoding.
        """
        self.state.reset()

    @property
    def failure(self) -> BaseException | None:
        """The error by which decoding has failed, so that audio was lost and only `reset` helps; None: it has not."""
        return self.state.failure

    @property
    def is_ready(self) -> bool:
        """Whether there is work for `decode_streams`."""
        return self.state.phase in (Phase.WINDOWS, Phase.SEARCHED)

    @property
    def missing_s(self) -> float:
        """Seconds of audio that the next chunk still needs: feeding less gives `decode_streams` nothing to do.

        An underestimate before the first sound and while the resampler holds samples back; 0 if a chunk is complete.
        """
        with self.state.lock:
            return self.state.extractor.missing_s

    @property
    def duration(self) -> float:
        """Seconds of audio accepted."""
        return self.state.extractor.duration
