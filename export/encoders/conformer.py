"""The conformer encoder: transformer blocks with a convolution module and, if macaron, a second feed-forward layer."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.attention import MultiHeadAttention, norm
from u2moe.export.convolution import ConvolutionFrames, ConvolutionModule, convolution, initial_cache
from u2moe.export.encoders.network import (
    ATT_CACHE,
    CNN_CACHE,
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
        activation="swish",
        positions="rel_pos",
        attentions=("rel_selfattn", "selfattn", "shaw_rel_selfattn", "rope_abs_selfattn"),
        has_macaron=True,
        has_convolution=True,
    )


class ConformerBlock(nn.Module):
    """Half feed-forward (macaron), attention, convolution, feed-forward, each residual; first and third optional."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = MultiHeadAttention(config.dim, config.attention)
        self.feed_forward = feed_forward(config.dim, config.feed_forward)
        self.norm_ff = norm(config.dim, config.norm)
        self.norm_mha = norm(config.dim, config.norm)
        self.feed_forward_macaron: nn.Module | None = None
        self.conv_module: ConvolutionModule | None = None
        if config.macaron:
            self.feed_forward_macaron = feed_forward(config.dim, config.feed_forward)
            self.norm_ff_macaron = norm(config.dim, config.norm)
        if config.convolution is not None:
            self.conv_module = ConvolutionModule(config.dim, config.convolution)
            self.norm_conv = norm(config.dim, config.norm)
            self.norm_final = norm(config.dim, config.norm)
        self.scale = 0.5 if config.macaron else 1.0

    def forward(self, x: Tensor, context: Context, caches: BlockCaches) -> tuple[Tensor, BlockCaches]:
        """[batch, time, dim] to the same, and the caches with this call's frames appended."""
        if self.feed_forward_macaron is not None:
            branch = self.norm_ff_macaron(x) if self.pre_norm else x
            x = x + self.scale * self.feed_forward_macaron(branch)
            x = x if self.pre_norm else self.norm_ff_macaron(x)

        branch = self.norm_mha(x) if self.pre_norm else x
        following = {ATT_CACHE: with_past(caches, ATT_CACHE, self.self_attn.keys_values(branch))}
        x = x + self.self_attn(branch, following[ATT_CACHE], context.mask, context.positions)
        x = x if self.pre_norm else self.norm_mha(x)

        if self.conv_module is not None:
            branch = self.norm_conv(x) if self.pre_norm else x
            branch, history = self.conv_module(branch, context.valid, caches.get(CNN_CACHE))
            following |= {} if history is None else {CNN_CACHE: history}
            x = x + branch
            x = x if self.pre_norm else self.norm_conv(x)

        branch = self.norm_ff(x) if self.pre_norm else x
        x = x + self.scale * self.feed_forward(branch)
        x = x if self.pre_norm else self.norm_ff(x)
        if self.conv_module is not None:
            x = self.norm_final(x)
        return x, following


class ConformerEncoder(SpeechEncoder):
    """Conformer blocks."""

    def block(self, index: int) -> nn.Module:  # noqa: ARG002 - all are alike
        """See `SpeechEncoder`."""
        return ConformerBlock(self.config)

    @staticmethod
    def caches(config: EncoderArchitecture) -> tuple[Cache, ...]:
        """See `SpeechEncoder`."""
        attention, convolution = attention_cache(config, config.num_blocks), config.convolution
        if convolution is None or not convolution.has_history:
            return (attention,)
        shape = (convolution.channels, convolution.kernel - 1)
        return (attention, Cache(name=CNN_CACHE, num_blocks=config.num_blocks, shape=shape))


class ConformerNodes(EncoderNodes):
    """The same as layers of a graph."""

    @property
    def longest_history(self) -> int:
        """See `EncoderNodes`."""
        return self.config.convolution.kernel - 1 if self.config.convolution else 0

    def share(self, x: ir.Value) -> None:
        """See `EncoderNodes`."""
        super().share(x)
        modules = [cast("ConformerBlock", block).conv_module for block in self.encoder.encoders]
        histories = initial_cache(self.g, [module for module in modules if module is not None])
        if CNN_CACHE in self.inputs and histories is not None:
            with self.g.scope("frames"):
                histories = self.frames.history(self.inputs[CNN_CACHE], histories)
        self.around = ConvolutionFrames(histories=histories, valid=self.frames.valid, streaming=self.streaming)

    def block(self, residual: Residual, block: nn.Module, index: int) -> None:
        """See `EncoderNodes`."""
        own = cast("ConformerBlock", block)
        macaron, module = own.feed_forward_macaron, own.conv_module
        if macaron is not None:
            layer = self.feed_forward(macaron, "feed_forward_macaron", own.scale)
            residual.add(layer, own.norm_ff_macaron, "norm_ff_macaron")
        residual.add(lambda x: self.self_attention(x, own.self_attn, index), own.norm_mha, "norm_mha")
        if module is not None:
            residual.add(lambda x: self.convolution(x, module, index), own.norm_conv, "norm_conv")
        residual.add(self.feed_forward(own.feed_forward, "feed_forward", own.scale), own.norm_ff, "norm_ff")
        if module is not None:
            residual.normalize(own.norm_final, "norm_final")

    def convolution(self, x: ir.Value, module: ConvolutionModule, index: int) -> ir.Value:
        """The convolution module of block `index`; what is to be cached of it is noted."""
        y, kept = convolution(self.g, x, module, self.around, index)
        self.next_cnn += [] if kept is None else [kept]
        return y

    @staticmethod
    def attention_of(block: nn.Module) -> MultiHeadAttention:
        """See `EncoderNodes`."""
        return cast("ConformerBlock", block).self_attn
