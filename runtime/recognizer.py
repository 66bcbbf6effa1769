"""The public interface: recognises files, arrays and streams with a bundle."""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.runtime.audio.raw import File, RawAudio
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_location import find_bundle
from u2moe.runtime.decoding.context import ContextGraph, Hotwords
from u2moe.runtime.decoding.pipeline import Observer, Pipeline
from u2moe.runtime.decoding.stream_state import StreamState
from u2moe.runtime.decoding.text_alignment import MIN_SCORE, TextAligner
from u2moe.runtime.decoding.vad import VoiceActivityDetector
from u2moe.runtime.decoding.words import SearchWords
from u2moe.runtime.errors import BundleWarning, StreamError
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.log import log_info
from u2moe.runtime.model.encoder import check_chunks
from u2moe.runtime.model.features import constants_of
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.model.static_encoder import Runner
from u2moe.runtime.options import NONE, WITHOUT_BEAM, DecodingOptions, DefiniteOptions, EndpointConfig
from u2moe.runtime.recognition import Buffers, RecordingReader, recognize, samples_of, transcript_of
from u2moe.runtime.result import Alignment, Result, Transcript
from u2moe.runtime.stream import Stream
from u2moe.runtime.text.grammar import Grammar
from u2moe.runtime.text.written.formatter import formatter_of
from u2moe.runtime.validation import checked_number, checked_options, checked_text


