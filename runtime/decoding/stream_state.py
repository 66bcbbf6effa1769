"""The state of a stream, behind the public `Stream`, and the language models and grammars that streams share."""

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.manifest import MANIFEST_FILE
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.decoding.context import ContextGraph, Hotwords, parse_hotwords
from u2moe.runtime.decoding.ctc import GreedySearch
from u2moe.runtime.decoding.feature_extractor import FeatureExtractor
from u2moe.runtime.decoding.fusion import Fusion
from u2moe.runtime.decoding.native_search import new_search
from u2moe.runtime.decoding.pauses import find_pauses
from u2moe.runtime.decoding.phrases import PhraseGraph
from u2moe.runtime.decoding.utterance import Endpointer, Frames, PauseRule, Search, Utterance
from u2moe.runtime.errors import BundleError, StreamError
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.model.encoder import CacheRow, split_rows
from u2moe.runtime.model.model import Model
from u2moe.runtime.options import WITHOUT_BEAM, DefiniteOptions
from u2moe.runtime.result import Alternative, Result
from u2moe.runtime.text.grammar import Grammar
from u2moe.runtime.text.vocabulary import Vocabulary
from u2moe.runtime.text.written.formatter import formatter_of

LONGEST_WINDOW_S = 30.0
"""Maximum seconds encoded at once with full context, if there are endpoint rules."""


