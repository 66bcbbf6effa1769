"""The graphs of a bundle as stateless functions on arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.contract import Graph
from u2moe.runtime.bundle.files import BundleFiles
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.errors import ProviderError, StreamError
from u2moe.runtime.model.device import DeviceArray, Value, joined
from u2moe.runtime.model.encoder import Encoder, check_chunks
from u2moe.runtime.model.native import Kernels, of_graph
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.model.static_encoder import Runner, StaticEncoder

Utterance = tuple["npt.ArrayLike | DeviceArray", "Sequence[Sequence[int]]"]
"""Encoder output [time, dim] of an utterance, and hypotheses to score."""

_MOST_TOKENS = 512  # Limit on the tokens of a decoder call, including padding. Larger calls are not faster per token
_MOST_PAIRS = 1 << 22  # Limit on pairs of token and frame, or of two tokens, in a decoder call: attention stores them
_MOST_LOG_PROB = 1e-2  # Largest accepted log-probability. Low precision may round log-probabilities to more than 0
_LEAST_ALIKE = 0.85  # Utterances share a decoder call if each has this fraction of the longest. This limits padding


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Log-probabilities from the decoders for n hypotheses, padded to the longest."""

    left: npt.NDArray[np.float32]  # of each token and then of eos, left to right, padded with zeros [n, length+1]
    right: npt.NDArray[np.float32] | None  # the same from right to left, in reading order; None without that decoder
    next: npt.NDArray[np.float32]  # of the token after each hypothesis, left to right [n, vocab]


