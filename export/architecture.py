"""The architecture of a network: validated sizes and kinds, without tensors, and how they are read from train.yaml."""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from u2moe.export.text_files import LARGEST_SIZE, Section
from u2moe.runtime.graph.activation import ACTIVATIONS

NormKind = Literal["layer_norm", "rms_norm", "batch_norm"]
SubsamplingKind = Literal["conv2d", "conv2d2", "conv2d6", "conv2d8", "conv1d2", "linear", "stack_n_frames"]
SUBSAMPLINGS: dict[SubsamplingKind, tuple[int, int]] = {
    "conv2d": (4, 6), "conv2d2": (2, 2), "conv2d6": (6, 10), "conv2d8": (8, 14), "linear": (1, 0),
    "conv1d2": (2, 0),  # looks ahead, but reads zeros past the end of an utterance
    "stack_n_frames": (2, 1),
}  # fmt: skip
"""By kind of subsampling: the number of feature frames per encoder frame, and the number of feature frames that an
encoder frame needs after its first feature frame."""
PositionKind = Literal["rel_pos", "abs_pos", "no_pos", "abs_pos_whisper", "rope_pos", "embed_learnable_pe"]
LAYER_NORMS: tuple[NormKind, ...] = ("layer_norm", "rms_norm")
SUBSAMPLING_KINDS: tuple[SubsamplingKind, ...] = get_args(SubsamplingKind)
POSITIONS: tuple[PositionKind, ...] = get_args(PositionKind)
MOST_BLOCKS = 256
MOST_EXPERTS = 8192
"""Limit on the total number of experts in an encoder or a decoder. Large models have about 1,000. Each expert is a
module, and building 2,000 modules takes a second even without weights."""
DENSE = "position_wise_feed_forward"
FEED_FORWARDS: dict[str, Literal["dense", "gated", "moe"]] = {DENSE: "dense", "gated": "gated", "moe": "moe"}


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
    query_bias: bool = True  # whether the query projection and the output projection have a bias
    key_bias: bool = True
    value_bias: bool = True
    relative: bool = False  # WeNet's rel_selfattn: a learned position term is added to the scores
    rotary: bool = False  # WeNet's rope_abs_selfattn: positions rotate queries and keys (arXiv 2104.09864)
    by_distance: bool = False  # WeNet's shaw_rel_selfattn: learned vectors for distances of frames (arXiv 1803.02155)


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A feed-forward layer: dense, gated, or a mixture of experts."""

    kind: Literal["dense", "gated", "moe"] = "dense"
    hidden: int
    activation: str  # one of `runtime.graph.activation.ACTIVATIONS`
    bias: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 0


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """The convolution module of a conformer block."""

    kernel: int
    causal: bool
    channels: int  # channels of the depthwise convolution: conv_inner_factor * dim / 2
    bias: bool
    norm: Norm
    activation: str  # one of `runtime.graph.activation.ACTIVATIONS`


@dataclass(frozen=True, kw_only=True)
class EncoderArchitecture:
    """An encoder: normalisation and subsampling of the features, followed by blocks of one kind."""

    kind: str  # WeNet's name, one of `encoders.kinds.KINDS`
    input_size: int  # mel bins of a feature frame
    dim: int
    num_blocks: int
    subsampling: SubsamplingKind
    positions: PositionKind  # WeNet's name for the positional encodings. Some kinds of attention ignore the encodings
    attention: Attention
    feed_forward: FeedForward
    macaron: bool
    convolution: Convolution | None
    norm: Norm
    pre_norm: bool
    final_norm: bool
    static_chunk_size: int  # of training, in frames after subsampling; 0: none. Ignored if `dynamic_chunk` is true
    dynamic_chunk: bool
    normalized_input: bool = True  # whether mean and variance normalisation of the features is part of the network
    causal: bool  # whether no layer looks beyond the current chunk
    embed_eps: float = 1e-5  # of the normalisation in some kinds of subsampling; independent of `norm`
    frame_reduction: int = 1  # number of frames after subsampling that become one output frame
    chunk_multiple: int = 1  # chunk sizes must be multiples of this number of output frames
    own: Any = None  # settings that only this kind of encoder has: a frozen dataclass from the module of this kind

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
    learned_positions: bool = False  # whether positional encodings are weights, which limits the number of positions


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
    non_blank_memory: bool = False  # decoders see only frames whose best token is not 0 (apply_non_blank_embedding)


def encoder_architecture(  # noqa: PLR0913 - the differences between kinds of encoder
    conf: Section,
    top: Section,
    *,
    attentions: tuple[str, ...],
    activation: str = "swish",
    positions: PositionKind = "rel_pos",
    attention_key: str = "selfattention_layer_type",
    num_blocks: int = 6,
    has_macaron: bool = False,
    has_convolution: bool = False,
    has_order: bool = True,
    causal: bool = True,
    feed_forward: FeedForward | None = None,
) -> EncoderArchitecture:
    """Return the settings common to all encoders, read from the section encoder_conf and the top level of a train.yaml.

    `attentions` are the supported kinds of attention layer, the default first; `attention_key` selects one. Blocks may
    have a second feed-forward layer (`has_macaron`), a convolution module as those of conformers do
    (`has_convolution`), or normalise after each layer instead of before it (`has_order`). If `causal`, no layer other
    than subsampling and the convolution module sees later frames. `feed_forward` is the feed-forward layer if this kind
    of encoder has no setting for it. The other arguments are defaults.
    """
    dim = conf.integer("output_size", 256)
    if dim % 2:
        raise conf.wrong("output_size", dim, "even (positions are encoded as pairs of sine and cosine)")
    chosen_positions = conf.choice("pos_enc_layer_type", positions, POSITIONS)
    attention = conf.choice(attention_key, attentions[0], attentions)
    if (chosen_positions == "rope_pos") != (attention == "rope_abs_selfattn"):
        expected = "rope_abs_selfattn if and only if pos_enc_layer_type is rope_pos"
        raise conf.wrong("selfattention_layer_type", attention, expected)
    chosen = activation if feed_forward else conf.choice("activation_type", activation, tuple(ACTIVATIONS))
    num_blocks = conf.integer("num_blocks", num_blocks, most=MOST_BLOCKS)
    macaron = has_macaron and conf.flag("macaron_style", default=True)
    convolution = read_convolution(conf, dim, chosen) if has_convolution else None
    return checked_encoder(conf, top, EncoderArchitecture(
        kind=cast("str", top.value("encoder") or "conformer"), input_size=top.integer("input_dim"), dim=dim,
        num_blocks=num_blocks, subsampling=conf.choice("input_layer", "conv2d", SUBSAMPLING_KINDS),
        positions=chosen_positions, attention=read_attention(conf, dim, attention),
        feed_forward=feed_forward or read_feed_forward(conf, chosen, num_layers=num_blocks * (2 if macaron else 1)),
        macaron=macaron, convolution=convolution, norm=read_norm(conf),
        pre_norm=not has_order or conf.flag("normalize_before", default=True),
        final_norm=not has_convolution or conf.flag("final_norm", default=True), **read_chunks(conf),
        causal=causal and (convolution is None or convolution.causal) and conf.value("input_layer") != "conv1d2",
    ))  # fmt: skip


def read_chunks(conf: Section) -> dict[str, Any]:
    """Return the fields `static_chunk_size` and `dynamic_chunk` of an encoder."""
    # as in WeNet, a negative size means that training used no static chunks
    static = max(conf.integer("static_chunk_size", 0, least=-LARGEST_SIZE), 0)
    return {"static_chunk_size": static, "dynamic_chunk": conf.flag("use_dynamic_chunk", default=False)}


def checked_encoder(conf: Section, top: Section, encoder: EncoderArchitecture) -> EncoderArchitecture:
    """Return the encoder. Refuse sizes that do not fit each other."""
    if encoder.input_size <= encoder.right_context:  # 2-D convolutions span as many bins as frames
        expected = f"at least {encoder.right_context + 1} with input_layer {encoder.subsampling}"
        raise top.wrong("input_dim", encoder.input_size, expected)
    # WeNet adds absolute positions to stacked frames. It discards the sum, but fails if the sizes differ.
    is_added = encoder.positions in ("abs_pos", "abs_pos_whisper", "embed_learnable_pe")
    stacked = encoder.input_size * encoder.subsampling_rate
    if encoder.subsampling == "stack_n_frames" and is_added and encoder.dim != stacked:
        expected = f"{stacked}, the size of stacked frames, with pos_enc_layer_type {encoder.positions}"
        raise conf.wrong("output_size", encoder.dim, expected)
    # if a layer looks beyond a chunk, streaming could not reproduce WeNet's output
    if encoder.static_chunk_size and not encoder.dynamic_chunk and not encoder.streaming:
        found = encoder.static_chunk_size
        raise conf.unsupported("static_chunk_size", found, ("0 if causal is false", "any size if causal is true"))
    return encoder


def read_norm(conf: Section) -> Norm:
    """Return the normalisation of a network's layers."""
    eps = conf.number("norm_eps", 1e-5, least=0.0, most=1.0)
    return Norm(kind=conf.choice("layer_norm_type", "layer_norm", LAYER_NORMS), eps=eps)


