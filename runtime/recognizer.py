"""Public interface for recognising files, arrays and streams with a bundle."""

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
from u2moe.runtime.decoding.alignment import MIN_SCORE, TextAligner
from u2moe.runtime.decoding.context import ContextGraph, Hotwords
from u2moe.runtime.decoding.pipeline import Observer, Pipeline
from u2moe.runtime.decoding.stream_state import SearchWords, StreamState
from u2moe.runtime.decoding.vad import VoiceActivityDetector
from u2moe.runtime.errors import BundleWarning, StreamError
from u2moe.runtime.language.model import LanguageModelOptions
from u2moe.runtime.log import log
from u2moe.runtime.model.encoder import check_chunks
from u2moe.runtime.model.features import constants_of
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.model.static_encoder import Runner
from u2moe.runtime.options import NONE, WITHOUT_BEAM, DecodingOptions, DefiniteOptions, EndpointConfig
from u2moe.runtime.recognition import Buffers, RecordingReader, recognize, samples_of, transcript_of, until_damage
from u2moe.runtime.result import Alignment, Result, Transcript
from u2moe.runtime.stream import Stream
from u2moe.runtime.text.grammar import Grammar
from u2moe.runtime.text.written.formatter import formatter_of
from u2moe.runtime.validation import checked_number, checked_options, checked_text


