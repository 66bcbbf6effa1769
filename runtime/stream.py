"""State of what is heard, from samples to the first pass' hypotheses. It runs no graph: `recognizer` does, for many."""

from __future__ import annotations

import contextlib
import threading
from array import array
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio import Resampler, as_samples
from u2moe.runtime.caches import split_rows
from u2moe.runtime.ctc import GreedySearch, PrefixBeamSearch
from u2moe.runtime.endpoint import PAUSE, SHORTEST_PAUSE_S, Endpoint, Endpointer
from u2moe.runtime.errors import AudioError, StreamError
from u2moe.runtime.features import Fbank
from u2moe.runtime.pauses import find_pauses, first_pause, loudness
from u2moe.runtime.result import Result
from u2moe.runtime.windows import Windows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from u2moe.runtime.caches import CacheRow
    from u2moe.runtime.context import ContextGraph
    from u2moe.runtime.ctc import Hypothesis
    from u2moe.runtime.decoding import DecodingOptions
    from u2moe.runtime.model import Model
    from u2moe.runtime.text import Vocabulary

_LONGEST_WINDOW_S = 30.0
"""Seconds that are encoded at once with full context, at most, where utterances end by endpoints."""
_SILENT_BEFORE_CUT_S = 0.12
"""Where the CTC head hears something so shortly before the middle of a pause, it is none: somebody speaks quietly."""


