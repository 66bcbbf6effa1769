"""The architecture of a network: validated sizes and kinds, no tensors. Read from train.yaml by `checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

NormKind = Literal["layer_norm", "rms_norm", "batch_norm"]
SubsamplingKind = Literal["conv2d", "conv2d2", "conv2d6", "conv2d8", "conv1d2", "linear", "stack_n_frames"]
SUBSAMPLINGS: dict[SubsamplingKind, tuple[int, int]] = {
    "conv2d": (4, 6),
    "conv2d2": (2, 2),
    "conv2d6": (6, 10),
    "conv2d8": (8, 14),
    "conv1d2": (2, 0),  # it looks ahead, but beyond the end of an utterance there are zeros
    "linear": (1, 0),
    "stack_n_frames": (2, 1),
}
"""Feature frames per encoder frame, and feature frames that an encoder frame needs beyond its first one."""
PositionKind = Literal["rel_pos", "abs_pos", "no_pos", "abs_pos_whisper", "rope_pos", "embed_learnable_pe"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation over the last axis. `rms_norm` multiplies by 1 + weight, as WeNet's does."""

    kind: NormKind = "layer_norm"
    eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head attention; fewer key/value heads than heads make it grouped (one: multi-query)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_bias: bool = True
    """Bias of the query and of the output projection."""
    key_bias: bool = True
    value_bias: bool = True
    relative: bool = False
    """WeNet's rel_selfattn: a learned position term added to the scores."""
    rotary: bool = False
    """WeNet's rope_abs_selfattn: queries and keys are rotated by their positions (arXiv 2104.09864)."""
    by_distance: bool = False
    """WeNet's shaw_rel_selfattn: learned vectors for the distances of keys (arXiv 1803.02155)."""


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A position-wise feed-forward layer, a gated one, or a mixture of experts."""

    kind: Literal["dense", "gated", "moe"] = "dense"
    hidden: int
    activation: str
    """One of `runtime.graph.activation.ACTIVATIONS`."""
    bias: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 0


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """The convolution module of a conformer block."""

    kernel: int
    causal: bool
    channels: int
    """Channels of the depthwise convolution: conv_inner_factor * dim / 2."""
    bias: bool
    norm: Norm
    activation: str
    """One of `runtime.graph.activation.ACTIVATIONS`."""

    @property
    def has_history(self) -> bool:
        """Whether it sees frames before those of a chunk, and none after them."""
        return self.causal and self.kernel > 1


@dataclass(frozen=True, kw_only=True)
class EncoderArchitecture:
    """An encoder: normalisation and subsampling of the features, then blocks of one kind."""

    kind: str
    """WeNet's name of it, one of `encoders.kinds.KINDS`."""
    input_size: int
    """Mel bins of a feature frame."""
    dim: int
    num_blocks: int
    subsampling: SubsamplingKind
    positions: PositionKind
    """WeNet's name of the encodings. Only those of attention that uses them, and those that are added, count."""
    attention: Attention
    feed_forward: FeedForward
    macaron: bool
    convolution: Convolution | None
    norm: Norm
    pre_norm: bool
    final_norm: bool
    static_chunk_size: int
    """The only chunk size that the encoder was trained for; 0: any, or none."""
    dynamic_chunk: bool
    normalized_input: bool
    """Whether mean and variance normalisation of the features is part of the network."""
    causal: bool
    """Whether no layer looks ahead beyond the current chunk."""
    embed_eps: float = 1e-5
    """Of the normalisation before the blocks that some kinds of subsampling have, whatever `norm` says."""
    frame_reduction: int = 1
    """Frames after the subsampling for one of the output."""
    chunk_multiple: int = 1
    """Chunk sizes must be multiples of it."""
    own: Any = None
    """Settings of this kind of encoder alone: a frozen dataclass of its file."""

    @property
    def streaming(self) -> bool:
        """Whether this encoder was trained on chunks and never looks ahead beyond the current one."""
        return self.causal and (self.dynamic_chunk or self.static_chunk_size > 0)

    @property
    def subsampling_rate(self) -> int:
        """Feature frames per encoder frame."""
        return SUBSAMPLINGS[self.subsampling][0] * self.frame_reduction

    @property
    def right_context(self) -> int:
        """Feature frames that an encoder frame needs beyond its first one."""
        return SUBSAMPLINGS[self.subsampling][1]

    @property
    def absolute_positions(self) -> bool:
        """Whether encodings of positions are added to the input of blocks: WeNet drops the sum of stacked frames."""
        is_added = self.positions in ("abs_pos", "abs_pos_whisper") or self.learned_positions
        return is_added and self.subsampling != "stack_n_frames"

    @property
    def learned_positions(self) -> bool:
        """Whether encodings of positions are weights, of which there is a limited number."""
        return self.positions == "embed_learnable_pe"


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """One direction of a transformer decoder."""

    vocab_size: int
    dim: int
    num_blocks: int
    self_attention: Attention
    cross_attention: Attention
    feed_forward: FeedForward
    norm: Norm
    pre_norm: bool
    learned_positions: bool = False
    """Whether encodings of positions are weights, of which there is a limited number."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The whole network: encoder, CTC head, and the decoders that the checkpoint has."""

    encoder: EncoderArchitecture
    left_decoder: Decoder | None
    right_decoder: Decoder | None
    vocab_size: int
    sos: int
    eos: int
    blank: int
    non_blank_memory: bool = False
    """The decoders see only the frames whose likeliest token is not 0 (WeNet's apply_non_blank_embedding)."""
