"""The transformer encoder: attention and feed-forward layers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.attention import MultiHeadAttention, norm
from u2moe.export.encoders.network import (
    ATT_CACHE,
    BlockCaches,
    Context,
    SpeechEncoder,
    attention_cache,
    with_past,
)
from u2moe.export.encoders.nodes import EncoderNodes
from u2moe.export.layer_config import encoder_architecture
from u2moe.export.layers import Residual
from u2moe.export.moe import feed_forward
from u2moe.export.yaml_section import Section
from u2moe.runtime.bundle.contract import Cache


def read(top: Section, *, normalized: bool) -> EncoderArchitecture:
    """The architecture in a train.yaml."""
    return encoder_architecture(
        top.section("encoder_conf"),
        top,
        normalized=normalized,
        activation="relu",
        positions="abs_pos",
        attentions=("selfattn", "rope_abs_selfattn"),
    )


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each residual."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = MultiHeadAttention(config.dim, config.attention)
        self.feed_forward = feed_forward(config.dim, config.feed_forward)
        self.norm1 = norm(config.dim, config.norm)
        self.norm2 = norm(config.dim, config.norm)

    def forward(self, x: Tensor, context: Context, caches: BlockCaches) -> tuple[Tensor, BlockCaches]:
        """[batch, time, dim] to the same, and the caches with this call's frames appended."""
        branch = self.norm1(x) if self.pre_norm else x
        keys_values = with_past(caches, ATT_CACHE, self.self_attn.keys_values(branch))
        x = x + self.self_attn(branch, keys_values, context.mask, context.positions)
        x = x if self.pre_norm else self.norm1(x)
        branch = self.norm2(x) if self.pre_norm else x
        x = x + self.feed_forward(branch)
        x = x if self.pre_norm else self.norm2(x)
        return x, {ATT_CACHE: keys_values}


class TransformerEncoder(SpeechEncoder):
    """Transformer blocks."""

    def block(self, index: int) -> nn.Module:  # noqa: ARG002 - all are alike
        """See `SpeechEncoder`."""
        return TransformerBlock(self.config)

    @staticmethod
    def caches(config: EncoderArchitecture) -> tuple[Cache, ...]:
        """See `SpeechEncoder`."""
        return (attention_cache(config, config.num_blocks),)


class TransformerNodes(EncoderNodes):
    """The same as layers of a graph."""

    def block(self, residual: Residual, block: torch.nn.Module, index: int) -> None:
        """See `EncoderNodes`."""
        own = cast("TransformerBlock", block)
        residual.add(lambda x: self.self_attention(x, own.self_attn, index), own.norm1, "norm1")
        residual.add(self.feed_forward(own.feed_forward, "feed_forward"), own.norm2, "norm2")

    @staticmethod
    def attention_of(block: torch.nn.Module) -> MultiHeadAttention:
        """See `EncoderNodes`."""
        return cast("TransformerBlock", block).self_attn
