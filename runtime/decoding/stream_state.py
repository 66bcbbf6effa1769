"""The state of a stream during recognition, behind the public `Stream`. `pipeline` runs the graphs."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.decoding.ctc import GreedySearch
from u2moe.runtime.decoding.endpoint import Endpointer, PauseRule
from u2moe.runtime.decoding.feature_extractor import FeatureExtractor
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.native_search import new_search
from u2moe.runtime.decoding.pauses import find_pauses
from u2moe.runtime.decoding.phrases import PhraseGraph
from u2moe.runtime.decoding.utterance import Frames, Phase, Search, Utterance
from u2moe.runtime.errors import StreamError
from u2moe.runtime.model.encoder import CacheRow, split_rows
from u2moe.runtime.model.model import Model
from u2moe.runtime.options import WITHOUT_BEAM, DefiniteOptions
from u2moe.runtime.result import Alternative, Result
from u2moe.runtime.text.vocabulary import Vocabulary
from u2moe.runtime.text.written.formatter import formatter_of

LONGEST_WINDOW_S = 30.0
"""Maximum seconds encoded at once with full context, if there are endpoint rules."""


class StreamState:
    """The audio of a stream, its current utterance, the results of earlier ones, and the caches of the encoder.

    The next utterance begins where the current one ends. The current one passes through these phases (`Phase`):

        RECEIVING  input                           -> WINDOWS
        WINDOWS    take_window, then advance       -> RECEIVING, WINDOWS, or SEARCHED at an endpoint or the last window
        SEARCHED   perhaps cut, then conclude      -> the next utterance; after the last one CONCLUDED

    With full context, an utterance that may continue after its window is either cut and concluded, or restarted with
    the next window (`begin_again`).

    One thread may feed audio (`input`), while another decodes (`claim` and the methods below it) and a third requests
    results.

    Attributes:
        lock: held while anything changes.
        options: options with all defaults filled in; see `Stream.options`. `chunk_size` None means full context.
        vocabulary: vocabulary of results.
        caches: caches of the encoder for the next chunk.
        extractor: converts the samples to windows of features.
        segments: final results that have not been taken yet.
        window_start: first encoder frame of the most recent window.
        frame_s: seconds per encoder frame.
        failure: error that made decoding fail, kept until `reset`; None: no failure.
    """

    def __init__(
        self,
        model: Model,
        vocabulary: Vocabulary,
        options: DefiniteOptions,
        context: ContextGraph | None = None,
        fusion: Fusion | None = None,
        grammar: PhraseGraph | None = None,
    ) -> None:
        self.options = options
        self.grammar = grammar
        self.vocabulary = vocabulary if grammar is None else grammar.vocabulary
        self.context = context
        self.fusion = fusion
        self.weights = options.weights() if fusion is None else options.weights(fusion.rescoring_weight)
        self._formatter = None if options.text_format is None else formatter_of(options.text_format)
        self.frame_s = model.manifest.frame_s
        self._level_s = model.manifest.features.frame_shift_ms / 1000
        self.model = model
        self.lock = threading.RLock()
        self._released = threading.Condition(self.lock)
        self._decoder: int | None = None
        self._num_resets = 0
        blank, endpoint = model.config.blank, options.endpoint
        self._endpointer = Endpointer(endpoint, self.frame_s, blank, fusion) if endpoint else None
        self.reset()

    def reset(self) -> None:
        """Discard everything and start a new source. Waits while another thread decodes this stream.

        Raises:
            StreamError: this thread is decoding the stream.
        """
        with self.lock:
            if self._decoder == threading.get_ident():
                raise StreamError("this stream cannot be reset by the thread that is decoding it")
            self._num_resets += 1
            try:
                self._released.wait_for(lambda: self._decoder is None)
            finally:
                self._num_resets -= 1
                self._released.notify_all()
            chunk_size, endpoint, padding_s = self.options.chunk_size, self.options.endpoint, self.options.padding_s
            is_whole, model = chunk_size is None, self.model
            if is_whole and endpoint is not None:
                chunk_size = round((LONGEST_WINDOW_S + 2 * padding_s) / self.frame_s)
            self.extractor = FeatureExtractor(
                model.manifest, chunk_size, knows_last=is_whole, padding_s=padding_s, library=model.search_library
            )
            self._pause_rule = PauseRule(endpoint.min_pause if endpoint else None, self.frame_s, self._level_s)
            self.failure: BaseException | None = None
            self.segments: list[Result] = []
            self.caches = self._no_caches()
            self.window_start = 0
            self._begin_utterance(0, 0)

    # Called by programs, through `Stream`.

    @contextlib.contextmanager
    def input(self) -> Iterator[FeatureExtractor]:
        """Lock the stream and yield the extractor that takes samples; raise StreamError if decoding failed."""
        with self.lock:
            self._check()
            yield self.extractor

    def result(self, num_alternatives: int = 0) -> Result:
        """Return the result of the current utterance. A partial result has up to `num_alternatives` alternatives."""
        with self.lock:
            result = self.utterance.result(self.vocabulary, self.frame_s, self.clock(), self.model.manifest.calibration)
            if result.is_final:
                return result
            nbest: dict[str, Alternative] = {}
            for each in self.utterance.hypotheses(num_alternatives) if num_alternatives else ():
                text = self.vocabulary.text(each.tokens)
                score = each.score
                own = Alternative(text=text, tokens=each.tokens, score=score, ctc_score=score, attention_score=None)
                nbest.setdefault(text, own)
            return self.presented(dataclasses.replace(result, nbest=list(nbest.values())) if nbest else result)

    def presented(self, result: Result) -> Result:
        """Return a result for the caller, with text in the chosen format."""
        return result if self._formatter is None else self._formatter.result(result, self.vocabulary)

    def clock(self) -> Callable[[float], float]:
        """Return a function that converts seconds from the first frame to times of results, rounded to milliseconds.

        The times exclude the added silence. They are limited to the range from 0 to the end of the source so far.
        """
        if not self.options.padding_s:
            return lambda time: round(time, 3)
        lead_s, end_s = self.extractor.lead_s, self.extractor.end_s
        return lambda time: round(min(max(round(time, 3) - lead_s, 0.0), end_s), 3)

    def take_segments(self) -> list[Result]:
        """Return the final results since the last call: one for each utterance that has words."""
        with self.lock:
            segments, self.segments = self.segments, []
            return segments

    @property
    def phase(self) -> Phase:
        """The phase of the current utterance."""
        with self.lock:
            if self.utterance.endpoint is not None:
                return Phase.SEARCHED
            if self.extractor.has_window:
                return Phase.WINDOWS
            if not self.extractor.is_finished:
                return Phase.RECEIVING
            return Phase.CONCLUDED if self.utterance.is_concluded else Phase.SEARCHED

    # Called by the pipeline.

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Claim the stream for this thread, since chunks must be decoded in order.

        If an exception such as KeyboardInterrupt interrupts the work, audio is lost and the stream must be `reset`.
        """
        with self.lock:
            self._released.wait_for(lambda: self._decoder is not None or not self._num_resets)
            if self._decoder is not None:
                raise StreamError("this stream is being decoded by another thread")
            self._decoder = threading.get_ident()
        try:
            self._check()
            yield
        except StreamError:
            raise
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self.lock:
                self._decoder = None
                self._released.notify_all()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Store an error raised in the `with` block as this stream's `failure`, so that other streams continue."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - any error loses the work
            self.failure = error

    def take_window(self) -> npt.NDArray[np.float32] | None:
        """Return the features [frames, mel] of the next chunk, which may end at a pause (`PauseRule`), if complete."""
        with self.lock:
            extractor = self.extractor
            if not extractor.take_window():
                return None
            self.window_start = self.utterance.end
            if self.options.chunk_size is None:
                levels, start = extractor.levels(len(extractor.window)), self.utterance.start
                num_frames = self._pause_rule.end_of_window(
                    levels, start, is_full=extractor.window_is_full, is_last=extractor.is_exhausted
                )
                if num_frames is not None:
                    extractor.shorten_window(num_frames)
            return extractor.window

    def advance(self, frames: Frames, caches: CacheRow) -> None:
        """Add the encoder frames of a chunk, and store the caches for the next."""
        with self.lock:
            self.caches = caches
            self._advance(frames)

    def cut(self, num_frames: int, log_probs: npt.NDArray[np.float32]) -> None:
        """End the current utterance after `num_frames` frames. `log_probs` [time, vocab] cover all its frames."""
        with self.lock:
            self.result()
            self.utterance.shorten(num_frames, log_probs)

    def conclude(self, result: Result) -> None:
        """Set the final result of the current utterance. If it was not the last, continue with the next one."""
        with self.lock:
            number = self.utterance.number
            if result.text:
                self.segments.append(result)
                number += 1
            if self.utterance.endpoint is None and self.phase is Phase.SEARCHED:
                self.utterance.conclude(result)
                self.caches = self._no_caches()
                return
            config = self.model.config
            surplus = self.utterance.surplus or Frames(
                output=np.zeros((0, config.output_size), np.float32),
                log_probs=np.zeros((0, config.vocab_size), np.float32),
            )
            if self.options.chunk_size is not None:
                self.caches.begin_anew(len(surplus) - len(surplus) % config.chunk_multiple)
            self._begin_utterance(number, self.utterance.end)
            self._advance(surplus)

    @property
    def may_go_on(self) -> bool:
        """Whether the current utterance has frames and may still continue, in a stream with full context."""
        is_begun = self.options.chunk_size is None and self.utterance.num_frames > 0
        return is_begun and self.phase in (Phase.RECEIVING, Phase.WINDOWS)

    def begin_again(self) -> None:
        """Discard the encoder frames of the current utterance; its audio is encoded again with the next window."""
        with self.lock:
            self.extractor.repeat_window(self.utterance.num_frames)
            self._begin_utterance(self.utterance.number, self.utterance.start)

    def pauses(self) -> list[tuple[float, float]]:
        """Return the pauses in the current utterance, in seconds from the first frame of the source."""
        begin = self.utterance.start * self.frame_s
        with self.lock:
            levels = self.extractor.levels(self.utterance.num_frames * self.model.config.subsampling_rate)
        return [(begin + start, begin + end) for start, end in find_pauses(levels, self._level_s)]

    def _check(self) -> None:
        if self.failure is not None:
            raise StreamError("decoding has failed, and audio was lost: reset the stream, or create another")

    def _begin_utterance(self, number: int, start: int) -> None:
        # `search` does not refer to `self`: a reference from the utterance to its stream would keep the model in memory
        # until garbage collection.
        library, blank, options = self.model.search_library, self.model.config.blank, self.options
        context, fusion, grammar, penalty = self.context, self.fusion, self.grammar, options.blank_penalty

        def search() -> Search:
            if options.search in WITHOUT_BEAM:
                return GreedySearch(blank, blank_penalty=penalty)
            size = options.beam_size
            return new_search(library, size, blank, context, fusion, grammar=grammar, blank_penalty=penalty)

        size, commits = self.model.config.output_size, options.chunk_size is not None
        keeps = options.search in ("attention_rescoring", "attention") or options.endpoint is not None
        self.utterance = Utterance(
            number, start, search, output_size=size, keeps_output=keeps, commits=commits, grammar=grammar
        )
        self.extractor.forget(start)
        if self._endpointer is not None:
            self._endpointer.reset()

    def _advance(self, frames: Frames) -> None:
        """Add frames to the current utterance, up to its end."""
        self.utterance.advance(frames, self._endpointer)
        self.utterance.commit(self.vocabulary)
        if self.utterance.endpoint is None and self._endpointer is not None:
            self.utterance.endpoint = self._pause_rule.endpoint(self.utterance.end, self._endpointer.trailing_silence)

    def _no_caches(self) -> CacheRow:
        return split_rows(self.model.encoder.start(), [0])[0]