def read_attention(conf: Section, dim: int, kind: str, prefix: str = "") -> Attention:
    """Return the configured attention. `kind` is WeNet's name for it. The keys of its biases begin with `prefix`."""
    if kind == "shaw_rel_selfattn":  # WeNet ignores n_kv_head and head_dim here
        conf.refuse(("n_kv_head", "head_dim"), "shaw_rel_selfattn ignores it")
    relative, rotary = kind == "rel_selfattn", kind == "rope_abs_selfattn"
    num_heads = conf.integer("attention_heads", 4)
    head_dim, num_kv_heads = (
        None if conf.value(key) is None else conf.integer(key) for key in ("head_dim", "n_kv_head")
    )
    if num_kv_heads is not None and head_dim is None:
        raise conf.wrong("head_dim", None, "given together with n_kv_head")
    if head_dim is None and dim % num_heads:
        raise conf.wrong("attention_heads", num_heads, f"a divisor of the model width {dim}, unless head_dim is given")
    head_dim = head_dim or dim // num_heads
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise conf.wrong("n_kv_head", num_kv_heads, f"a divisor of attention_heads {num_heads}")
    if relative and num_heads * head_dim != dim:
        raise conf.wrong("head_dim", head_dim, f"output_size {dim} / attention_heads {num_heads} for rel_selfattn")
    if rotary and (head_dim % 2 or num_heads * head_dim != dim):
        raise conf.wrong("head_dim", head_dim, f"even and equal to output_size {dim} / attention_heads for rope_pos")
    biases = {f"{name}_bias": conf.flag(f"{prefix}{name}_bias", default=True) for name in ("query", "key", "value")}
    return Attention(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, relative=relative, rotary=rotary,
        by_distance=kind == "shaw_rel_selfattn", **biases,
    )  # fmt: skip


