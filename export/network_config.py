"""Parses encoder_conf and decoder_conf of a train.yaml."""

from __future__ import annotations

from typing import Literal, get_args

from u2moe.export.architecture import (
    Activation,
    Attention,
    Convolution,
    Decoder,
    EncoderArchitecture,
    FeedForward,
    Norm,
    NormKind,
    SubsamplingKind,
)
from u2moe.export.yaml_section import LARGEST_SIZE, Section

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
LAYER_NORMS: tuple[NormKind, ...] = ("layer_norm", "rms_norm")
CONVOLUTION_NORMS: tuple[NormKind, ...] = get_args(NormKind)
SUBSAMPLINGS: tuple[SubsamplingKind, ...] = get_args(SubsamplingKind)
MOST_BLOCKS = 256
MOST_EXPERTS = 8192
"""Limit on the experts of all layers of an encoder or decoder. Large mixtures have about 1,000; each is a module, and
building 2,000 modules takes a second even without weights."""
FEED_FORWARDS: dict[str, Literal["dense", "gated", "moe"]] = {
    "position_wise_feed_forward": "dense",
    "gated": "gated",
    "moe": "moe",
}


def read_encoder(top: Section, *, normalized: bool) -> EncoderArchitecture:
    """The encoder; `normalized` says whether feature statistics are part of it."""
    kinds: tuple[Literal["conformer", "transformer"], ...] = ("conformer", "transformer")
    kind = top.choice("encoder", "conformer", kinds)
    conformer = kind == "conformer"
    conf = top.section("encoder_conf")
    dim = conf.integer("output_size", 256)
    if dim % 2:
        raise conf.wrong("output_size", dim, "even: positions are pairs of sine and cosine")
    positions = conf.choice("pos_enc_layer_type", "rel_pos" if conformer else "abs_pos", ("rel_pos", "abs_pos"))
    attentions = ("rel_selfattn", "selfattn") if conformer else ("selfattn",)
    attention = conf.choice("selfattention_layer_type", attentions[0], attentions)
    activation = conf.choice("activation_type", "swish" if conformer else "relu", ACTIVATIONS)
    # negative sizes mean none, as in WeNet
    static_chunk = max(conf.integer("static_chunk_size", 0, minimum=-LARGEST_SIZE), 0)
    num_blocks = conf.integer("num_blocks", 6, maximum=MOST_BLOCKS)
    macaron = conformer and conf.flag("macaron_style", default=True)
    encoder = EncoderArchitecture(
        kind=kind,
        input_size=top.integer("input_dim"),
        dim=dim,
        num_blocks=num_blocks,
        subsampling=conf.choice("input_layer", "conv2d", SUBSAMPLINGS),
        absolute_positions=positions == "abs_pos",
        attention=_attention(conf, dim, relative=attention == "rel_selfattn"),
        feed_forward=_feed_forward(conf, activation, num_layers=num_blocks * (2 if macaron else 1)),
        macaron=macaron,
        convolution=_convolution(conf, dim, activation) if conformer else None,
        norm=_norm(conf),
        pre_norm=conf.flag("normalize_before", default=True),
        final_norm=not conformer or conf.flag("final_norm", default=True),
        static_chunk_size=static_chunk,
        dynamic_chunk=conf.flag("use_dynamic_chunk", default=False),
        normalized_input=normalized,
    )
    if encoder.input_size <= encoder.right_context:  # the convolutions reach as far in frequency as in time
        expected = f"at least {encoder.right_context + 1} with input_layer {encoder.subsampling}"
        raise top.wrong("input_dim", encoder.input_size, expected)
    if encoder.static_chunk_size and not encoder.dynamic_chunk and not encoder.streaming:
        # the convolution looks beyond the chunk mask: no streaming can reproduce what WeNet computes
        raise conf.unsupported("static_chunk_size", static_chunk, ("0 with causal: false", "any with causal: true"))
    return encoder


def read_decoders(top: Section, vocab_size: int, dim: int) -> tuple[Decoder | None, Decoder | None, bool]:
    """Left and right decoder, and whether their output weights are tied to their embeddings."""
    if "decoder" in top and top.value("decoder") is None:
        top.section("decoder_conf", is_whole=False)
        return None, None, False
    conf = top.section("decoder_conf")
    kind = top.choice("decoder", "bitransformer", ("bitransformer", "transformer"))
    uni = kind == "transformer"
    activation = conf.choice("activation_type", "relu", ACTIVATIONS)
    # "embed" and "abs_pos" are two names for the same class
    conf.choice("input_layer", "embed", ("embed", "abs_pos"))
    self_attention = _attention(conf, dim)
    # only the unidirectional decoder has settings for the cross-attention biases
    cross_attention = _attention(conf, dim, "src_") if uni else _without_bias_settings(self_attention)
    num_blocks = conf.integer("num_blocks", 6, maximum=MOST_BLOCKS)
    num_right_blocks = 0 if uni else conf.integer("r_num_blocks", 0, minimum=0, maximum=MOST_BLOCKS)
    feed_forward = _feed_forward(conf, activation, num_layers=max(num_blocks, num_right_blocks))
    norm, pre_norm = _norm(conf), conf.flag("normalize_before", default=True)

    def decoder(num_blocks: int) -> Decoder:
        return Decoder(
            vocab_size=vocab_size,
            dim=dim,
            num_blocks=num_blocks,
            self_attention=self_attention,
            cross_attention=cross_attention,
            feed_forward=feed_forward,
            norm=norm,
            pre_norm=pre_norm,
        )

    tied = conf.flag("tie_word_embedding", default=False)
    return decoder(num_blocks), None if uni else decoder(num_right_blocks), tied


def _norm(conf: Section) -> Norm:
    return Norm(kind=conf.choice("layer_norm_type", "layer_norm", LAYER_NORMS), eps=_eps(conf, "norm_eps"))


def _eps(conf: Section, key: str) -> float:
    return conf.number(key, 1e-5, minimum=0.0, maximum=1.0)


def _attention(conf: Section, dim: int, prefix: str = "", *, relative: bool = False) -> Attention:
    """Heads as configured; `prefix` chooses the biases of cross-attention."""
    num_heads = conf.integer("attention_heads", 4)
    head_dim = conf.optional_integer("head_dim")
    num_kv_heads = conf.optional_integer("n_kv_head")
    if num_kv_heads is not None and head_dim is None:
        raise conf.wrong("head_dim", None, "given together with n_kv_head")
    if head_dim is None and dim % num_heads:
        raise conf.wrong("attention_heads", num_heads, f"a divisor of the width {dim}, unless head_dim is given")
    head_dim = head_dim or dim // num_heads
    num_kv_heads = num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise conf.wrong("n_kv_head", num_kv_heads, f"a divisor of attention_heads {num_heads}")
    if relative and num_heads * head_dim != dim:
        raise conf.wrong("head_dim", head_dim, f"output_size {dim} / attention_heads {num_heads} for rel_selfattn")
    biases = {f"{name}_bias": conf.flag(f"{prefix}{name}_bias", default=True) for name in ("query", "key", "value")}
    return Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, relative=relative, **biases)


def _feed_forward(conf: Section, activation: Activation, *, num_layers: int) -> FeedForward:
    """The layer, which occurs `num_layers` times in the network."""
    kind = FEED_FORWARDS[conf.choice("mlp_type", "position_wise_feed_forward", tuple(FEED_FORWARDS))]
    hidden, bias = conf.integer("linear_units", 2048), conf.flag("mlp_bias", default=True)
    num_experts, chosen = conf.integer("n_expert", 8), conf.integer("n_expert_activated", 2)
    if kind != "moe":
        return FeedForward(kind=kind, hidden=hidden, activation=activation, bias=bias)
    if num_layers * num_experts > MOST_EXPERTS:
        raise conf.wrong(
            "n_expert", num_experts, f"at most {MOST_EXPERTS // num_layers} in each of {num_layers} layers"
        )
    if chosen > num_experts:
        raise conf.wrong("n_expert_activated", chosen, f"at most n_expert {num_experts}")
    return FeedForward(
        kind=kind,
        hidden=hidden,
        activation=activation,
        bias=bias,
        num_experts=num_experts,
        num_experts_per_token=chosen,
    )


def _convolution(conf: Section, dim: int, activation: Activation) -> Convolution | None:
    used = conf.flag("use_cnn_module", default=True)
    kernel, causal = conf.integer("cnn_module_kernel", 15), conf.flag("causal", default=False)
    factor = conf.integer("conv_inner_factor", 2)
    norm = Norm(kind=conf.choice("cnn_module_norm", "batch_norm", CONVOLUTION_NORMS), eps=_eps(conf, "conv_norm_eps"))
    bias = conf.flag("conv_bias", default=True)
    if not used:
        return None
    if not causal and kernel % 2 == 0:
        raise conf.wrong("cnn_module_kernel", kernel, "odd for a convolution that is not causal")
    return Convolution(
        kernel=kernel, causal=causal, channels=factor * dim // 2, bias=bias, norm=norm, activation=activation
    )


def _without_bias_settings(attention: Attention) -> Attention:
    return Attention(num_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads, head_dim=attention.head_dim)
