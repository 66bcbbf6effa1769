"""The architecture of a network: validated sizes and kinds, without tensors. `checkpoint` reads it from train.yaml."""

from dataclasses import dataclass
from typing import Any, Literal

NormKind = Literal["layer_norm", "rms_norm", "batch_norm"]
SubsamplingKind = Literal["conv2d", "conv2d2", "conv2d6", "conv2d8", "conv1d2", "linear", "stack_n_frames"]
SUBSAMPLINGS: dict[SubsamplingKind, tuple[int, int]] = {
    "conv2d": (4, 6),
    "conv2d2": (2, 2),
    "conv2d6": (6, 10),
    "conv2d8": (8, 14),
    "conv1d2": (2, 0),  # looks ahead, but reads zeros past the end of an utterance
    "linear": (1, 0),
    "stack_n_frames": (2, 1),
}
"""By kind of subsampling: the number of feature frames per encoder frame, and the number of feature frames that an
encoder frame needs after its first feature frame."""
PositionKind = Literal["rel_pos", "abs_pos", "no_pos", "abs_pos_whisper", "rope_pos", "embed_learnable_pe"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation of channels. As in WeNet, `rms_norm` multiplies by 1 + weight."""

    kind: NormKind = "layer_norm"
    eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head attention. It is grouped-query or multi-query if there are fewer key/value heads than query heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_bias: bool = True
    """Whether the query projection and the output projection have a bias."""
    key_bias: bool = True
    value_bias: bool = True
    relative: bool = False
    """WeNet's rel_selfattn: a learned position term is added to the scores."""
    rotary: bool = False
    """WeNet's rope_abs_selfattn: queries and keys are rotated according to their positions (arXiv 2104.09864)."""
    by_distance: bool = False
    """WeNet's shaw_rel_selfattn: learned vectors for the distances between frames (arXiv 1803.02155)."""


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A feed-forward layer: dense, gated, or a mixture of experts."""

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


@dataclass(frozen=True, kw_only=True)
class EncoderArchitecture:
    """An encoder: normalisation and subsampling of the features, followed by blocks of one kind."""

    kind: str
    """WeNet's name, one of `encoders.kinds.KINDS`."""
    input_size: int
    """Mel bins of a feature frame."""
    dim: int
    num_blocks: int
    subsampling: SubsamplingKind
    positions: PositionKind
    """WeNet's name for the positional encodings. Some kinds of attention ignore the encodings."""
    attention: Attention
    feed_forward: FeedForward
    macaron: bool
    convolution: Convolution | None
    norm: Norm
    pre_norm: bool
    final_norm: bool
    static_chunk_size: int
    """The fixed chunk size of training, in frames after subsampling; 0 if there is none. Ignored if `dynamic_chunk` is
    true."""
    dynamic_chunk: bool
    normalized_input: bool = True
    """Whether mean and variance normalisation of the features is part of the network."""
    causal: bool
    """Whether no layer looks beyond the current chunk."""
    embed_eps: float = 1e-5
    """Epsilon of the normalisation that some kinds of subsampling apply before the blocks; independent of `norm`."""
    frame_reduction: int = 1
    """Number of frames after subsampling that become one output frame."""
    chunk_multiple: int = 1
    """Chunk sizes must be multiples of this number of output frames."""
    own: Any = None
    """Settings that only this kind of encoder has: a frozen dataclass from the module of this kind."""

    @property
    def streaming(self) -> bool:
        """Whether this encoder was trained on chunks and never looks beyond the current one."""
        return self.causal and (self.dynamic_chunk or self.static_chunk_size > 0)

    @property
    def subsampling_rate(self) -> int:
        """Feature frames per encoder frame."""
        return SUBSAMPLINGS[self.subsampling][0] * self.frame_reduction

    @property
    def right_context(self) -> int:
        """Number of feature frames that an encoder frame needs after its first feature frame."""
        return SUBSAMPLINGS[self.subsampling][1]

    @property
    def absolute_positions(self) -> bool:
        """Whether positional encodings are added to the blocks' input. For stack_n_frames, WeNet discards the sum."""
        is_added = self.positions in ("abs_pos", "abs_pos_whisper") or self.learned_positions
        return is_added and self.subsampling != "stack_n_frames"

    @property
    def learned_positions(self) -> bool:
        """Whether the positional encodings are learned weights, which limits the number of positions."""
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
    """Whether the positional encodings are learned weights, which limits the number of positions."""


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
    """Whether the decoders see only frames whose most likely token is not 0 (WeNet's apply_non_blank_embedding)."""