def read_feed_forward(conf: Section, activation: str, *, num_layers: int) -> FeedForward:
    """Return the feed-forward layer, which occurs `num_layers` times in the network."""
    kind = FEED_FORWARDS[conf.choice("mlp_type", DENSE, tuple(FEED_FORWARDS))]
    hidden, bias = conf.integer("linear_units", 2048), conf.flag("mlp_bias", default=True)
    num_experts, chosen = conf.integer("n_expert", 8), conf.integer("n_expert_activated", 2)
    if kind != "moe":
        num_experts = chosen = 0
    if num_layers * num_experts > MOST_EXPERTS:
        expected = f"at most {MOST_EXPERTS // num_layers} in each of {num_layers} layers"
        raise conf.wrong("n_expert", num_experts, expected)
    if chosen > num_experts:
        raise conf.wrong("n_expert_activated", chosen, f"at most n_expert {num_experts}")
    experts = {"num_experts": num_experts, "num_experts_per_token": chosen}
    return FeedForward(kind=kind, hidden=hidden, activation=activation, bias=bias, **experts)


def read_kernel(conf: Section, key: str, default: int, *, causal: bool) -> int:
    """Read the kernel size of a convolution over time; it must be odd unless the convolution is causal."""
    kernel = conf.integer(key, default)
    if not causal and kernel % 2 == 0:
        raise conf.wrong(key, kernel, "odd for a convolution that is not causal")
    return kernel


def read_convolution(conf: Section, dim: int, activation: str) -> Convolution | None:
    """Return the convolution module of conformer blocks; None if they have none."""
    used = conf.flag("use_cnn_module", default=True)
    causal, bias = conf.flag("causal", default=False), conf.flag("conv_bias", default=True)
    kernel = read_kernel(conf, "cnn_module_kernel", 15, causal=causal or not used)
    channels = conf.integer("conv_inner_factor", 2) * dim // 2
    kind = conf.choice("cnn_module_norm", "batch_norm", get_args(NormKind))
    norm = Norm(kind=kind, eps=conf.number("conv_norm_eps", 1e-5, least=0.0, most=1.0))
    if not used:
        return None
    return Convolution(kernel=kernel, causal=causal, channels=channels, bias=bias, norm=norm, activation=activation)


def read_decoders(top: Section, vocab_size: int, dim: int) -> tuple[Decoder | None, Decoder | None, bool]:
    """Return the left and right decoder, and whether their output weights are tied to their embeddings."""
    if "decoder" in top and top.value("decoder") is None:
        top.section("decoder_conf", is_whole=False)
        return None, None, False
    conf = top.section("decoder_conf")
    kind = top.choice("decoder", "bitransformer", ("bitransformer", "transformer"))
    uni = kind == "transformer"
    activation = conf.choice("activation_type", "relu", tuple(ACTIVATIONS))
    # "embed" and "abs_pos" are two names for the same class
    positions = conf.choice("input_layer", "embed", ("embed", "abs_pos", "embed_learnable_pe"))
    self_attention = cross_attention = read_attention(conf, dim, "selfattn")
    if uni:
        cross_attention = read_attention(conf, dim, "selfattn", "src_")
    else:  # the bidirectional decoder has no settings for the cross-attention biases
        cross_attention = replace(self_attention, query_bias=True, key_bias=True, value_bias=True)
    num_blocks = conf.integer("num_blocks", 6, most=MOST_BLOCKS)
    num_right_blocks = 0 if uni else conf.integer("r_num_blocks", 0, least=0, most=MOST_BLOCKS)
    feed_forward = read_feed_forward(conf, activation, num_layers=max(num_blocks, num_right_blocks))
    left = Decoder(
        vocab_size=vocab_size, dim=dim, num_blocks=num_blocks, self_attention=self_attention,
        cross_attention=cross_attention, feed_forward=feed_forward, norm=read_norm(conf),
        pre_norm=conf.flag("normalize_before", default=True), learned_positions=positions == "embed_learnable_pe",
    )  # fmt: skip
    tied = conf.flag("tie_word_embedding", default=False)
    return left, None if uni else replace(left, num_blocks=num_right_blocks), tied