class Model:
    """The sessions of a bundle. Stateless and thread-safe.

    Attributes:
        search_library: native library that performs the first pass; None: Python performs it.
    """

    def __init__(
        self,
        manifest: Manifest,
        encoder: Session | StaticEncoder,
        ctc: Session,
        decoder: Session | None,
        *,
        search_library: Path | None = None,
    ) -> None:
        self.search_library = search_library
        self.manifest = manifest
        self.config = manifest.model
        self.encoder = encoder if isinstance(encoder, StaticEncoder) else Encoder(encoder, manifest.model)
        self._ctc = ctc
        self._decoder = decoder

    @classmethod
    def load(
        cls,
        files: BundleFiles,
        manifest: Manifest,
        settings: SessionSettings | None = None,
        runner: Runner | None = None,
        create: Callable[..., Session] = Session,
    ) -> Model:
        """Load a model; see `Bundle.load`. `create` creates its sessions and takes the arguments of `Session`."""
        settings, config = settings or SessionSettings(), manifest.model

        def session(graph: Graph, settings: SessionSettings) -> Session:
            return create(files.folder / graph.file, graph, manifest, settings, files=files)

        first, *rest = config.graphs()
        encoder: Session | StaticEncoder
        if config.static is not None:
            encoder = StaticEncoder(runner or session(first, settings), config, config.static, files)
            # Settings for a device apply only to the first graph, the only one that is compiled for the device.
            settings = replace(settings, providers=(DEFAULT_PROVIDER,), provider_options=(), sess_options=None)
        elif runner is None:
            encoder = session(first, settings)
        else:
            raise ValueError(f"runner needs a bundle of fixed shape, which {files.folder} is not")
        sessions = {graph.name: session(graph, settings) for graph in rest}
        ctc, decoder = sessions["ctc"], sessions.get("decoder")
        return cls(manifest, encoder, ctc, decoder, search_library=settings.search_library)

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers of the encoder, or the name of an external runner."""
        return self.encoder.providers

    @property
    def sessions(self) -> list[Session]:
        """Sessions of all graphs, except for an encoder with an external runner."""
        return [*self.encoder.sessions, self._ctc, *([self._decoder] if self._decoder else [])]

    @property
    def kernels(self) -> Kernels:
        """Kernels of the encoder. `refused` contains the functions refused in any graph."""
        kernels = {session.graph.name: session.kernels for session in self.sessions}
        first = self.sessions[0].kernels
        refused = {of_graph(name, graph): why for graph, own in kernels.items() for name, why in own.refused.items()}
        alone = {f"all of {graph}": own.reason for graph, own in kernels.items() if first.native and not own.native}
        return replace(first, refused={**refused, **alone})

    @property
    def has_decoder(self) -> bool:
        """Whether the model has an attention decoder for the second pass. CTC-only models have none."""
        return self._decoder is not None

    def encode(
        self, features: npt.ArrayLike, chunk_size: int | None = None, num_left_chunks: int = -1
    ) -> npt.NDArray[np.float32]:
        """Encode one utterance.

        Args:
            features: log-mel filter banks, not normalised, float32 [frames, mel].
            chunk_size: encoder frames per chunk, as in a stream; None: full context. For an encoder trained with a
                static chunk size, None means that chunk size, as in WeNet.
            num_left_chunks: chunks of left context; -1: all.

        Returns:
            float32 [time, dim]; time is 0 if there are not enough feature frames for one encoder frame.

        Raises:
            StreamError: chunks are requested, but the bundle cannot stream.
        """
        frames = np.asarray(self._matrix("features", features, self.config.feature_size))
        if chunk_size is None and self.config.static_chunk_size > 0 and self.config.streaming:
            chunk_size = self.config.static_chunk_size
        if chunk_size is None:
            return self.encoder.whole(frames)
        check_chunks(self.config, chunk_size, num_left_chunks)
        return self.encoder.chunked(frames, chunk_size, num_left_chunks)

    def ctc(self, encoder_out: npt.ArrayLike | DeviceArray) -> npt.NDArray[np.float32]:
        """Return the log-probabilities [time, vocab] of encoder output [time, dim].

        Raises:
            ProviderError: running the graph failed, or its output is not log-probabilities.
        """
        output = self._matrix("encoder_out", encoder_out, self.config.output_size)
        if len(output) == 0:
            return np.zeros((0, self.config.vocab_size), np.float32)
        result: npt.NDArray[np.float32] = self._ctc.run({"encoder_out": output[np.newaxis]})["log_probs"][0]
        _check_log_probs("ctc", result)
        return result

    def rescore(
        self, encoder_out: npt.ArrayLike, hypotheses: Sequence[Sequence[int]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Score hypotheses with the attention decoders.

        Args:
            encoder_out: encoder output [time, dim], at least one frame.
            hypotheses: token ids without sos and eos; they may be empty.

        Returns:
            Sums of log-probabilities, including eos, from the left-to-right and the right-to-left decoder, each [n].
            Without a right-to-left decoder, the second array is zeros, as in WeNet.

        Raises:
            StreamError: the model has no decoder.
            ProviderError: running the graph failed, or its output is not log-probabilities.
        """
        scores = self.token_scores(encoder_out, hypotheses)
        right = np.zeros_like(scores.left) if scores.right is None else scores.right
        left, right = (each.sum(axis=1, dtype=np.float64).astype(np.float32) for each in (scores.left, right))
        return left, right

    def token_scores(
        self, encoder_out: npt.ArrayLike | DeviceArray, hypotheses: Sequence[Sequence[int]]
    ) -> TokenScores:
        """Return the score of every token of each hypothesis. Arguments and errors are those of `rescore`."""
        return self.token_scores_of([(encoder_out, hypotheses)])[0]

    def token_scores_of(self, utterances: Sequence[Utterance]) -> list[TokenScores]:
        """Return `token_scores` of several utterances. Utterances of similar length share a decoder call."""
        if self._decoder is None:
            raise StreamError("this bundle has no attention decoder (CTC only): use search 'ctc_prefix_beam'")
        outputs = [self._matrix("encoder_out", output, self.config.output_size) for output, _ in utterances]
        if any(len(output) == 0 for output in outputs):
            raise ValueError("encoder_out must have at least one frame, got none")
        empty = np.zeros((0, 1), np.float32)
        right = empty if self.config.bidirectional else None
        nothing = TokenScores(left=empty, right=right, next=np.zeros((0, self.config.vocab_size), np.float32))
        results = [nothing] * len(utterances)
        sizes = [
            _Size(len(hypotheses), max(map(len, hypotheses), default=0) or 1, len(output))
            for output, (_, hypotheses) in zip(outputs, utterances, strict=True)
        ]
        for group in _batches(sizes):
            found = self._decode(self._decoder, [(outputs[i], utterances[i][1]) for i in group])
            for row, index in enumerate(group):
                length = sizes[index].length + 1
                left, following = found["score"][row, :, :length], found["next_log_probs"][row]
                right = found["r_score"][row, :, :length] if self.config.bidirectional else None
                results[index] = TokenScores(left=left, right=right, next=following)
        return results

    def _decode(
        self, decoder: Session, utterances: Sequence[tuple[Value, Sequence[Sequence[int]]]]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Run the decoder for utterances with the same number of hypotheses. Shorter hypotheses are padded."""
        encoder_lens = np.array([len(output) for output, _ in utterances], np.int64)
        hyps_lens = np.array([[len(tokens) for tokens in part] for _, part in utterances], np.int64)
        num_frames, length = int(encoder_lens.max()), int(hyps_lens.max()) or 1  # Reshape treats 0 specially
        hyps = np.full((*hyps_lens.shape, length), self.config.eos, np.int64)
        encoder_out = joined([output[np.newaxis] for output, _ in utterances], 0, padded=1)
        for row, (_, hypotheses) in enumerate(utterances):
            for column, tokens in enumerate(hypotheses):
                hyps[row, column, : len(tokens)] = tokens
        if not 0 <= hyps.min() <= hyps.max() < self.config.vocab_size:
            raise ValueError(f"hypotheses contain token ids outside 0..{self.config.vocab_size - 1}")
        at_once = max(_MOST_PAIRS // (len(utterances) * length * max(num_frames, length)), 1)
        shared: dict[str, Value | npt.NDArray[np.int64]] = {"encoder_out": encoder_out, "encoder_lens": encoder_lens}
        parts = [
            decoder.run(shared | {"hyps": hyps[:, part], "hyps_lens": hyps_lens[:, part]})
            for part in (slice(begin, begin + at_once) for begin in range(0, hyps.shape[1], at_once))
        ]
        names = ("score", "r_score", "next_log_probs") if self.config.bidirectional else ("score", "next_log_probs")
        outputs = {name: np.concatenate([part[name] for part in parts], axis=1) for name in names}
        for values in outputs.values():
            _check_log_probs("decoder", values)
        return outputs

    @staticmethod
    def _matrix(name: str, value: npt.ArrayLike | DeviceArray, width: int) -> Value:
        array = value if isinstance(value, DeviceArray) else np.ascontiguousarray(value, np.float32)
        if len(array.shape) != 2 or array.shape[1] != width:
            raise ValueError(f"{name} must be [time, {width}], got shape {array.shape}")
        return array


def _check_log_probs(graph: str, values: npt.NDArray[np.float32]) -> None:
    """Raise ProviderError for NaN and for probabilities above 1, which would mislead a search."""
    most = values.max(initial=-np.inf)
    if not most <= _MOST_LOG_PROB:
        raise ProviderError(
            f"{graph} returned {most} as a log-probability: its weights are damaged, or the device computes incorrectly"
        )


class _Size(NamedTuple):
    """Size of an utterance in the decoder: numbers of hypotheses, tokens in the longest one, and encoder frames."""

    num_hypotheses: int
    length: int
    num_frames: int


def _batches(sizes: Sequence[_Size]) -> list[list[int]]:
    """Return for each call the indices of the utterances that share it. Utterances without hypotheses are left out."""

    def joins(batch: list[int], index: int) -> bool:
        first, last = sizes[batch[0]], sizes[index]  # from the shortest to the longest hypothesis
        frames = [sizes[each].num_frames for each in (*batch, index)]
        return (
            first.num_hypotheses == last.num_hypotheses
            and (len(batch) + 1) * last.num_hypotheses * (last.length + 1) <= _MOST_TOKENS
            and first.length >= _LEAST_ALIKE * last.length
            and min(frames) >= _LEAST_ALIKE * max(frames)
        )

    return batches_of((i for i in sorted(range(len(sizes)), key=sizes.__getitem__) if sizes[i].num_hypotheses), joins)


T = TypeVar("T")


def batches_of(items: Iterable[T], joins: Callable[[list[T], T], bool]) -> list[list[T]]:
    """Group items into batches, in order. An item starts a new batch unless `joins(last_batch, item)` is true."""
    batches: list[list[T]] = []
    for item in items:
        if batches and joins(batches[-1], item):
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches
