"""The transformer encoder, and the conformer, which adds a convolution module and optionally a macaron layer."""

from typing import ClassVar, cast

import onnx_ir as ir
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture, encoder_architecture
from u2moe.export.attention import MultiHeadAttention, added, norm
from u2moe.export.convolution import ConvolutionModule, convolution, initial_cache
from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE, BlockCaches, Context, EncoderBlock
from u2moe.export.encoders.nodes import EncoderNodes
from u2moe.export.layers import Residual
from u2moe.export.moe import feed_forward
from u2moe.export.text_files import Section


def read(top: Section) -> EncoderArchitecture:
    """Return the architecture described by a train.yaml."""
    conf = top.section("encoder_conf")
    if top.value("encoder") == "dual_conformer":
        unknown = ("conv_norm_eps", "conv_inner_factor", "final_norm")
        conf.refuse(unknown, "WeNet's dual conformer does not support it and fails")
    attentions = ("rel_selfattn", "selfattn", "shaw_rel_selfattn", "rope_abs_selfattn")
    return encoder_architecture(conf, top, attentions=attentions, has_macaron=True, has_convolution=True)


def read_transformer(top: Section) -> EncoderArchitecture:
    """Return the architecture of an encoder without convolutions."""
    conf, attentions = top.section("encoder_conf"), ("selfattn", "rope_abs_selfattn")
    return encoder_architecture(conf, top, activation="relu", positions="abs_pos", attentions=attentions)


class ConformerBlock(EncoderBlock):
    """Residual layers: feed-forward (macaron, optional), attention, convolution (optional), and feed-forward."""

    NORMS: ClassVar[tuple[str, str]] = ("norm_mha", "norm_ff")  # WeNet's names: of the attention, of the feed-forward
    norm_mha: nn.Module
    norm_ff: nn.Module

    def __init__(self, config: EncoderArchitecture, index: int = 0) -> None:  # noqa: ARG002 - all blocks are alike
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = MultiHeadAttention(config.dim, config.attention)
        self.feed_forward = feed_forward(config.dim, config.feed_forward)
        for name in reversed(self.NORMS):
            self.add_module(name, norm(config.dim, config.norm))
        self.feed_forward_macaron: nn.Module | None = None
        self.conv_module: ConvolutionModule | None = None
        if config.macaron:
            self.feed_forward_macaron = feed_forward(config.dim, config.feed_forward)
            self.norm_ff_macaron = norm(config.dim, config.norm)
        if config.convolution is not None:
            self.conv_module = ConvolutionModule(config.dim, config.convolution)
            self.norm_conv = norm(config.dim, config.norm)
            self.norm_final = norm(config.dim, config.norm)
        self.scale = 0.5 if config.macaron else 1.0  # of both feed-forward layers
        self.attention_cache, self.convolution_cache = ATT_CACHE, CNN_CACHE

    def forward(self, x: Tensor, context: Context, caches: BlockCaches) -> tuple[Tensor, BlockCaches]:
        """Apply the block to `x` [batch, time, dim]. Also return the caches, updated with this call's frames."""
        following: BlockCaches = {}
        norm_attention, norm_last = map(self.get_submodule, self.NORMS)

        def attended(y: Tensor) -> Tensor:
            name = self.attention_cache
            seen = following[name] = self.self_attn.keys_values(y, caches.get(name))
            return cast("Tensor", self.self_attn(y, seen, context.mask, context.positions))

        if self.feed_forward_macaron is not None:
            layer = self.feed_forward_macaron
            x = added(x, lambda y: self.scale * layer(y), self.norm_ff_macaron, self.pre_norm)
        x = added(x, attended, norm_attention, self.pre_norm)
        if self.conv_module is not None:
            branch = self.norm_conv(x) if self.pre_norm else x
            branch, history = self.conv_module(branch, context.valid, caches.get(self.convolution_cache))
            following.update({} if history is None else {self.convolution_cache: history})
            x = self.beside(x, context) + branch
            x = x if self.pre_norm else self.norm_conv(x)
        x = added(x, lambda y: self.scale * self.feed_forward(y), norm_last, self.pre_norm)
        return self.norm_final(x) if self.conv_module is not None else x, following

    def beside(self, x: Tensor, context: Context) -> Tensor:  # noqa: ARG002 - see `EfficientBlock`
        """Return the residual, to which the output of the convolution is added."""
        return x


class TransformerBlock(ConformerBlock):
    """Residual layers: attention and feed-forward."""

    NORMS = ("norm1", "norm2")


class ConformerNodes(EncoderNodes):
    """Builds a conformer or transformer encoder as layers of a graph."""

    def _share(self, x: ir.Value) -> None:
        super()._share(x)
        modules = [cast("ConformerBlock", block).conv_module for block in self.encoder.encoders]
        self.seen = self.around(initial_cache(self.g, [module for module in modules if module is not None]))

    def _block(self, residual: Residual, block: nn.Module, index: int) -> None:
        own = cast("ConformerBlock", block)
        macaron, module = own.feed_forward_macaron, own.conv_module
        norms = ((own.get_submodule(name), name) for name in own.NORMS)
        if macaron is not None:
            layer = self.feed_forward(macaron, "feed_forward_macaron", own.scale)
            residual.add(layer, own.norm_ff_macaron, "norm_ff_macaron")
        residual.add(lambda x: self._self_attention(x, own, index), *next(norms))
        if module is not None:
            self._convolve(residual, own, module, index)
        residual.add(self.feed_forward(own.feed_forward, "feed_forward", own.scale), *next(norms))
        if module is not None:
            residual.normalize(own.norm_final, "norm_final")

    def _convolve(self, residual: Residual, block: ConformerBlock, module: ConvolutionModule, index: int) -> None:
        """Add the convolution of block `index` to the residual."""
        residual.add(lambda x: convolution(self.g, x, module, self.seen, index), block.norm_conv, "norm_conv")