class Recognizer:
    """Speech recogniser for the model of a bundle.

    The model is stateless. Any number of streams can share it. Several threads may decode, each its own streams.

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
        """Create a recogniser from an open bundle and its loaded model. `from_pretrained` opens and loads a bundle.

        Args:
            bundle: the bundle.
            model: the loaded model of the bundle.
            options: decoding options; None: the bundle's defaults.
            hotwords: phrases to prefer; see `ContextGraph`. None: the bundle's hotwords. An empty list: no hotwords.
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
        self._pipeline = Pipeline(model, observer)
        constants_of(bundle.manifest.features)  # raises an error here instead of at the first sample

    @classmethod
    def from_pretrained(  # noqa: PLR0913 - a signature as in other libraries; `load` has fewer arguments
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
        """Load the bundle in `directory`, and return a recogniser for it. `load` takes the settings as one object.

        Args:
            directory: a folder, or a repository of the Hugging Face hub ("org/name"); see `find_bundle`. None: the demo
                model.
            revision: branch, tag or commit of the repository.
            providers: execution providers. For this and the next five arguments, see `SessionSettings`.
            provider_options: options of the providers.
            num_threads: threads of the sessions.
            sess_options: options of onnxruntime.
            kernels: "native", "onnxruntime" or "auto".
            public_keys: accepted public keys in PEM. The bundle must be signed with one of them.
            options: decoding options; None: the bundle's defaults.
            hotwords: phrases to prefer. None: the bundle's hotwords. An empty list: no hotwords.

        Raises:
            BundleError: the folder is not a bundle, or the bundle is damaged.
            IntegrityError: a file is damaged, or the bundle was replaced during the call. After a replacement, call
                again.
            SignatureError: the bundle is not signed with any of `public_keys`.
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
        """Load the bundle in `directory` and return a recogniser for it.

        Arguments and errors are those of `from_pretrained`, but `settings` replaces the arguments from `providers` to
        `public_keys`, and a revision is part of `directory` ("org/name@revision"). A `runner` runs the encoder of a
        fixed-shape bundle (`u2moe convert --profile static`) on another device.
        """
        begin = time.perf_counter()
        keys = None if settings is None else settings.public_keys
        bundle = Bundle.open(find_bundle(directory), verify=False, public_keys=keys)
        model = bundle.load(settings, runner=runner)
        duration, providers = time.perf_counter() - begin, ", ".join(model.providers)
        log("info", "%s: loaded in %.2f s on %s, kernels: %s", bundle.path, duration, providers, model.kernels)
        return cls(bundle, model, options, hotwords)

    @property
    def default_endpoint(self) -> EndpointConfig:
        """Endpoint rules of the bundle. They apply if the options have none."""
        return self.bundle.manifest.decoding.endpoint

    def warm_up(self) -> None:
        """Recognise two seconds of noise, so that the first audio is recognised at full speed. Results do not change.

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
        """Create a stream. It recognises one source at a time.

        Args:
            options: decoding options; None: the recogniser's options.
            hotwords: phrases to prefer. None: the recogniser's hotwords. An empty list: no hotwords.
            grammar: allowed phrases, which replace hotwords and language model; see `Grammar`. None: that of `options`.

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
        """Create a stream that decodes like `transcribe`: in segments, and by default with full context.

        To decode several recordings together, feed each to its own stream, finish the streams, and pass them to
        `decode_streams`. Audio stays in memory until it is decoded. Arguments and errors are those of `create_stream`.
        If `chunk_size` is None, the stream uses full context; for a streaming bundle of fixed shape, it uses the
        bundle's chunk size.
        """
        options = self._chosen(options, grammar)
        options = dataclasses.replace(options, endpoint=options.endpoint or self.default_endpoint)
        static_chunk_size = self.model.config.static_chunk_size if self.model.config.streaming else 0
        return self._stream(options, options.chunk_size or static_chunk_size or None, hotwords)

    def decode_streams(self, streams: Sequence[Stream]) -> None:
        """Do all work that is ready: encode every complete chunk, and run the second pass of every finished utterance.

        Streams with the same chunk size and left context are encoded together. If that fails, the batch is halved
        repeatedly until only the faulty streams fail; see `Stream.failure`.

        Raises:
            ProviderError: running a graph failed. Streams that have a `failure` must be reset.
            StreamError: another thread is decoding one of the streams.
            ValueError: one of the streams belongs to another model.
        """
        if not all(stream.state.model is self.model for stream in streams):
            raise ValueError("this stream belongs to another model: decode it with the recogniser that created it")
        self._pipeline.decode([stream.state for stream in dict.fromkeys(streams)])

    def transcribe(  # noqa: PLR0913 - arguments for decoding, for the file and for progress
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

        The recording is cut into segments at pauses in the speech, which limits memory use. `DecodingOptions.endpoint`
        sets the rules for this; by default, the bundle's rules apply. With full context, a recording of up to 30
        seconds is encoded as a whole. A longer one is cut at pauses before it is encoded (`EndpointConfig.pause`).

        If a file is damaged after some seconds of audio, the transcript ends there. `Transcript.complete` is then
        False, and `Transcript.error` states the reason.

        Args:
            audio: an audio file, as a path, bytes or a binary file object; `RawAudio`; an array of samples of one
                channel, float32 in [-1, 1] or int16; or an iterator over float32 buffers at the model's sample rate.
            sample_rate: sample rate of an array in Hz; only for arrays. None: the model's sample rate.
            options: decoding options; None: the recogniser's options. If `chunk_size` is None, a streaming bundle of
                fixed shape uses its own chunk size; other bundles use full context.
            hotwords: phrases to prefer. None: the recogniser's hotwords. An empty list: no hotwords.
            grammar: allowed phrases, which replace hotwords and language model; see `Grammar`. None: that of `options`.
            vad: voice activity detector. Each stretch of speech is recognised separately, and cut at endpoints.
            on_progress: called from time to time with the seconds of the recording processed so far.
            channel: index of the channel of a file, 0 for the left one. None: the average of all channels.
            track: index of the audio track of a media file, from 0. None: the default track.

        Raises:
            AudioError: none of the audio can be read or used.
            StreamError: the bundle does not support `options`.
            GrammarError: the grammar cannot be read or used.
            ValueError: the vocabulary cannot spell a hotword.
        """
        samples = samples_of(audio, self._rate, sample_rate, channel, track)
        stream = self.create_recording_stream(options, hotwords=hotwords, grammar=grammar)
        reader = RecordingReader(samples, self._rate, on_progress)
        return transcript_of(list(recognize(self.decode_streams, stream, reader, vad)), reader.duration, reader.error)

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
        """Return an iterator over the segments of `transcribe`. Each is available as soon as it ends.

        Memory use does not depend on the length of the recording. Arguments and errors are those of `transcribe`. The
        call itself raises all errors, except those for damaged audio.

        Raises:
            AudioError: also raised if a file is damaged. The segments before the damage are yielded first.
        """
        samples = samples_of(audio, self._rate, sample_rate, channel, track)
        stream = self.create_recording_stream(options, hotwords=hotwords, grammar=grammar)
        reader = RecordingReader(samples, self._rate, on_progress)
        return until_damage(reader, recognize(self.decode_streams, stream, reader, vad))

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

        The result is the most probable alignment of the whole text with the whole recording. The recording is encoded
        as in `transcribe`. For the other arguments and errors, see `transcribe`. Memory use is limited: long recordings
        use a temporary file.

        `text` must contain everything that is said. Sentences end at ".", "!", "?" and line ends. Punctuation and
        letter case are ignored. Numbers must be words. `Alignment.misfits` has the words scored below `min_score`.

        Raises:
            AudioError: also raised if a file is damaged after some seconds of audio.
            AlignmentError: the text has no words or has words outside the vocabulary, no speech is recognised, or the
                recording is too short for the text.
        """
        min_score = checked_number("min_score", min_score, least=0, most=1)
        aligner = TextAligner(checked_text("text", text), self.vocabulary, self.model.config.blank)
        options = checked_options("options", options, self.options)
        options = dataclasses.replace(options, search="ctc_greedy", language_model=None, grammar=None, text_format=None)
        stream = self.create_recording_stream(options, hotwords=())
        reader = RecordingReader(samples_of(audio, self._rate, sample_rate, channel, track), self._rate, on_progress)
        pipeline = Pipeline(self.model, Observer(concluded=lambda _: aligner.advance(stream.state)))
        found = recognize(lambda streams: pipeline.decode([each.state for each in streams]), stream, reader)
        for _ in until_damage(reader, found):
            pass
        return aligner.finish(stream.state, min_score)

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
            formatter_of(options.text_format)  # raises if a required package is not installed

    @property
    def language_model(self) -> LanguageModelOptions | None:
        """Language model that searches use by default; None: no language model."""
        chosen = self.options.language_model or self._words.language_model
        return chosen if isinstance(chosen, LanguageModelOptions) else None

    def _definite(self, options: DecodingOptions, chunk_size: int | None) -> DefiniteOptions:
        """Return `options` with the bundle's defaults for all options that are None."""
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
                raise ValueError(f"hotwords need a prefix beam search or rescoring, but search is {chosen.search!r}")
            context = None
        return Stream(StreamState(self.model, self.vocabulary, chosen, context, self._words.fusion(chosen), graph))