class Stream:
    """What is heard of one source, one utterance after the other. Made by `Recognizer.create_stream`.

    Samples go in by `accept_waveform` in any portions: how they are split changes nothing. `Recognizer.decode_streams`
    does the work; `get_result` tells what is known of the utterance at hand. After `input_finished` and a decode that
    is final, and `reset` makes the stream ready for another source.

    With `DecodingOptions.endpoint` utterances end by its rules, to the frame. `take_segments` hands over each finished
    one once, and the stream goes on, its times counted from its first sample. Without, there is one utterance.

    One thread may feed while another decodes; a second that decodes gets a StreamError. Memory is flat but for what the
    second pass needs, encoder output (dim * 4 bytes per encoder frame) until the utterance ends, and the caches, as
    long as the left context.
    """

    def __init__(
        self, model: Model, vocabulary: Vocabulary, options: DecodingOptions, context: ContextGraph | None = None
    ) -> None:
        """Start with `options` whose `search` is chosen; their `chunk_size` None means full context here."""
        self.options = options
        self.context = context
        self._model = model
        self._vocabulary = vocabulary
        self._lock = threading.RLock()
        self._decoding = threading.Lock()
        self._keeps_output = options.search in ("attention_rescoring", "attention") or options.endpoint is not None
        self._endpointer = Endpointer(options.endpoint, self.frame_s, model.config.blank) if options.endpoint else None
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next samples are those of a new source, at time zero."""
        with self._lock:
            config = self._model.config
            chunk_size = self.options.chunk_size
            if chunk_size is None and self.options.endpoint is not None:
                chunk_size = round(_LONGEST_WINDOW_S / self.frame_s)
            self.caches = self._no_caches()
            self._windows = Windows(config, chunk_size)
            self._window = np.zeros((0, config.feature_size), np.float32)
            self._pause_len = 0  # encoder frames of the pause amid which that ends, if it does
            self._searched = 0  # encoder frame up to which no pause is looked for: somebody speaks in it
            self._is_long = False  # whether there was more than one window can hold
            self._features = Fbank(self._model.manifest.features)
            self._resampler: Resampler | None = None
            self._input_finished = False
            self._has_failed = False
            self._num_samples = 0
            self._num_frames = 0
            self._unmeasured: list[npt.NDArray[np.float32]] = []  # features whose loudness is not known yet
            self._levels = array("f")  # loudness of the feature frames from `_levels_start` on
            self._levels_start = 0
            self._num_segments = 0
            self._finished: list[Result] = []
            self._outputs: list[npt.NDArray[np.float32]] = []
            self._result_is_old = False
            self._rest = (np.zeros((0, config.output_size), np.float32), np.zeros((0, config.vocab_size), np.float32))
            self._begin_segment()

    def accept_waveform(self, sample_rate: float, samples: npt.ArrayLike) -> None:
        """Append samples of one channel.

        Args:
            sample_rate: in Hz, the same throughout; any rate is converted to the model's.
            samples: float32 in [-1, 1] or int16 [n], any length.

        Raises:
            StreamError: the input was finished, or decoding has failed.
            AudioError: samples or rate that cannot be used; nothing was appended.
        """
        accepted = as_samples(samples)
        with self._lock:
            self._check()
            if self._input_finished:
                raise StreamError("the input of this stream is finished: reset it, or create another stream")
            if self._resampler is None:
                self._resampler = Resampler(sample_rate, self._model.manifest.features.sample_rate)
            source_rate = self._resampler.source_rate
            if sample_rate != source_rate:
                raise AudioError(f"sample rate changed from {source_rate} to {sample_rate} Hz in a stream")
            self._accept(self._resampler.accept(accepted))

    def input_finished(self) -> None:
        """Say that no samples follow. The next decode flushes the last, shorter chunk.

        Raises:
            StreamError: it was said before, or decoding has failed.
        """
        with self._lock:
            self._check()
            if self._input_finished:
                raise StreamError("the input of this stream is finished already")
            if self._resampler is not None:
                self._accept(self._resampler.finish())
            self._hear(self._features.finish())
            self._windows.finish()
            self._input_finished = True

    def get_result(self) -> Result:
        """What is recognised of the utterance at hand so far, or finally. Cheap; does no work on audio."""
        with self._lock:
            if self._result_is_old:
                best = self._first_pass.hypotheses(1)
                frame_s, start = self.frame_s, self._segment_start
                self._result = Result(
                    text=self._vocabulary.text(best[0].tokens) if best else "",
                    is_final=False,
                    segment=self._num_segments,
                    tokens=best[0].tokens if best else [],
                    times=[round((start + time) * frame_s, 3) for time in best[0].times] if best else [],
                    score=best[0].score if best else 0.0,
                )
                self._result_is_old = False
            return self._result

    def is_endpoint(self) -> bool:
        """Whether an utterance has ended: `take_segments` returns something."""
        return bool(self._finished)

    def take_segments(self) -> list[Result]:
        """Final results of the utterances that ended since the last call, each once; none of those without words."""
        with self._lock:
            finished, self._finished = self._finished, []
            return finished

    @property
    def is_ready(self) -> bool:
        """Whether there is work for `decode_streams`."""
        with self._lock:
            return self._windows.ready or self.awaits_result

    @property
    def duration(self) -> float:
        """Seconds of audio accepted."""
        return self._num_samples / self._model.manifest.features.sample_rate

    @property
    def frame_s(self) -> float:
        """Seconds from one encoder frame to the next."""
        return self._model.config.subsampling_rate * self._model.manifest.features.frame_shift_ms / 1000

    # What follows is for the recogniser.

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Claim the stream for a thread: chunks follow each other. If that fails, audio is lost: only `reset` helps."""
        if not self._decoding.acquire(blocking=False):
            raise StreamError("this stream is being decoded by another thread")
        try:
            self._check()
            yield
        except StreamError:
            raise
        except BaseException:
            self._has_failed = True
            raise
        finally:
            self._decoding.release()

    def take_window(self) -> npt.NDArray[np.float32] | None:
        """Features [frames, mel] of the next chunk, or None."""
        with self._lock:
            window = self._windows.take()
            if window is None:
                return None
            self._measure()
            if self.options.chunk_size is None:
                window = self._window = self._until_pause(window)
            return window

    def advance(self, output: npt.NDArray[np.float32], log_probs: npt.NDArray[np.float32], caches: CacheRow) -> None:
        """Take over what a chunk gave: encoder output [time, dim], log-probabilities [time, vocab], and caches.

        What comes after an endpoint waits until `conclude`.
        """
        with self._lock:
            self.caches = caches
            self._rest = (output, log_probs)
            self._go_on()

    @property
    def awaits_result(self) -> bool:
        """Whether the utterance at hand has ended, by an endpoint or with the input: only its result is missing."""
        return self._endpoint is not None or (
            self._input_finished and not self._windows.ready and not self._result.is_final
        )

    @property
    def is_cut(self) -> bool:
        """Whether the utterance at hand was ended while something was said, so that it may end within a word."""
        endpoint = self._endpoint
        return endpoint is not None and endpoint.trailing_silence * self.frame_s < SHORTEST_PAUSE_S

    def first_pass(self) -> list[Hypothesis]:
        """Hypotheses of the first pass for the utterance at hand, best first; times from its first frame."""
        return self._first_pass.hypotheses()

    def end_first_pass(self) -> list[Hypothesis]:
        """The same, now that no frames follow."""
        self._first_pass.finish()
        return self._first_pass.hypotheses()

    def encoder_out(self) -> npt.NDArray[np.float32]:
        """Encoder output of the utterance at hand [time, dim]."""
        return np.concatenate([np.zeros((0, self._model.config.output_size), np.float32), *self._outputs])

    @property
    def num_encoder_frames(self) -> int:
        """Encoder frames so far, of all utterances."""
        return self._num_frames

    @property
    def num_segment_frames(self) -> int:
        """Encoder frames of the utterance at hand."""
        return self._num_frames - self._segment_start

    @property
    def num_window_frames(self) -> int:
        """Encoder frames of the last window; with full context only."""
        return (len(self._window) - self._model.config.window) // self._model.config.subsampling_rate + 1

    @property
    def segment(self) -> int:
        """Number of the utterance at hand."""
        return self._num_segments

    @property
    def segment_start(self) -> int:
        """Encoder frame with which the utterance at hand begins."""
        return self._segment_start

    def pauses(self) -> list[tuple[float, float]]:
        """Where the utterance at hand is quiet, in seconds from the stream's first sample."""
        frame_s = self._model.manifest.features.frame_shift_ms / 1000
        num_levels = self.num_segment_frames * self._model.config.subsampling_rate
        begin = self._segment_start * self.frame_s
        with self._lock:
            levels = np.array(self._levels[:num_levels], np.float32)
        pauses = find_pauses(levels, frame_s)
        return [(begin + start, begin + end) for start, end in pauses]

    def shorten(self, num_frames: int, log_probs: npt.NDArray[np.float32]) -> None:
        """End the utterance at hand after `num_frames` of its frames, given `log_probs` [time, vocab] of all."""
        with self._lock:
            output = self.encoder_out()
            self._rest = (
                np.concatenate([output[num_frames:], self._rest[0]]),
                np.concatenate([log_probs[num_frames:], self._rest[1]]),
            )
            self._num_frames -= len(output) - num_frames
            self._outputs = [output[:num_frames]]
            self._first_pass = self._search()
            self._first_pass.advance(log_probs[:num_frames])

    def conclude(self, result: Result) -> None:
        """Make `result` the final one of the utterance at hand, and go on with the next, if there is more."""
        with self._lock:
            if result.text:
                self._finished.append(result)
                self._num_segments += 1
            num_left = len(self._rest[0])
            if self._endpoint is None and self.awaits_result:
                self._outputs = []
                self._result = result
                self._result_is_old = False
                self.caches = self._no_caches()
                return
            if self.options.chunk_size is not None:
                self.caches.begin_anew(num_left)
            self._begin_segment()
            self._go_on()

    @property
    def ends_with_window(self) -> bool:
        """Whether full context was encoded as far as it goes, but the utterance at hand is not known to end there."""
        is_over = self._result.is_final or self.awaits_result
        return self.options.chunk_size is None and self.num_segment_frames > 0 and not is_over

    def give_back(self) -> None:
        """Forget the frames of the utterance at hand: the next window begins with them."""
        with self._lock:
            rate = self._model.config.subsampling_rate
            end = self.num_window_frames
            begin = end - self.num_segment_frames
            self._windows.put_back(self._window[begin * rate : end * rate])
            self._num_frames = self._segment_start
            self._begin_segment()

    def _check(self) -> None:
        if self._has_failed:
            raise StreamError("decoding of this stream has failed, and audio was lost: reset it, or create another")

    def _accept(self, samples: npt.NDArray[np.float32]) -> None:
        self._num_samples += len(samples)
        self._hear(self._features.accept(samples))

    def _hear(self, features: npt.NDArray[np.float32]) -> None:
        self._unmeasured.append(features)
        self._windows.accept(features)

    def _measure(self) -> None:
        """Loudness of what was heard, of many frames together."""
        if self._unmeasured:
            self._levels.frombytes(loudness(np.concatenate(self._unmeasured)).tobytes())
            self._unmeasured = []

    def _until_pause(self, window: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """As much of features [frames, mel], with which an utterance begins, as precede the middle of its first pause.

        What is left of them begins the next window. A recording that one window can hold is heard whole, as WeNet does.
        """
        self._pause_len = 0
        self._is_long |= len(window) >= self._windows.length
        min_pause = self.options.endpoint.min_pause if self.options.endpoint else None
        if min_pause is None or not self._is_long:
            return window
        rate, step = self._model.config.subsampling_rate, self._model.manifest.features.frame_shift_ms / 1000
        levels = np.array(self._levels[: len(window)], np.float32)
        after_s = (self._searched - self._segment_start) * self.frame_s
        pause = first_pause(levels, step, min_pause, after_s)
        is_last = self._input_finished and not self._windows.ready
        if pause is None or (is_last and pause[1] >= len(levels) * step):
            return window
        num_frames = int(sum(pause) / 2 / self.frame_s)
        self._pause_len = int((pause[1] - pause[0]) / self.frame_s)
        self._windows.put_back(window[num_frames * rate : self._windows.stride])
        return window[: (num_frames - 1) * rate + self._model.config.window]

    def _end_at_pause(self) -> Endpoint | None:
        """That the utterance ends with the window, where this ends amid a pause in which nothing is heard."""
        pause_len, self._pause_len = self._pause_len, 0
        if self._endpointer is None or not pause_len:
            return None
        if self._endpointer.trailing_silence * self.frame_s < _SILENT_BEFORE_CUT_S:
            self._searched = self._num_frames
            return None
        return Endpoint(num_frames=0, rule=PAUSE, trailing_silence=pause_len)

    def _no_caches(self) -> CacheRow:
        return split_rows(self._model.encoder.start(), [0])[0]

    def _search(self) -> GreedySearch | PrefixBeamSearch:
        blank = self._model.config.blank
        if self.options.search in ("ctc_greedy", "attention"):
            return GreedySearch(blank)
        return PrefixBeamSearch(self.options.beam_size, blank, self.context)

    def _begin_segment(self) -> None:
        self._segment_start = self._num_frames
        start = self._num_frames * self._model.config.subsampling_rate
        del self._levels[: start - self._levels_start]
        self._levels_start = start
        self._outputs = []
        self._first_pass = self._search()
        self._endpoint: Endpoint | None = None
        self._result = Result(text="", is_final=False, segment=self._num_segments)
        self._result_is_old = False
        if self._endpointer is not None:
            self._endpointer.reset()

    def _go_on(self) -> None:
        """Let the utterance at hand take frames as far as it goes."""
        output, log_probs = self._rest
        if self._endpointer is not None:
            self._endpoint = self._endpointer.advance(log_probs)
        num_frames = len(output) if self._endpoint is None else self._endpoint.num_frames
        self._rest = (output[num_frames:], log_probs[num_frames:])
        self._num_frames += num_frames
        if self._keeps_output:
            self._outputs.append(output[:num_frames])
        self._first_pass.advance(log_probs[:num_frames])
        self._result_is_old = True
        if self._endpoint is None:
            self._endpoint = self._end_at_pause()
