"""The public face: a bundle that recognises files, arrays and streams."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from u2moe.runtime.alignment import align, find_cut
from u2moe.runtime.audio import convert, read_blocks
from u2moe.runtime.bundle import Bundle
from u2moe.runtime.caches import join_rows, split_rows
from u2moe.runtime.confidence import calibrated, word_confidence
from u2moe.runtime.context import ContextGraph
from u2moe.runtime.decoding import STREAM_CHUNK_SIZE, DecodingOptions, Search
from u2moe.runtime.encoder import check_chunks, required_cache_size
from u2moe.runtime.endpoint import EndpointConfig
from u2moe.runtime.errors import BundleError, StreamError
from u2moe.runtime.features import Fbank
from u2moe.runtime.manifest import MANIFEST_FILE
from u2moe.runtime.pauses import end_at_pauses
from u2moe.runtime.recording import Blocks, recognize
from u2moe.runtime.rescore import attention_beam_search, attention_rescoring
from u2moe.runtime.result import Alternative, Result, Transcript, WordResult, token_spans, words_of
from u2moe.runtime.stream import Stream

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnxruntime

    from u2moe.runtime.ctc import Hypothesis
    from u2moe.runtime.model import Model, TokenScores
    from u2moe.runtime.rescore import Rescored
    from u2moe.runtime.vad import VoiceActivityDetector

Hotwords = Iterable[str | tuple[str, float]]
"""Phrases, each alone or with its weight."""

_MAX_BATCH = 32
"""Chunks that go through the encoder together: beyond, a larger batch saves no time but takes memory."""

DEMO_FOLDER = Path(__file__).parent / "demo"
"""The demo model that comes with the package, and `clips/` to try it on."""


class Recognizer:
    """Recognises speech with the model of a bundle.

    Its model holds no state: any number of streams share it, and any thread may use it, each with its own streams.

    Raises:
        StreamError: `options` ask for what the bundle cannot do.
        BundleError: the bundle's features cannot be computed.
    """

    def __init__(
        self,
        bundle: Bundle,
        model: Model,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
    ) -> None:
        self.bundle = bundle
        self.model = model
        self.vocabulary = bundle.vocabulary
        self.options = options or DecodingOptions()
        self._check(self.options)
        self.context = self._context(hotwords)
        Fbank(bundle.manifest.features)  # refuses what cannot be computed now, not with the first sample

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str] | None = None,
        *,
        providers: Sequence[str] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
        num_threads: int | None = None,
        sess_options: onnxruntime.SessionOptions | None = None,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
    ) -> Recognizer:
        """A recogniser of the bundle in `directory`; None: the demo model.

        Args:
            directory: folder of a bundle.
            providers: execution providers in order of preference, never silently replaced; None: the CPU.
            provider_options: one mapping for each provider.
            num_threads: threads within one operator; None: 1.
            sess_options: of onnxruntime, used as they are.
            options: how to decode.
            hotwords: phrases to prefer, each with an optional weight; see `ContextGraph`.

        Raises:
            BundleError: no bundle there, or a damaged one.
            ProviderError: a provider that is not installed or did not start.
        """
        if directory is None and not (DEMO_FOLDER / MANIFEST_FILE).is_file():
            raise BundleError(f"{DEMO_FOLDER}: this installation holds no demo model; name the folder of a bundle")
        bundle = Bundle.open(DEMO_FOLDER if directory is None else directory)
        model = bundle.load(
            providers=providers, provider_options=provider_options, num_threads=num_threads, sess_options=sess_options
        )
        return cls(bundle, model, options, hotwords)

    def warm_up(self) -> None:
        """Recognise two seconds of noise, so that the first sound takes no longer than what follows. Changes no result.

        Raises:
            ProviderError: running a graph failed.
        """
        rate = self.bundle.manifest.features.sample_rate
        options = dataclasses.replace(self.options, endpoint=None)
        stream = self.create_stream(options) if self.model.config.streaming else self._stream(options, None, None)
        stream.accept_waveform(rate, np.random.default_rng(0).normal(0, 0.1, 2 * rate))
        stream.input_finished()
        self.decode_streams([stream])

    def create_stream(
        self, options: DecodingOptions | None = None, *, hotwords: Hotwords | ContextGraph | None = None
    ) -> Stream:
        """A stream for one source at a time.

        Args:
            options: how to decode; None: the recogniser's.
            hotwords: phrases to prefer; None: the recogniser's.

        Raises:
            StreamError: the bundle cannot stream, or not decode as `options` ask.
            ValueError: hotwords that the vocabulary cannot write.
        """
        options = options or self.options
        chunk_size = options.chunk_size or self.model.config.static_chunk_size or STREAM_CHUNK_SIZE
        check_chunks(self.model.config, chunk_size, options.num_left_chunks)
        return self._stream(options, chunk_size, hotwords)

    def decode_streams(self, streams: Sequence[Stream]) -> None:
        """Do all the work that is ready: every whole chunk, and the second pass of every utterance that has ended.

        Chunks of streams of the same chunk size and left context go through the encoder together.

        Raises:
            ProviderError: running a graph failed; of the streams given, those that were decoded must be reset.
            StreamError: another thread is decoding one of the streams.
        """
        streams = list(dict.fromkeys(streams))
        with contextlib.ExitStack() as claims:
            for stream in streams:
                claims.enter_context(stream.decoding())
            while True:
                self._settle(streams)
                windows = ((stream, stream.take_window()) for stream in streams)
                chunks = [(stream, window) for stream, window in windows if window is not None]
                if not chunks:
                    return
                for batch in _batches(chunks):
                    self._decode_batch(batch)

    def transcribe(
        self,
        audio: str | os.PathLike[str] | npt.ArrayLike,
        sample_rate: float | None = None,
        *,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
        vad: VoiceActivityDetector | None = None,
        on_progress: Callable[[float], object] | None = None,
    ) -> Transcript:
        """Recognise a recording of any length.

        It is cut into segments where speakers pause (`DecodingOptions.endpoint`, by default the rules of
        `EndpointConfig`), so that memory is bounded. With full context, recordings of up to 30 seconds are encoded at
        once; of longer ones, what is said before and after a pause of half a second apart (`EndpointConfig.pause`).

        A file that is damaged after some seconds of audio is recognised up to there: the transcript is then not
        `complete`, and its `error` says why.

        Args:
            audio: path of an audio file, or samples of one channel (float32 in [-1, 1] or int16).
            sample_rate: of samples, in Hz; None: the model's. Files know theirs.
            options: how to decode; None: the recogniser's. Without `chunk_size` with full context.
            hotwords: phrases to prefer; None: the recogniser's.
            vad: recognises only where it finds speech, each stretch by itself, cut further by the endpoints.
            on_progress: called now and then with the seconds of the recording that are done.

        Raises:
            AudioError: audio of which nothing can be read or used.
            StreamError: the bundle cannot do what `options` ask.
            ValueError: hotwords that the vocabulary cannot write.
        """
        blocks, results = self._recognize(audio, sample_rate, options, hotwords, vad, on_progress)
        segments = list(results)
        return Transcript.of(segments, blocks.duration, blocks.error)

    def segments(
        self,
        audio: str | os.PathLike[str] | npt.ArrayLike,
        sample_rate: float | None = None,
        *,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | ContextGraph | None = None,
        vad: VoiceActivityDetector | None = None,
        on_progress: Callable[[float], object] | None = None,
    ) -> Iterator[Result]:
        """The final results that `transcribe` puts into a transcript, one by one, each as soon as it is found.

        Memory stays flat however long the recording is. Arguments and errors are those of `transcribe`; all but damage
        to the audio is raised by the call itself, before the first segment is asked for.

        Raises:
            AudioError: also for a file that is damaged after some seconds of audio, once all segments before have been
                given.
        """
        blocks, results = self._recognize(audio, sample_rate, options, hotwords, vad, on_progress)
        return self._until_damage(blocks, results)

    def _recognize(
        self,
        audio: str | os.PathLike[str] | npt.ArrayLike,
        sample_rate: float | None,
        options: DecodingOptions | None,
        hotwords: Hotwords | ContextGraph | None,
        vad: VoiceActivityDetector | None,
        on_progress: Callable[[float], object] | None,
    ) -> tuple[Blocks, Iterator[Result]]:
        """Blocks of a recording, and the results that come as these are read."""
        options = options or self.options
        options = dataclasses.replace(options, endpoint=options.endpoint or EndpointConfig())
        chunk_size = options.chunk_size
        if chunk_size is None and self.model.config.streaming:
            chunk_size = self.model.config.static_chunk_size or None
        stream = self._stream(options, chunk_size, hotwords)
        model_rate = self.bundle.manifest.features.sample_rate
        if isinstance(audio, str | os.PathLike):
            if sample_rate is not None:
                raise ValueError("sample_rate is for arrays: a file knows its own")
            samples = read_blocks(audio, model_rate)
        else:
            samples = convert(audio, model_rate if sample_rate is None else sample_rate, model_rate)
        blocks = Blocks(samples, model_rate, on_progress)
        return blocks, recognize(self, stream, blocks, vad)

    @staticmethod
    def _until_damage(blocks: Blocks, results: Iterator[Result]) -> Iterator[Result]:
        yield from results
        if blocks.error is not None:
            raise blocks.error

    def _check(self, options: DecodingOptions) -> None:
        if options.search in ("attention_rescoring", "attention") and not self.model.has_decoder:
            raise StreamError(f"search {options.search!r} needs a decoder, and this bundle has none (CTC only)")
        if options.chunk_size is not None:
            check_chunks(self.model.config, options.chunk_size, options.num_left_chunks)

    def _context(self, hotwords: Hotwords | ContextGraph | None) -> ContextGraph | None:
        if hotwords is None or isinstance(hotwords, ContextGraph):
            return hotwords
        return ContextGraph(hotwords, self.vocabulary)

    def _stream(
        self, options: DecodingOptions, chunk_size: int | None, hotwords: Hotwords | ContextGraph | None
    ) -> Stream:
        self._check(options)
        default: Search = "attention_rescoring" if self.model.has_decoder else "ctc_prefix_beam"
        chosen = dataclasses.replace(options, search=options.search or default, chunk_size=chunk_size)
        context = self._context(hotwords) or self.context
        if context is not None and chosen.search in ("ctc_greedy", "attention"):
            raise ValueError(f"hotwords need a prefix beam search or rescoring, search is {chosen.search!r}")
        return Stream(self.model, self.vocabulary, chosen, context)

    def _decode_batch(self, chunks: list[tuple[Stream, npt.NDArray[np.float32]]]) -> None:
        """Take one chunk of each stream through encoder and CTC."""
        encoder, options = self.model.encoder, chunks[0][0].options
        lengths = np.array([len(window) for _, window in chunks])
        features = np.zeros((len(chunks), lengths.max(), chunks[0][1].shape[1]), np.float32)
        for row, (_, window) in zip(features, chunks, strict=True):
            row[: len(window)] = window
        if options.chunk_size is None:
            caches, required = encoder.start(len(chunks)), 0
        else:
            caches = join_rows([stream.caches for stream, _ in chunks])
            required = required_cache_size(options.chunk_size, options.num_left_chunks)
        output, following = encoder.step(features, caches, required_cache_size=required, chunk_lens=lengths)
        num_frames = (lengths - self.model.config.window) // self.model.config.subsampling_rate + 1
        outputs = [row[:num] for row, num in zip(output, num_frames.tolist(), strict=True)]
        log_probs = self.model.ctc(np.concatenate(outputs))
        num_cached = [stream.caches.num_cached + len(own) for (stream, _), own in zip(chunks, outputs, strict=True)]
        rows = split_rows(following, [min(num, required) if required >= 0 else num for num in num_cached])
        start = 0
        for (stream, _), own, row in zip(chunks, outputs, rows, strict=True):
            stream.advance(own.copy(), log_probs[start : start + len(own)], row)
            start += len(own)

    def _settle(self, streams: Sequence[Stream]) -> None:
        """The second pass of the utterances that have ended."""
        while ended := [stream for stream in streams if stream.awaits_result]:
            for stream in ended:
                if stream.is_cut:
                    self._cut(stream)
            self._conclude(ended)
        for stream in streams:
            if not stream.ends_with_window:
                continue
            # Full context: what is not known to end is encoded again with what follows, unless that is most of it.
            if 2 * stream.num_segment_frames > stream.num_window_frames:
                self._cut(stream)
                self._conclude([stream])
            stream.give_back()

    def _cut(self, stream: Stream) -> None:
        """End the utterance at hand between two of its words, so that none is cut, if there are two."""
        log_probs = self.model.ctc(stream.encoder_out())
        best = stream.first_pass()[0]
        num_frames = find_cut(self.vocabulary, best.tokens, log_probs, self.model.config.blank)
        if num_frames is not None:
            stream.shorten(num_frames, log_probs)

    def _conclude(self, streams: Sequence[Stream]) -> None:
        """Give each stream the final result of its utterance at hand, whose chunks are decoded."""
        outputs = [stream.encoder_out() for stream in streams]
        first = [stream.end_first_pass() for stream in streams]
        rescored = [
            index
            for index, stream in enumerate(streams)
            if stream.options.search == "attention_rescoring" and len(outputs[index])
        ]
        utterances = [(outputs[index], [hypothesis.tokens for hypothesis in first[index]]) for index in rescored]
        scores = self.model.token_scores_of(utterances) if utterances else []
        second = {
            index: self._rescored(streams[index].options, first[index], found)
            for index, found in zip(rescored, scores, strict=True)
        }
        for index, stream in enumerate(streams):
            if index in second:
                result = self._result(stream, [item.hypothesis for item in second[index]], second[index])
            elif stream.options.search == "attention" and len(outputs[index]):
                result = self._result(stream, self._attention_search(outputs[index], stream.options))
            else:
                result = self._result(stream, first[index])
            stream.conclude(result)

    def _rescored(
        self, options: DecodingOptions, hypotheses: Sequence[Hypothesis], scores: TokenScores
    ) -> list[Rescored]:
        """Hypotheses with both passes' scores, by the weights of the options, or of the bundle."""
        defaults = self.bundle.manifest.decoding
        return attention_rescoring(
            hypotheses,
            scores,
            defaults.ctc_weight if options.ctc_weight is None else options.ctc_weight,
            defaults.reverse_weight if options.reverse_weight is None else options.reverse_weight,
        )

    def _attention_search(self, encoder_out: npt.NDArray[np.float32], options: DecodingOptions) -> list[Hypothesis]:
        """Hypotheses of the decoder alone, the best of them with the times that the CTC head gives its tokens."""
        config = self.model.config
        found = attention_beam_search(
            lambda tokens: self.model.token_scores(encoder_out, tokens).next,
            len(encoder_out),
            beam_size=options.beam_size,
            eos=config.eos,
            length_penalty=options.length_penalty,
            count_sos=config.sos != config.eos,
        )
        aligned = None
        if not {config.blank, config.sos, config.eos} & set(found[0].tokens):
            aligned = align(self.model.ctc(encoder_out), found[0].tokens, config.blank)
        if aligned:
            times, probabilities = [token.peak for token in aligned], [token.confidence for token in aligned]
            found[0] = dataclasses.replace(found[0], times=times, probabilities=probabilities)
        return found

    def _result(self, stream: Stream, hypotheses: list[Hypothesis], rescored: list[Rescored] | None = None) -> Result:
        """Text, words and alternatives of hypotheses, best first, with what the second pass says of each."""
        if not hypotheses:
            return Result(text="", is_final=True, segment=stream.segment)
        best, frame_s = hypotheses[0], stream.frame_s
        probabilities = rescored[0].token_probabilities if rescored else best.probabilities
        words = self._words(stream, best, probabilities) if best.times else []
        alternatives = [
            Alternative(
                text=self.vocabulary.text(hypothesis.tokens),
                tokens=hypothesis.tokens,
                score=rescored[i].score if rescored else hypothesis.score,
                ctc_score=hypothesis.score if stream.options.search != "attention" else None,
                attention_score=rescored[i].attention_score if rescored else None,
            )
            for i, hypothesis in enumerate(hypotheses[: stream.options.beam_size])  # hotwords may have brought more
        ]
        return Result(
            text=alternatives[0].text,
            is_final=True,
            segment=stream.segment,
            start=words[0].start if words else 0.0,
            end=words[-1].end if words else 0.0,
            tokens=best.tokens,
            times=[round((stream.segment_start + time) * frame_s, 3) for time in best.times],
            words=words,
            confidence=sum(word.confidence or 0.0 for word in words) / len(words) if words else None,
            score=alternatives[0].score,
            nbest=alternatives,
        )

    def _words(self, stream: Stream, best: Hypothesis, probabilities: Sequence[float]) -> list[WordResult]:
        """Words of a hypothesis with times, those where they meet sharpened by the pauses between them."""
        frame_s, words = stream.frame_s, self.vocabulary.words(best.tokens)
        begin = stream.segment_start * frame_s
        spans = token_spans(best.times, frame_s, stream.num_segment_frames * frame_s)
        meeting = [(begin + spans[word.begin][0], begin + spans[word.end - 1][1]) for word in words]
        peaks = [(begin + best.times[word.begin] * frame_s, begin + best.times[word.end - 1] * frame_s)
                 for word in words]  # fmt: skip
        confidences = [
            calibrated(word_confidence(probabilities[word.begin : word.end]), self.bundle.manifest.calibration)
            for word in words
        ]
        return words_of(words, end_at_pauses(meeting, peaks, stream.pauses()), confidences)


def _batches(
    chunks: list[tuple[Stream, npt.NDArray[np.float32]]],
) -> Iterator[list[tuple[Stream, npt.NDArray[np.float32]]]]:
    """Chunks that may share an encoder call: of the same chunk size and left context, and not too many."""
    groups: dict[tuple[int | None, int], list[tuple[Stream, npt.NDArray[np.float32]]]] = {}
    for stream, window in chunks:
        key = (stream.options.chunk_size, stream.options.num_left_chunks)
        groups.setdefault(key, []).append((stream, window))
    for (chunk_size, _), group in groups.items():
        size = 1 if chunk_size is None else _MAX_BATCH
        for start in range(0, len(group), size):
            yield group[start : start + size]
