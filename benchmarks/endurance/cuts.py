"""Is anything lost or heard twice where a long recording was cut? Its pieces against the graphs alone, with no stream.

Each piece is encoded and decoded again, from the recording's samples at its place: where the stream had dropped,
repeated or moved frames, or mixed pieces up, other words would come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import soundfile

from u2moe.runtime import Bundle, DecodingOptions, Model, Recognizer, Result, Stream
from u2moe.runtime.ctc import ctc_prefix_beam_search
from u2moe.runtime.features import Fbank
from u2moe.runtime.rescore import attention_rescoring

if TYPE_CHECKING:
    from u2moe.runtime.context import ContextGraph
    from u2moe.runtime.text import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Piece:
    """An utterance that a stream has ended.

    Attributes:
        window_start: frame of features with which the last window began; `window_len`: its frames of features.
        start: the utterance's first encoder frame; `num_frames`: how many it has.
        text: what was heard; `times`: seconds at which its tokens peak, from the recording's first sample.
    """

    window_start: int
    window_len: int
    start: int
    num_frames: int
    text: str
    times: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """How a recording was cut.

    Attributes:
        num_pieces: utterances, those without words too.
        num_lost: encoder frames that are in none; `num_doubled`: in two.
        num_different: pieces in which something else was heard, or at another time, than the graphs alone hear at their
            place; None where that was not tried.
    """

    num_pieces: int
    num_lost: int
    num_doubled: int
    num_different: int | None = None


class LoggedStream(Stream):
    """A stream that remembers its pieces."""

    def __init__(
        self, model: Model, vocabulary: Vocabulary, options: DecodingOptions, context: ContextGraph | None = None
    ) -> None:
        self.pieces: list[Piece] = []
        self._last_window = (0, 0)
        super().__init__(model, vocabulary, options, context)
        self._rate = model.config.subsampling_rate

    def take_window(self) -> npt.NDArray[np.float32] | None:
        """The next chunk."""
        start = self.num_encoder_frames
        window = super().take_window()
        if window is not None:
            self._last_window = (start * self._rate, len(window))
        return window

    def conclude(self, result: Result) -> None:
        """End the utterance at hand."""
        if self.num_segment_frames:
            start, length = self._last_window
            self.pieces.append(
                Piece(
                    window_start=start, window_len=length, start=self.segment_start,
                    num_frames=self.num_segment_frames, text=result.text, times=tuple(result.times),
                )
            )  # fmt: skip
        super().conclude(result)


class LoggedRecognizer(Recognizer):
    """A recogniser whose streams remember their pieces; `stream` is the last of them."""

    stream: LoggedStream

    def __init__(self, bundle: Bundle, options: DecodingOptions | None = None) -> None:
        super().__init__(bundle, bundle.load(), options)

    def _stream(self, *arguments: Any) -> Stream:
        plain = super()._stream(*arguments)
        self.stream = LoggedStream(self.model, self.vocabulary, plain.options, plain.context)
        return self.stream


def cuts_of(recognizer: Recognizer, pieces: Sequence[Piece], num_samples: int, file: Path | None = None) -> Cuts:
    """Judge the pieces of a recording.

    Args:
        recognizer: whose stream heard them.
        pieces: in order.
        num_samples: samples of the recording at the model's rate.
        file: the recording, at that rate, to hear its pieces again; only those of full context can be.
    """
    config = recognizer.model.config
    features = _num_features(recognizer, num_samples)
    position = num_lost = num_doubled = 0
    for piece in pieces:
        num_lost += max(piece.start - position, 0)
        num_doubled += max(position - piece.start, 0)
        position = piece.start + piece.num_frames
    num_lost += max((features - config.window) // config.subsampling_rate + 1 - position, 0)
    different = None if file is None else sum(_hear_again(recognizer, piece, file) != piece for piece in pieces)
    return Cuts(num_pieces=len(pieces), num_lost=num_lost, num_doubled=num_doubled, num_different=different)


def _num_features(recognizer: Recognizer, num_samples: int) -> int:
    length, shift = _frame_samples(recognizer)
    return max((num_samples - length) // shift + 1, 0)


def _frame_samples(recognizer: Recognizer) -> tuple[int, int]:
    """Samples of a frame of features, and from one to the next."""
    config = recognizer.bundle.manifest.features
    per_ms = config.sample_rate / 1000
    return round(config.frame_length_ms * per_ms), round(config.frame_shift_ms * per_ms)


def _hear_again(recognizer: Recognizer, piece: Piece, file: Path) -> Piece:
    """A piece as it should be, by features, encoder, search and rescoring of its samples alone."""
    length, shift = _frame_samples(recognizer)
    model, manifest = recognizer.model, recognizer.bundle.manifest
    with soundfile.SoundFile(file) as source:
        source.seek(piece.window_start * shift)
        samples = source.read((piece.window_len - 1) * shift + length, dtype="float32")
    fbank = Fbank(manifest.features)
    features = np.concatenate([fbank.accept(samples), fbank.finish()])
    begin = piece.start - piece.window_start // model.config.subsampling_rate
    output = model.encode(features)[begin : begin + piece.num_frames]
    if not len(output):
        return replace(piece, text="", times=())  # a piece of what is not in its window
    hypotheses = ctc_prefix_beam_search(model.ctc(output), recognizer.options.beam_size, model.config.blank)
    if model.has_decoder:
        scores = model.token_scores(output, [hypothesis.tokens for hypothesis in hypotheses])
        weights = manifest.decoding
        ranked = attention_rescoring(hypotheses, scores, weights.ctc_weight, weights.reverse_weight)
        hypotheses = [item.hypothesis for item in ranked]
    best, frame_s = hypotheses[0], model.config.subsampling_rate * manifest.features.frame_shift_ms / 1000
    times = tuple(round((piece.start + time) * frame_s, 3) for time in best.times)
    return replace(piece, text=recognizer.vocabulary.text(best.tokens), times=times)
