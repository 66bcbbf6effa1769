"""The graphs of a bundle as functions on arrays: the seam for engineers who compare numbers. No state, no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime.encoder import Encoder, check_chunks
from u2moe.runtime.errors import StreamError
from u2moe.runtime.session import DEFAULT_PROVIDER, Session, SessionSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import onnxruntime

    from u2moe.runtime.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What the decoders say about n hypotheses, padded to the longest.

    Attributes:
        left: log-probability of each token left to right, that of eos after the last, then zeros: [n, length+1].
        right: the same by the right-to-left decoder, in reading order; None when there is none.
        next: log-probabilities of what follows each hypothesis, left to right: [n, vocab].
    """

    left: npt.NDArray[np.float32]
    right: npt.NDArray[np.float32] | None
    next: npt.NDArray[np.float32]


class Model:
    """Sessions of one bundle. Stateless, and safe to use from several threads at once."""

    def __init__(self, manifest: Manifest, encoder: Session, ctc: Session, decoder: Session | None) -> None:
        self.manifest = manifest
        self.config = manifest.model
        self.encoder = Encoder(encoder, manifest.model)
        self._ctc = ctc
        self._decoder = decoder

    @classmethod
    def load(
        cls,
        folder: Path,
        manifest: Manifest,
        *,
        providers: Sequence[str] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
        num_threads: int | None = None,
        sess_options: onnxruntime.SessionOptions | None = None,
    ) -> Model:
        """Make the sessions; see `Bundle.load`."""
        settings = SessionSettings(
            providers=(DEFAULT_PROVIDER,) if providers is None else tuple(providers),
            provider_options=tuple(provider_options or ()),
            num_threads=num_threads,
            sess_options=sess_options,
        )
        sessions = {
            graph.name: Session(folder / graph.file, graph, manifest, settings) for graph in manifest.model.graphs()
        }
        return cls(manifest, sessions["encoder"], sessions["ctc"], sessions.get("decoder"))

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers of the encoder."""
        return self.encoder.session.providers

    @property
    def has_decoder(self) -> bool:
        """Whether there is a second pass; a CTC-only model has none."""
        return self._decoder is not None

    def encode(
        self, features: npt.ArrayLike, chunk_size: int | None = None, num_left_chunks: int = -1
    ) -> npt.NDArray[np.float32]:
        """Encode one utterance.

        Args:
            features: log-mel filter banks, not normalised, float32 [frames, mel].
            chunk_size: encoder frames per chunk, as a stream would; None: full context. An encoder that was trained
                with one static chunk size knows no full context: None then means that chunk size, as in WeNet.
            num_left_chunks: chunks of left context; -1: all.

        Returns:
            float32 [time, dim]; no time when there are fewer frames than one encoder frame needs.

        Raises:
            StreamError: chunks from a bundle that cannot stream.
        """
        frames = self._matrix("features", features, self.config.feature_size)
        if chunk_size is None and self.config.static_chunk_size > 0 and self.config.streaming:
            chunk_size = self.config.static_chunk_size
        if chunk_size is None:
            return self.encoder.whole(frames)
        check_chunks(self.config, chunk_size, num_left_chunks)
        return self.encoder.chunked(frames, chunk_size, num_left_chunks)

    def ctc(self, encoder_out: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Log-probabilities [time, vocab] of encoder output [time, dim]."""
        output = self._matrix("encoder_out", encoder_out, self.config.output_size)
        if len(output) == 0:
            return np.zeros((0, self.config.vocab_size), np.float32)
        result: npt.NDArray[np.float32] = self._ctc.run({"encoder_out": output[np.newaxis]})["log_probs"][0]
        return result

    def rescore(
        self, encoder_out: npt.ArrayLike, hypotheses: Sequence[Sequence[int]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Score hypotheses with the attention decoders.

        Args:
            encoder_out: encoder output [time, dim], at least one frame.
            hypotheses: token ids without sos and eos; they may be empty.

        Returns:
            Sums of log-probabilities, eos included, by the left-to-right and by the right-to-left decoder, each [n].
            The second are zeros when the model has no right-to-left decoder, as in WeNet.

        Raises:
            StreamError: the model has no decoder.
        """
        scores = self.token_scores(encoder_out, hypotheses)
        left = scores.left.sum(axis=1, dtype=np.float64).astype(np.float32)
        if scores.right is None:
            return left, np.zeros_like(left)
        return left, scores.right.sum(axis=1, dtype=np.float64).astype(np.float32)

    def token_scores(self, encoder_out: npt.ArrayLike, hypotheses: Sequence[Sequence[int]]) -> TokenScores:
        """The same token by token."""
        if self._decoder is None:
            raise StreamError("this bundle has no attention decoder (CTC only): use search 'ctc_prefix_beam'")
        output = self._matrix("encoder_out", encoder_out, self.config.output_size)
        if len(output) == 0:
            raise ValueError("encoder_out has no frames: there is nothing to attend to")
        # One column at least: a Reshape cannot tell an axis of size 0 from "as in the input".
        num, length = len(hypotheses), max((len(tokens) for tokens in hypotheses), default=0) or 1
        if num == 0:
            empty = np.zeros((0, 1), np.float32)
            right = empty if self.config.bidirectional else None
            return TokenScores(left=empty, right=right, next=np.zeros((0, self.config.vocab_size), np.float32))
        hyps = np.full((1, num, length), self.config.eos, np.int64)
        for row, tokens in zip(hyps[0], hypotheses, strict=True):
            row[: len(tokens)] = tokens
        if not 0 <= hyps.min() <= hyps.max() < self.config.vocab_size:
            raise ValueError(f"hypotheses hold token ids outside 0..{self.config.vocab_size - 1}")
        result = self._decoder.run(
            {
                "hyps": hyps,
                "hyps_lens": np.array([[len(tokens) for tokens in hypotheses]], np.int64),
                "encoder_out": output[np.newaxis],
                "encoder_lens": np.array([len(output)], np.int64),
            }
        )
        right = result["r_score"][0] if self.config.bidirectional else None
        return TokenScores(left=result["score"][0], right=right, next=result["next_log_probs"][0])

    @staticmethod
    def _matrix(name: str, value: npt.ArrayLike, width: int) -> npt.NDArray[np.float32]:
        array = np.ascontiguousarray(value, np.float32)
        if array.ndim != 2 or array.shape[1] != width:
            raise ValueError(f"{name} must be [time, {width}], got shape {array.shape}")
        return array
