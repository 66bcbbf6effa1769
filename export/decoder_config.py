"""Parses decoder_conf of a train.yaml."""

from __future__ import annotations

from u2moe.export.architecture import Attention, Decoder
from u2moe.export.layer_config import MOST_BLOCKS, read_attention, read_feed_forward, read_norm
from u2moe.export.yaml_section import Section
from u2moe.runtime.graph.activation import ACTIVATIONS


def read_decoders(top: Section, vocab_size: int, dim: int) -> tuple[Decoder | None, Decoder | None, bool]:
    """Left and right decoder, and whether their output weights are tied to their embeddings."""
    if "decoder" in top and top.value("decoder") is None:
        top.section("decoder_conf", is_whole=False)
        return None, None, False
    conf = top.section("decoder_conf")
    kind = top.choice("decoder", "bitransformer", ("bitransformer", "transformer"))
    uni = kind == "transformer"
    activation = conf.choice("activation_type", "relu", tuple(ACTIVATIONS))
    # "embed" and "abs_pos" are two names for the same class
    positions = conf.choice("input_layer", "embed", ("embed", "abs_pos", "embed_learnable_pe"))
    self_attention = read_attention(conf, dim)
    # only the unidirectional decoder has settings for the cross-attention biases
    cross_attention = read_attention(conf, dim, "src_") if uni else _without_bias_settings(self_attention)
    num_blocks = conf.integer("num_blocks", 6, most=MOST_BLOCKS)
    num_right_blocks = 0 if uni else conf.integer("r_num_blocks", 0, least=0, most=MOST_BLOCKS)
    feed_forward = read_feed_forward(conf, activation, num_layers=max(num_blocks, num_right_blocks))
    norm, pre_norm = read_norm(conf), conf.flag("normalize_before", default=True)

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
            learned_positions=positions == "embed_learnable_pe",
        )

    tied = conf.flag("tie_word_embedding", default=False)
    return decoder(num_blocks), None if uni else decoder(num_right_blocks), tied


def _without_bias_settings(attention: Attention) -> Attention:
    return Attention(num_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads, head_dim=attention.head_dim)
