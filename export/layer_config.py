"""Reads the settings of decoders, and those that several kinds of encoder share, from a train.yaml."""

from dataclasses import replace
from typing import Any, Literal, cast, get_args

from u2moe.export.architecture import (
    Attention,
    Convolution,
    Decoder,
    EncoderArchitecture,
    FeedForward,
    Norm,
    NormKind,
    PositionKind,
    SubsamplingKind,
)
from u2moe.export.yaml_section import LARGEST_SIZE, Section
from u2moe.runtime.graph.activation import ACTIVATIONS

LAYER_NORMS: tuple[NormKind, ...] = ("layer_norm", "rms_norm")
SUBSAMPLING_KINDS: tuple[SubsamplingKind, ...] = get_args(SubsamplingKind)
POSITIONS: tuple[PositionKind, ...] = get_args(PositionKind)
MOST_BLOCKS = 256
MOST_EXPERTS = 8192
"""Limit on the total number of experts in an encoder or a decoder. Large models have about 1,000. Each expert is a
module, and building 2,000 modules takes a second even without weights."""
DENSE = "position_wise_feed_forward"
FEED_FORWARDS: dict[str, Literal["dense", "gated", "moe"]] = {DENSE: "dense", "gated": "gated", "moe": "moe"}


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
    """Return the settings common to all encoders, read from a train.yaml.

    Args:
        conf: the section encoder_conf.
        top: the top level of the file.
        attentions: supported kinds of attention layer, the default first.
        activation: the default activation.
        positions: the default positional encoding.
        attention_key: the key that selects the kind of attention.
        num_blocks: the default number of blocks.
        has_macaron: whether blocks may have a second feed-forward layer.
        has_convolution: whether blocks may have a convolution module, as those of conformers do.
        has_order: whether blocks may normalise after each layer instead of before it.
        causal: whether no layer other than subsampling and the convolution module sees later frames.
        feed_forward: the feed-forward layer if this kind of encoder has no setting for it.
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
        positions=chosen_positions, attention=read_self_attention(conf, dim, attention),
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


def read_self_attention(conf: Section, dim: int, kind: str) -> Attention:
    """Return the attention of an encoder's blocks; `kind` is WeNet's name for it."""
    if kind == "shaw_rel_selfattn":  # WeNet ignores n_kv_head and head_dim here
        conf.refuse(("n_kv_head", "head_dim"), "shaw_rel_selfattn ignores it")
    attention = read_attention(conf, dim, relative=kind == "rel_selfattn")
    if kind == "rope_abs_selfattn" and (attention.head_dim % 2 or attention.num_heads * attention.head_dim != dim):
        expected = f"even and equal to output_size {dim} / attention_heads for rope_pos"
        raise conf.wrong("head_dim", attention.head_dim, expected)
    return replace(attention, rotary=kind == "rope_abs_selfattn", by_distance=kind == "shaw_rel_selfattn")


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


def read_attention(conf: Section, dim: int, prefix: str = "", *, relative: bool = False) -> Attention:
    """Return the configured attention. The keys of its bias settings begin with `prefix`."""
    num_heads = conf.integer("attention_heads", 4)
    head_dim = conf.optional_integer("head_dim")
    num_kv_heads = conf.optional_integer("n_kv_head")
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
    biases = {f"{name}_bias": conf.flag(f"{prefix}{name}_bias", default=True) for name in ("query", "key", "value")}
    return Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, relative=relative, **biases)


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
    self_attention = cross_attention = read_attention(conf, dim)
    if uni:
        cross_attention = read_attention(conf, dim, "src_")
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