class Recognizer:
    """Recognises speech with the model of a bundle.

    The model is stateless: any number of streams share it, and any thread may use it, each with its own streams.

    Raises:
        StreamError: the bundle does not support `options`.
        BundleError: the bundle's features cannot be computed.
    """

    def __init__(
        self,
        bundle: Bundle,
        model: Model,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Create a recogniser from an open bundle and its loaded model; see also `from_pretrained`.

        Args:
            bundle: the bundle.
            model: its sessions.
            options: how to decode; None: the bundle's defaults.
            hotwords: phrases to prefer, each with an optional weight, see `ContextGraph`; None: those of the bundle; an
                empty list: none.
            observer: hooks for measurements.
        """
        if bundle.manifest.random_weights:
            warnings.warn(f"{bundle.path}: random weights, for measuring only", BundleWarning, stacklevel=2)
        self.bundle = bundle
        self.model = model
        self.vocabulary = bundle.vocabulary
        self._rate = bundle.manifest.features.sample_rate
        self.options = checked_options("options", options, DecodingOptions())
        self._words = SearchWords(bundle, model.config.blank)
        self._check(self.options)
        self._has_own_hotwords = hotwords is not None
        self.context = self._words.context(hotwords)
        definite = self._definite(self.options, None)
        self._words.graph(definite, hotwords)
        self._words.fusion(definite)
        self._pipeline = Pipeline(bundle, model, observer)
        constants_of(bundle.manifest.features)  # fails here rather than with the first sample

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - as users of other libraries know it; `load` has fewer
        cls,
        directory: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        providers: Sequence[str] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
        num_threads: int | None = None,
        sess_options: onnxruntime.SessionOptions | None = None,
        kernels: str | None = None,
        public_keys: Sequence[str] | None = None,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
    ) -> Recognizer:
        """A recogniser for the bundle in `directory`; None: the demo model.

        The directory is a folder, or a repository of a hub, "org/name", of which `revision` is a branch, tag or commit;
        see `find_bundle`. What follows are fields of `SessionSettings`, then how to decode, as for the constructor.
        `load` is the same with the settings as one object.

        Raises:
            BundleError: not a bundle, or a damaged one.
            IntegrityError: a file is damaged, or the bundle was replaced meanwhile: load again.
            SignatureError: none of `public_keys` has signed the bundle.
            ProviderError: a provider is not installed or did not start.
            KernelsError: native kernels were requested, but are not installed or cannot run here.
        """
        settings = SessionSettings(
            providers=(DEFAULT_PROVIDER,) if providers is None else providers,
            provider_options=() if provider_options is None else provider_options,
            num_threads=num_threads,
            sess_options=sess_options,
            kernels=kernels,
            public_keys=public_keys,
        )
        name = directory if revision is None else f"{directory}@{revision}"
        return cls.load(name, settings, options=options, hotwords=hotwords)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str] | None = None,
        settings: SessionSettings | None = None,
        *,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
        runner: Runner | None = None,
    ) -> Recognizer:
        """A recogniser for the bundle in `directory`, run as `settings` say; see `from_pretrained`.

        `runner` runs the encoder of a bundle of fixed shape (`u2moe convert --profile static`) on a device of its own.
        """
        begin = time.perf_counter()
        keys = None if settings is None else settings.public_keys
        bundle = Bundle.open(find_bundle(directory), verify=False, public_keys=keys)
        model = bundle.load(settings, runner=runner)
        duration, providers = time.perf_counter() - begin, ", ".join(model.providers)
        log_info("%s: loaded in %.2f s on %s, kernels: %s", bundle.path, duration, providers, model.kernels)
        return cls(bundle, model, options, hotwords)

    @property
    def default_endpoint(self) -> EndpointConfig:
        """Where utterances end if no rules are given: the bundle's."""
        return self.bundle.manifest.decoding.endpoint

    def warm_up(self) -> None:
        """Recognise two seconds of noise, so that the first audio takes no longer than later audio. Affects no results.

        Raises:
            ProviderError: running a graph failed.
        """
        options = dataclasses.replace(self.options, endpoint=None)
        stream = self.create_stream(options) if self.model.config.streaming else self._stream(options, None, None)
        stream.accept_waveform(self._rate, np.random.default_rng(0).normal(0, 0.1, 2 * self._rate))
        stream.input_finished()
        self.decode_streams([stream])

    def create_stream(
        self,
        options: DecodingOptions | None = None,
        *,
        hotwords: Hotwords | ContextGraph | None = None,
        grammar: Grammar | Iterable[str] | None = None,
    ) -> Stream:
        """A stream for one source at a time.

        Args:
            options: how to decode; None: the recogniser's.
            hotwords: phrases to prefer; None: the recogniser's; an empty list: none.
            grammar: what may be said, see `Grammar`, in place of hotwords and a language model; None: as in `options`.

        Raises:
            StreamError: the bundle cannot stream, or does not support `options`.
            GrammarError: the grammar cannot be read or used.
            ValueError: the vocabulary cannot spell a hotword.
        """
        options = self._chosen(options, grammar)
        chunk_size = options.chunk_size or self.model.config.stream_chunk_size
        check_chunks(self.model.config, chunk_size, options.num_left_chunks)
        return self._stream(options, chunk_size, hotwords)

    def create_recording_stream(
        self,
        options: DecodingOptions | None = None,
        *,
        hotwords: Hotwords | ContextGraph | None = None,
        grammar: Grammar | Iterable[str] | None = None,
    ) -> Stream:
        """A stream that decodes as `transcribe` does: with full context unless told otherwise, in segments.

        Several of them, each fed with a whole recording and finished, are decoded together by `decode_streams`. What
        was not decoded yet stays in memory. Arguments and errors are those of `create_stream`; without `chunk_size`,
        full context is used.
        """
        options = self._chosen(options, grammar)
        options = dataclasses.replace(options, endpoint=options.endpoint or self.default_endpoint)
        static_chunk_size = self.model.config.static_chunk_size if self.model.config.streaming else 0
        return self._stream(options, options.chunk_size or static_chunk_size or None, hotwords)

    def decode_streams(self, streams: Sequence[Stream]) -> None:
        """Do all work that is ready: every complete chunk, and the second pass of every finished utterance.

        Chunks of streams with the same chunk size and left context are encoded together. If that fails, they are
        encoded apart, so that a stream fails alone: see `Stream.failure`.

        Raises:
            ProviderError: running a graph failed; the streams that have a `failure` must be reset.
            StreamError: another thread is decoding one of the streams.
            ValueError: one of the streams is of another model.
        """
        if not all(stream.state.model is self.model for stream in streams):
            raise ValueError("this stream was created by a recogniser with another model: decode it with that one")
        self._pipeline.decode([stream.state for stream in dict.fromkeys(streams)])

    def transcribe(  # noqa: PLR0913 - what may be said of words, of the file, and of progress
        self,
        audio: File | RawAudio | npt.ArrayLike | Buffers,
        sample_rate: float | None = None,
        *,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
        grammar: Grammar | Iterable[str] | None = None,
        vad: VoiceActivityDetector | None = None,
        on_progress: Callable[[float], object] | None = None,
        channel: int | None = None,
        track: int | None = None,
    ) -> Transcript:
        """Recognise a recording of any length.

        It is cut into segments at pauses in the speech (`DecodingOptions.endpoint`, by default the bundle's
        rules), so that memory is limited. With full context, recordings of up to 30 seconds are encoded as a
        whole; longer ones are cut in pauses of half a second before they are encoded (`EndpointConfig.pause`).

        A file that is damaged after some seconds of audio is recognised up to that point: the transcript is then not
        `complete`, and its `error` gives the reason.

        Args:
            audio: an audio file (a path, its bytes, or a binary file object), `RawAudio`, samples of one channel
                (float32 in [-1, 1] or int16), or an iterator of buffers of such samples, float32 at the model's rate.
            sample_rate: sample rate of an array in Hz; None: the model's. Files have their own.
            options: how to decode; None: the recogniser's. Without `chunk_size`, full context is used.
            hotwords: phrases to prefer; None: the recogniser's; an empty list: none.
            grammar: what may be said, see `Grammar`, in place of hotwords and a language model; None: as in `options`.
            vad: detects speech; each stretch of speech is recognised separately, and cut further at endpoints.
            on_progress: called from time to time with the seconds of the recording processed so far.
            channel: index of the only channel of a file to recognise, 0 for the left one; None: the average of all.
            track: index of the audio track of a media file, counted from 0; None: the default one.

        Raises:
            AudioError: none of the audio can be read or used.
            StreamError: the bundle does not support `options`.
            GrammarError: the grammar cannot be read or used.
            ValueError: the vocabulary cannot spell a hotword.
        """
        samples = samples_of(audio, self._rate, sample_rate, channel, track)
        options = self._chosen(options, grammar)
        reader, results = self._recognize(samples, options, hotwords, vad, on_progress)
        segments = list(results)
        return transcript_of(segments, reader.duration, reader.error)

    __call__ = transcribe

    def segments(  # noqa: PLR0913 - as `transcribe`
        self,
        audio: File | RawAudio | npt.ArrayLike | Buffers,
        sample_rate: float | None = None,
        *,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
        grammar: Grammar | Iterable[str] | None = None,
        vad: VoiceActivityDetector | None = None,
        on_progress: Callable[[float], object] | None = None,
        channel: int | None = None,
        track: int | None = None,
    ) -> Iterator[Result]:
        """The final results that `transcribe` would return, one at a time, each as soon as it is found.

        Memory use is constant for any length. Arguments and errors are those of `transcribe`; except for damaged audio,
        errors are raised by the call itself, before the first segment is requested.

        Raises:
            AudioError: also for a file that is damaged after some seconds of audio, after all segments before.
        """
        samples = samples_of(audio, self._rate, sample_rate, channel, track)
        options = self._chosen(options, grammar)
        return self._until_damage(*self._recognize(samples, options, hotwords, vad, on_progress))

    def align(
        self,
        audio: File | RawAudio | npt.ArrayLike | Buffers,
        text: str,
        sample_rate: float | None = None,
        *,
        options: DecodingOptions | None = None,
        min_score: float = MIN_SCORE,
        on_progress: Callable[[float], object] | None = None,
        channel: int | None = None,
        track: int | None = None,
    ) -> Alignment:
        """Find when the words of a text are said in a recording of any length.

        The alignment is the most probable one of the whole text with the whole recording, which is encoded as by
        `transcribe`, whose other arguments and errors it has. Memory use is limited: what hours need is in a file.

        `text` is all that is said. Lines and full stops end sentences; punctuation and letter case do not matter;
        numbers have to be written as words. Words with a score below `min_score` are `Alignment.misfits`.

        Raises:
            AudioError: also for a file that is damaged after some seconds of audio.
            AlignmentError: the text has no words, or words that the vocabulary cannot write; nothing is heard; the
                recording is too short for the text.
        """
        min_score = checked_number("min_score", min_score, least=0, most=1)
        aligner = TextAligner(checked_text("text", text), self.vocabulary, self.model.config.blank)
        options = checked_options("options", options, self.options)
        options = dataclasses.replace(options, search="ctc_greedy", language_model=None, grammar=None, text_format=None)
        stream = self.create_recording_stream(options, hotwords=())
        reader = RecordingReader(samples_of(audio, self._rate, sample_rate, channel, track), self._rate, on_progress)
        pipeline = Pipeline(self.bundle, self.model, Observer(concluded=lambda _: aligner.advance(stream.state)))
        found = recognize(lambda streams: pipeline.decode([each.state for each in streams]), stream, reader)
        for _ in self._until_damage(reader, found):
            pass
        return aligner.finish(stream.state, min_score)

    def _recognize(
        self,
        samples: Buffers,
        options: DecodingOptions,
        hotwords: Hotwords | ContextGraph | None,
        vad: VoiceActivityDetector | None,
        on_progress: Callable[[float], object] | None,
    ) -> tuple[RecordingReader, Iterator[Result]]:
        """Buffers of a recording, and the results that appear as they are read."""
        stream = self.create_recording_stream(options, hotwords=hotwords)
        reader = RecordingReader(samples, self._rate, on_progress)
        return reader, recognize(self.decode_streams, stream, reader, vad)

    @staticmethod
    def _until_damage(reader: RecordingReader, results: Iterator[Result]) -> Iterator[Result]:
        yield from results
        if reader.error is not None:
            raise reader.error

    def _chosen(self, options: DecodingOptions | None, grammar: Grammar | Iterable[str] | None) -> DecodingOptions:
        options = checked_options("options", options, self.options)
        if grammar is None:
            return options
        grammar = grammar if isinstance(grammar, Grammar) else Grammar(lines=grammar)  # type: ignore[arg-type]  # checked
        return dataclasses.replace(options, grammar=grammar)

    def _check(self, options: DecodingOptions) -> None:
        if options.search in ("attention_rescoring", "attention") and not self.model.has_decoder:
            raise StreamError(f"search {options.search!r} needs a decoder, and this bundle has none (CTC only)")
        if options.chunk_size is not None:
            check_chunks(self.model.config, options.chunk_size, options.num_left_chunks)
        if options.text_format is not None:
            formatter_of(options.text_format)  # what it needs may not be installed

    @property
    def language_model(self) -> LanguageModelOptions | None:
        """The language model of searches for which no other is chosen; None: there is none."""
        chosen = self.options.language_model or self._words.language_model
        return chosen if isinstance(chosen, LanguageModelOptions) else None

    def _definite(self, options: DecodingOptions, chunk_size: int | None) -> DefiniteOptions:
        """Options with the bundle's defaults for what they leave open."""
        search = options.search or ("attention_rescoring" if self.model.has_decoder else "ctc_prefix_beam")
        language_model = options.language_model
        if language_model is None and search not in WITHOUT_BEAM and options.grammar is None:
            language_model = self._words.language_model
        chosen = {"search": search, "language_model": language_model or NONE, "chunk_size": chunk_size}
        return DefiniteOptions.of(options, self.bundle.manifest.decoding, **chosen)

    def _stream(
        self, options: DecodingOptions, chunk_size: int | None, hotwords: Hotwords | ContextGraph | None
    ) -> Stream:
        self._check(options)
        chosen = self._definite(options, chunk_size)
        graph = self._words.graph(chosen, hotwords)
        context = None if graph else self.context if hotwords is None else self._words.context(hotwords)
        if context is not None and chosen.search in WITHOUT_BEAM:
            if self._has_own_hotwords or hotwords is not None:
                raise ValueError(f"hotwords need a prefix beam search or rescoring, search is {chosen.search!r}")
            context = None
        return Stream(StreamState(self.model, self.vocabulary, chosen, context, self._words.fusion(chosen), graph))
