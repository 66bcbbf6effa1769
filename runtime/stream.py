"""State of one utterance, from samples to the first pass' hypotheses. It runs no graph: `recognizer` does, for many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio import Resampler, as_samples
from u2moe.runtime.ctc import GreedySearch, PrefixBeamSearch
from u2moe.runtime.encoder import Windows
from u2moe.runtime.errors import AudioError, StreamError
from u2moe.runtime.features import Fbank
from u2moe.runtime.result import Result

if TYPE_CHECKING:
    from u2moe.runtime.ctc import Hypothesis
    from u2moe.runtime.decoding import DecodingOptions
    from u2moe.runtime.encoder import Caches
    from u2moe.runtime.model import Model
    from u2moe.runtime.text import Vocabulary


class Stream:
    """One utterance as it is heard. Made by `Recognizer.create_stream`; use it from one thread at a time.

    Samples go in by `accept_waveform` in any portions: how they are split changes nothing. `Recognizer.decode_streams`
    does the work; `get_result` tells what is known. After `input_finished` and a decode the result is final, and
    `reset` makes the stream ready for the next utterance.

    Memory is flat but for what the second pass needs: encoder output (dim * 4 bytes per encoder frame) until the
    utterance ends, and caches as long as the left context.
    """

    def __init__(self, model: Model, vocabulary: Vocabulary, options: DecodingOptions) -> None:
        """Start with `options` whose `search` is chosen; their `chunk_size` None means full context here."""
        self.options = options
        self._model = model
        self._vocabulary = vocabulary
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next samples are those of a new utterance, at time zero."""
        self.caches: Caches = self._model.encoder.start()
        self._windows = Windows(self._model.config, self.options.chunk_size)
        self._features = Fbank(self._model.manifest.features)
        self._resampler: Resampler | None = None
        self._input_finished = False
        self._num_samples = 0
        self._num_frames = 0
        self._outputs: list[npt.NDArray[np.float32]] = []
        self._first_pass: GreedySearch | PrefixBeamSearch
        blank = self._model.config.blank
        if self.options.search in ("ctc_greedy", "attention"):
            self._first_pass = GreedySearch(blank)
        else:
            self._first_pass = PrefixBeamSearch(self.options.beam_size, blank)
        self._result = Result(text="", is_final=False)
        self._result_is_old = False

    def accept_waveform(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of one channel.

        Args:
            sample_rate: in Hz, the same throughout an utterance; any rate is converted to the model's.
            samples: float32 in [-1, 1] or int16 [n], any length.

        Raises:
            StreamError: the input was finished.
            AudioError: samples or rate that cannot be used; nothing was appended.
        """
        if self._input_finished:
            raise StreamError("the input of this stream is finished: reset it, or create another stream")
        accepted = as_samples(samples)
        if self._resampler is None:
            self._resampler = Resampler(sample_rate, self._model.manifest.features.sample_rate)
        if sample_rate != self._resampler.source_rate:
            raise AudioError(f"sample rate changed from {self._resampler.source_rate} to {sample_rate} Hz in a stream")
        self._accept(self._resampler.accept(accepted))

    def input_finished(self) -> None:
        """Say that the utterance has ended. The next decode flushes its last, shorter chunk.

        Raises:
            StreamError: it was said before.
        """
        if self._input_finished:
            raise StreamError("the input of this stream is finished already")
        if self._resampler is not None:
            self._accept(self._resampler.finish())
        self._windows.accept(self._features.finish())
        self._windows.finish()
        self._input_finished = True

    def get_result(self) -> Result:
        """What is recognised so far, or finally. Cheap; does no work on audio."""
        if self._result_is_old:
            best = self._first_pass.hypotheses(1)
            text = self._vocabulary.text(best[0].tokens) if best else ""
            frame_s = self.frame_s
            times = [round(time * frame_s, 3) for time in best[0].times] if best else []
            self._result = Result(
                text=text,
                is_final=False,
                tokens=best[0].tokens if best else [],
                times=times,
                score=best[0].score if best else 0.0,
            )
            self._result_is_old = False
        return self._result

    @property
    def is_ready(self) -> bool:
        """Whether there is work for `decode_streams`."""
        return self._windows.ready or (self._input_finished and not self._result.is_final)

    @property
    def duration(self) -> float:
        """Seconds of audio accepted."""
        return self._num_samples / self._model.manifest.features.sample_rate

    @property
    def frame_s(self) -> float:
        """Seconds from one encoder frame to the next."""
        return self._model.config.subsampling_rate * self._model.manifest.features.frame_shift_ms / 1000

    # What follows is for the recogniser.

    def take_window(self) -> npt.NDArray[np.float32] | None:
        """Features [frames, mel] of the next chunk, or None."""
        return self._windows.take()

    def advance(self, output: npt.NDArray[np.float32], log_probs: npt.NDArray[np.float32], caches: Caches) -> None:
        """Take over what a chunk gave: encoder output [time, dim], log-probabilities [time, vocab], and caches."""
        self.caches = caches
        self._num_frames += len(output)
        if self.options.search in ("attention_rescoring", "attention"):
            self._outputs.append(output)
        self._first_pass.advance(log_probs)
        self._result_is_old = True

    @property
    def awaits_final(self) -> bool:
        """Whether every chunk is decoded, so that only the final result is missing."""
        return self._input_finished and not self._windows.ready and not self._result.is_final

    def first_pass(self) -> list[Hypothesis]:
        """Hypotheses of the first pass, best first."""
        return self._first_pass.hypotheses()

    def encoder_out(self) -> npt.NDArray[np.float32]:
        """Encoder output of the utterance [time, dim]."""
        return np.concatenate([np.zeros((0, self._model.config.output_size), np.float32), *self._outputs])

    @property
    def num_encoder_frames(self) -> int:
        """Encoder frames so far."""
        return self._num_frames

    def conclude(self, result: Result) -> None:
        """Make `result` the final one, and let go of what led to it."""
        self._result = result
        self._result_is_old = False
        self._outputs = []
        self.caches = self._model.encoder.start()

    def _accept(self, samples: npt.NDArray[np.float32]) -> None:
        self._num_samples += len(samples)
        self._windows.accept(self._features.accept(samples))
