"""The contract: names, types and axes of the tensors of every graph, defined only here.

Exporters derive dynamic axes from a `Graph`. Sessions reject a file that differs from its `Graph`. Tensors with
the same meaning as in WeNet's ONNX export have the same names as there. Axes given as strings are symbolic: the
checkpoint fixes those that are fields of `ModelConfig`; all others are dynamic.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

FORMAT_VERSION = 4
METADATA_PREFIX = "u2moe."
MOE_DOMAIN = "u2moe"  # Domain of the model-local functions. Each MoE layer is one call of a function of this domain

PACKED = "packed"  # Key in `Manifest.quantization` of weights packed for native kernels. Its value: the layout version

MOST_NUMBERS = 1 << 28  # Maximum numbers in a cache at the start of a stream; C++ has the same limit

GROUP_METADATA = f"{METADATA_PREFIX}weight_group"  # Metadata key of an initializer's group in `WEIGHT_GROUPS`

WEIGHT_GROUPS = (
    "experts", "routers", "feed_forward", "attention", "depthwise_convolutions", "pointwise_convolutions",
    "convolution_state", "positions", "subsampling", "embeddings", "output_layers", "normalization",
)  # fmt: skip
"""Groups of weights, for quantization and reports. Constants of a graph count as "other"."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input or output of a graph."""

    name: str
    dtype: str
    """numpy name of the element type: "float32" or "int64"."""
    axes: tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A tensor that a streaming encoder carries from chunk to chunk.

    At the start of a stream, it contains zeros [num_blocks, batch, *shape]. The input `name` of a chunk is the output
    `r_<name>` of the previous chunk.
    """

    name: str
    num_blocks: int  # Encoder blocks that share the cache
    shape: tuple[int, ...]  # Sizes of the last axes at the start; an axis of size 0 grows with the cached frames
    rate: float = 1.0  # Cached frames per encoder frame, if an axis grows

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or not self.shape or min(self.shape) < 0 or self.shape.count(0) > 1:
            raise ValueError(f"a cache needs blocks and axes, and at most one axis may grow, got {self}")
        if (size := math.prod(filter(None, (self.num_blocks, *self.shape)))) > MOST_NUMBERS:
            raise ValueError(f"a cache may have at most {MOST_NUMBERS} numbers, got {size} in {self.name}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be above 0, got {self.rate}")

    @property
    def time_axis(self) -> int | None:
        """Index of the growing axis in [num_blocks, batch, *shape]; None if the size is fixed."""
        return 2 + self.shape.index(0) if 0 in self.shape else None

    def num_frames(self, num_cached: int) -> int:
        """Return the size of `time_axis` when `num_cached` encoder frames are cached."""
        return math.ceil(num_cached * self.rate)

    def tensor(self, prefix: str = "") -> Tensor:
        """Return the cache as an input of an encoder graph, or, with a prefix, as an output."""
        axes = (size or f"{prefix}{self.name}_time" for size in self.shape)
        return Tensor(name=f"{prefix}{self.name}", dtype="float32", axes=(self.num_blocks, "batch", *axes))


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The tensors of one graph, in order."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def file(self) -> str:
        """File name of the graph in a bundle."""
        return f"{self.name}.onnx"


def _float(name: str, *axes: str) -> Tensor:
    return Tensor(name=name, dtype="float32", axes=axes)


def _int(name: str, *axes: str) -> Tensor:
    return Tensor(name=name, dtype="int64", axes=axes)


_ENCODED = _float("encoder_out", "batch", "time", "output_size")


def features() -> Graph:
    """Return the contract of the front end for other languages: samples in [-1, 1] to features, not normalised."""
    inputs, outputs = _float("samples", "batch", "samples"), _float("features", "batch", "frames", "feature_size")
    return Graph(name="features", inputs=(inputs,), outputs=(outputs,))


def encoder(*, streaming: bool, caches: Iterable[Cache]) -> Graph:
    """Return the contract of the encoder, which maps features and caches to encoder output and new caches.

    Inputs:
        chunk: features, not normalised [batch, frames, size].
        chunk_lens: valid feature frames of each row [batch]; rows are padded at the end.
        offset: position of each stream in encoder frames [batch]: 0 for the first chunk, then `next_offset` of the
            previous chunk. Cached frames at negative positions are masked, so streams at different positions can share
            a batch if their caches are padded at the front.
        required_cache_size: encoder frames of left context to keep for the next call; negative: all. Scalar.
        one float32 input for each of `caches`. Most encoders have these two:
        att_cache: keys and values before the repetition of grouped heads [blocks, batch, kv_heads, cache, 2*head_dim].
        cnn_cache: last input frames of the depthwise convolution, after the gated linear unit [blocks, batch, conv_dim,
            kernel-1]. The graph fills in frames before the start of the stream.

    Outputs:
        output: encoder output [batch, time, dim].
        output_lens: valid encoder frames of each row [batch].
        next_offset: `offset` for the next call [batch]. With limited left context, the graph moves a chunk's positions
            back if they would exceed `ModelConfig.max_position`. Keys are cached without positions, so cached frames
            and their distances do not change. If all chunks are equally long, the caller may instead count frames
            without limit, and the output is the same.
        the new caches.

    A graph that cannot stream has only `chunk, chunk_lens -> output, output_lens`.
    """
    features = (_float("chunk", "batch", "frames", "feature_size"), _int("chunk_lens", "batch"))
    result = (_float("output", "batch", "time", "output_size"), _int("output_lens", "batch"))
    if not streaming:
        return Graph(name="encoder", inputs=features, outputs=result)
    kept = tuple(caches)
    inputs = (*features, _int("offset", "batch"), _int("required_cache_size"), *(one.tensor() for one in kept))
    outputs = (*result, _int("next_offset", "batch"), *(one.tensor("r_") for one in kept))
    return Graph(name="encoder", inputs=inputs, outputs=outputs)


def ctc() -> Graph:
    """Return the contract of the CTC head: `encoder_out` [batch, time, dim] to `log_probs` [batch, time, vocab]."""
    return Graph(name="ctc", inputs=(_ENCODED,), outputs=(_float("log_probs", "batch", "time", "vocab_size"),))


def decoder(*, bidirectional: bool) -> Graph:
    """Return the contract of the attention decoder, which scores hypotheses of several utterances in one call.

    The left-to-right decoder computes common prefixes of an utterance's hypotheses once; the right-to-left decoder
    computes common suffixes once.

    Inputs:
        hyps: tokens without sos and eos, padded at the end with any valid id [batch, nbest, length].
        hyps_lens: number of valid tokens of each hypothesis [batch, nbest].
        encoder_out: encoder output [batch, time, dim].
        encoder_lens: number of valid frames of each utterance [batch].

    Outputs (log-probabilities):
        score: the left-to-right decoder's score of each token [batch, nbest, length+1]. Position `hyps_lens` is for
            eos; later positions are zero. The sum over the last axis is the score of the hypothesis.
        r_score: the right-to-left decoder's score of each token, in the shape and order of `score`.
        next_log_probs: left-to-right distribution of the token after each hypothesis [batch, nbest, vocab].
    """
    names = ("score", "r_score") if bidirectional else ("score",)
    scores = (_float(name, "batch", "nbest", "length_and_eos") for name in names)
    outputs = (*scores, _float("next_log_probs", "batch", "nbest", "vocab_size"))
    hypotheses = (_int("hyps", "batch", "nbest", "length"), _int("hyps_lens", "batch", "nbest"))
    return Graph(name="decoder", inputs=(*hypotheses, _ENCODED, _int("encoder_lens", "batch")), outputs=outputs)