class StreamState:
    """The audio of a stream, its current utterance, the results of earlier ones, and the caches of the encoder.

    The next utterance begins where the current one ends. The current one passes through these phases:

        receiving audio    `input`                       -> windows ready
        windows ready      `take_window`, then `advance` -> one of these, or at an endpoint or the last window: searched
        searched           perhaps `cut`, then `conclude` -> the next utterance; after the last one, the end

    With full context, an utterance that may continue after its window is either cut and concluded, or restarted with
    the next window (`begin_again`).

    One thread may feed audio (`input`), while another decodes (`claim` and the methods below it) and a third requests
    results.

    `lock` is held while anything changes. `options` have all defaults filled in; see `Stream.options`. If `chunk_size`
    is None, there is full context. `vocabulary` is that of results. `caches` are those of the encoder for the next
    chunk. `segments` are final results that have not been taken yet. `window_start` is the first encoder frame of the
    most recent window, and `frame_s` seconds per encoder frame. `failure` is the error that made decoding fail, kept
    until `reset`; None: no failure.
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
        self.model, self.options = model, options
        self.context, self.fusion, self.grammar = context, fusion, grammar
        self.vocabulary = vocabulary if grammar is None else grammar.vocabulary
        self.weights = options.weights() if fusion is None else options.weights(fusion.rescoring_weight)
        self._formatter = None if options.text_format is None else formatter_of(options.text_format)
        self.frame_s, self._level_s = model.manifest.frame_s, model.manifest.features.frame_shift_ms / 1000
        self.lock = threading.RLock()
        self._released = threading.Condition(self.lock)
        self._decoder: int | None = None
        self._num_resets = 0
        blank, endpoint, penalty = model.config.blank, options.endpoint, options.blank_penalty
        self._endpointer = Endpointer(endpoint, self.frame_s, blank, fusion) if endpoint else None
        sizes = model.config.output_size, model.config.vocab_size
        output, log_probs = (np.zeros((0, size), np.float32) for size in sizes)
        self._nothing = Frames(output=output, log_probs=log_probs)
        # This does not refer to `self`: a reference from an utterance to its stream would keep the model in memory
        # until garbage collection.
        self._new_search: Callable[[], Search] = partial(GreedySearch, blank, blank_penalty=penalty)
        if options.search not in WITHOUT_BEAM:
            needs = (model.search_library, options.beam_size, blank, context, fusion)
            self._new_search = partial(new_search, *needs, grammar=grammar, blank_penalty=penalty)
        self.reset()

    def reset(self) -> None:
        """Start a new source. Waits while another thread decodes the stream; raises StreamError if this one does."""
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
            is_whole, library = chunk_size is None, self.model.search_library
            if is_whole and endpoint is not None:
                chunk_size = round((LONGEST_WINDOW_S + 2 * padding_s) / self.frame_s)
            self.extractor = FeatureExtractor(
                self.model.manifest, chunk_size, knows_last=is_whole, padding_s=padding_s, library=library
            )
            self._pause_rule = PauseRule(endpoint.min_pause if endpoint else None, self.frame_s, self._level_s)
            self.failure: BaseException | None = None
            self.segments: list[Result] = []
            self.caches, self.window_start = self._no_caches(), 0
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
            for each in self.utterance.search.hypotheses(num_alternatives) if num_alternatives else ():
                text, score = self.vocabulary.text(each.tokens), each.score
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
    def is_searched(self) -> bool:
        """Whether the utterance has ended and its first pass is complete, so that only the second pass is pending."""
        with self.lock:
            is_last = self.extractor.is_exhausted and not self.utterance.is_concluded
            return self.utterance.endpoint is not None or is_last

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
                self._pause_rule.shorten_window(extractor, self.utterance.start)
            return extractor.window

    def advance(self, frames: Frames, caches: CacheRow) -> None:
        """Add encoder frames to the current utterance, up to its end, and store the caches for the next chunk."""
        with self.lock:
            self.caches = caches
            self.utterance.advance(frames, self._endpointer)
            self.utterance.commit(self.vocabulary)
            if self.utterance.endpoint is None and self._endpointer is not None:
                silence = self._endpointer.trailing_silence
                self.utterance.endpoint = self._pause_rule.endpoint(self.utterance.end, silence)

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
            if self.utterance.endpoint is None and self.is_searched:
                self.utterance.conclude(result)
                self.caches = self._no_caches()
                return
            surplus = self.utterance.surplus
            if self.options.chunk_size is not None:
                self.caches.begin_anew(len(surplus) - len(surplus) % self.model.config.chunk_multiple)
            self._begin_utterance(number, self.utterance.end)
            self.advance(surplus, self.caches)

    @property
    def may_go_on(self) -> bool:
        """Whether the current utterance has frames and may still continue, in a stream with full context."""
        is_begun = self.options.chunk_size is None and self.utterance.num_frames > 0
        with self.lock:
            return is_begun and self.utterance.endpoint is None and not self.extractor.is_exhausted

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
        options, commits = self.options, self.options.chunk_size is not None
        keeps = options.search in ("attention_rescoring", "attention") or options.endpoint is not None
        self.utterance = Utterance(
            number, start, self._new_search, self._nothing, keeps_output=keeps, commits=commits, grammar=self.grammar
        )
        self.extractor.forget(start)
        if self._endpointer is not None:
            self._endpointer.reset()

    def _no_caches(self) -> CacheRow:
        return split_rows(self.model.encoder.start(), [0])[0]


class SearchWords:
    """Language models and grammars that the streams of a bundle share."""

    def __init__(self, bundle: Bundle, blank: int) -> None:
        self._bundle = bundle
        self._blank = blank
        self._fusions: weakref.WeakKeyDictionary[LanguageModelOptions, Fusion] = weakref.WeakKeyDictionary()
        self._graphs: weakref.WeakKeyDictionary[Grammar, PhraseGraph] = weakref.WeakKeyDictionary()

    def context(self, hotwords: Hotwords | ContextGraph | None) -> ContextGraph | None:
        """Return the automaton of `hotwords`, or of the bundle's hotwords if `hotwords` is None."""
        vocabulary = self._bundle.vocabulary
        if hotwords is None:
            lines = self._bundle.manifest.decoding.hotwords
            try:
                return ContextGraph(parse_hotwords("\n".join(lines)), vocabulary) if lines else None
            except ValueError as error:
                raise BundleError(f"{self._bundle.path / MANIFEST_FILE}: decoding: hotwords: {error}") from error
        if isinstance(hotwords, ContextGraph):
            if hotwords.symbols != vocabulary.symbols:
                raise ValueError("hotwords are for the vocabulary of another bundle")
            return hotwords
        is_empty = isinstance(hotwords, list | tuple | Mapping) and not hotwords
        return None if is_empty else ContextGraph(hotwords, vocabulary)

    @cached_property
    def language_model(self) -> LanguageModelOptions | None:
        """The bundle's language model, or None."""
        found = self._bundle.language_model() if self._bundle.manifest.decoding.language_model else None
        if found is not None:
            fusion = self._fusions[found] = Fusion(found, self._bundle.vocabulary)
            fusion.check_words(f"{self._bundle.path / MANIFEST_FILE}: decoding: language_model")
        return found

    def fusion(self, options: DefiniteOptions) -> Fusion | None:
        """Return the language model that the options select, prepared for the vocabulary; None: no language model."""
        chosen = options.language_model
        if isinstance(chosen, LanguageModelOptions) and chosen not in self._fusions:
            self._fusions[chosen] = Fusion(chosen, self._bundle.vocabulary)
        return self._fusions[chosen] if isinstance(chosen, LanguageModelOptions) else None

    def graph(self, options: DefiniteOptions, hotwords: object) -> PhraseGraph | None:
        """Return the automaton of the options' grammar, if any; raise ValueError if there are also hotwords."""
        chosen = options.grammar
        if chosen is None:
            return None
        if hotwords:
            raise ValueError("a grammar replaces hotwords: pass only one of them")
        if chosen not in self._graphs:
            self._graphs[chosen] = PhraseGraph(chosen, self._bundle.vocabulary, self._blank)
        return self._graphs[chosen]
