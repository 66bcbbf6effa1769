"""The public face: a bundle that recognises files, arrays and streams."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u2moe.runtime.audio import read_blocks
from u2moe.runtime.bundle import Bundle
from u2moe.runtime.decoding import STREAM_CHUNK_SIZE, DecodingOptions, Search
from u2moe.runtime.encoder import check_chunks, required_cache_size
from u2moe.runtime.errors import BundleError, StreamError
from u2moe.runtime.features import Fbank
from u2moe.runtime.manifest import MANIFEST_FILE
from u2moe.runtime.rescore import attention_beam_search, attention_rescoring
from u2moe.runtime.result import Alternative, Result, Transcript, token_spans, words_of
from u2moe.runtime.stream import Stream

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnxruntime

    from u2moe.runtime.ctc import Hypothesis
    from u2moe.runtime.model import Model
    from u2moe.runtime.rescore import Rescored

DEMO_FOLDER = Path(__file__).parent / "demo"
"""The demo model that comes with the package, and `clips/` to try it on."""


class Recognizer:
    """Recognises speech with the model of a bundle.

    Its model holds no state: any number of streams share it, and any thread may use it, each with its own streams.

    Raises:
        StreamError: `options` ask for what the bundle cannot do.
        BundleError: the bundle's features cannot be computed.
    """

    def __init__(self, bundle: Bundle, model: Model, options: DecodingOptions | None = None) -> None:
        self.bundle = bundle
        self.model = model
        self.vocabulary = bundle.vocabulary
        self.options = options or DecodingOptions()
        self._check(self.options)
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
    ) -> Recognizer:
        """A recogniser of the bundle in `directory`; None: the demo model.

        Args:
            directory: folder of a bundle.
            providers: execution providers in order of preference, never silently replaced; None: the CPU.
            provider_options: one mapping for each provider.
            num_threads: threads within one operator; None: 1.
            sess_options: of onnxruntime, used as they are.
            options: how to decode.

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
        return cls(bundle, model, options)

    def create_stream(self, options: DecodingOptions | None = None) -> Stream:
        """A stream for one utterance at a time.

        Raises:
            StreamError: the bundle cannot stream, or not decode as `options` (None: the recogniser's) ask.
        """
        options = options or self.options
        chunk_size = options.chunk_size or self.model.config.static_chunk_size or STREAM_CHUNK_SIZE
        check_chunks(self.model.config, chunk_size, options.num_left_chunks)
        return self._stream(options, chunk_size)

    def decode_streams(self, streams: Sequence[Stream]) -> None:
        """Do all the work that is ready: every whole chunk, and the second pass of every stream that is finished."""
        while any(self._decode_chunk(stream) for stream in streams):
            pass
        for stream in streams:
            if stream.awaits_final:
                stream.conclude(self._conclude(stream))

    def transcribe(
        self,
        audio: str | os.PathLike[str] | npt.ArrayLike,
        sample_rate: float | None = None,
        *,
        options: DecodingOptions | None = None,
    ) -> Transcript:
        """Recognise a recording.

        Args:
            audio: path of an audio file, or samples of one channel (float32 in [-1, 1] or int16).
            sample_rate: of samples, in Hz; None: the model's. Files know theirs.
            options: how to decode; None: the recogniser's. Without `chunk_size` with full context, which takes memory
                by the square of the length: name a chunk size for recordings of many minutes.

        Raises:
            AudioError: audio that cannot be read or used.
            StreamError: the bundle cannot do what `options` ask.
        """
        options = options or self.options
        chunk_size = options.chunk_size
        if chunk_size is None and self.model.config.streaming:
            chunk_size = self.model.config.static_chunk_size or None
        stream = self._stream(options, chunk_size)
        model_rate = self.bundle.manifest.features.sample_rate
        if isinstance(audio, str | os.PathLike):
            if sample_rate is not None:
                raise ValueError("sample_rate is for arrays: a file knows its own")
            for block in read_blocks(audio, model_rate):
                stream.accept_waveform(model_rate, block)
                self.decode_streams([stream])
        else:
            stream.accept_waveform(model_rate if sample_rate is None else sample_rate, audio)
        stream.input_finished()
        self.decode_streams([stream])
        result = stream.get_result()
        return Transcript(text=result.text, duration=stream.duration, segments=[result] if result.text else [])

    def _check(self, options: DecodingOptions) -> None:
        if options.search in ("attention_rescoring", "attention") and not self.model.has_decoder:
            raise StreamError(f"search {options.search!r} needs a decoder, and this bundle has none (CTC only)")
        if options.chunk_size is not None:
            check_chunks(self.model.config, options.chunk_size, options.num_left_chunks)

    def _stream(self, options: DecodingOptions, chunk_size: int | None) -> Stream:
        self._check(options)
        default: Search = "attention_rescoring" if self.model.has_decoder else "ctc_prefix_beam"
        chosen = dataclasses.replace(options, search=options.search or default, chunk_size=chunk_size)
        return Stream(self.model, self.vocabulary, chosen)

    def _decode_chunk(self, stream: Stream) -> bool:
        """Take one chunk of a stream through encoder and CTC; False when none is ready."""
        window = stream.take_window()
        if window is None:
            return False
        options = stream.options
        required = 0 if options.chunk_size is None else required_cache_size(options.chunk_size, options.num_left_chunks)
        output, caches = self.model.encoder.step(window[None], stream.caches, required_cache_size=required)
        stream.advance(output[0], self.model.ctc(output[0]), caches)
        return True

    def _conclude(self, stream: Stream) -> Result:
        """The final result of a stream whose chunks are decoded."""
        options = stream.options
        encoder_out = stream.encoder_out()
        hypotheses = stream.first_pass()
        if options.search == "attention" and len(encoder_out):
            return self._result(stream, self._attention_search(encoder_out, options))
        if options.search != "attention_rescoring" or not len(encoder_out):
            return self._result(stream, hypotheses)
        defaults = self.bundle.manifest.decoding
        rescored = attention_rescoring(
            hypotheses,
            self.model.token_scores(encoder_out, [hypothesis.tokens for hypothesis in hypotheses]),
            defaults.ctc_weight if options.ctc_weight is None else options.ctc_weight,
            defaults.reverse_weight if options.reverse_weight is None else options.reverse_weight,
        )
        return self._result(stream, [item.hypothesis for item in rescored], rescored)

    def _attention_search(self, encoder_out: npt.NDArray[np.float32], options: DecodingOptions) -> list[Hypothesis]:
        config = self.model.config
        return attention_beam_search(
            lambda tokens: self.model.token_scores(encoder_out, tokens).next,
            len(encoder_out),
            beam_size=options.beam_size,
            eos=config.eos,
            length_penalty=options.length_penalty,
            count_sos=config.sos != config.eos,
        )

    def _result(self, stream: Stream, hypotheses: list[Hypothesis], rescored: list[Rescored] | None = None) -> Result:
        """Text, words and alternatives of hypotheses, best first, with what the second pass says of each."""
        options = stream.options
        if not hypotheses:
            return Result(text="", is_final=True)
        best = hypotheses[0]
        spans = token_spans(best.times, stream.frame_s, stream.num_encoder_frames * stream.frame_s)
        second = rescored[0] if rescored else None
        confidences = second.token_confidences if second else None
        words = words_of(self.vocabulary, best.tokens, spans, confidences) if spans else []
        alternatives = [
            Alternative(
                text=self.vocabulary.text(hypothesis.tokens),
                tokens=hypothesis.tokens,
                score=rescored[i].score if rescored else hypothesis.score,
                ctc_score=hypothesis.score if options.search != "attention" else None,
                attention_score=rescored[i].attention_score if rescored else None,
            )
            for i, hypothesis in enumerate(hypotheses)
        ]
        return Result(
            text=alternatives[0].text,
            is_final=True,
            start=words[0].start if words else 0.0,
            end=words[-1].end if words else 0.0,
            tokens=best.tokens,
            times=[round(time * stream.frame_s, 3) for time in best.times],
            words=words,
            confidence=second.confidence if second else None,
            score=alternatives[0].score,
            nbest=alternatives,
        )
