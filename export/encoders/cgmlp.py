"""Attention in parallel with a convolutional gating MLP (arXiv 2105.08050), in torch and as layers of a graph."""

from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture, FeedForward
from u2moe.export.attention import MultiHeadAttention
from u2moe.export.convolution import Surroundings, TimeDepthwise
from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE, BlockCaches, Context
from u2moe.export.encoders.nodes import EncoderNodes
from u2moe.export.layer_config import encoder_architecture, read_kernel
from u2moe.export.layers import Residual, half, linear, normalization, parameter
from u2moe.export.moe import activation
from u2moe.export.yaml_section import Section
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.graph.builder import GraphBuilder


@dataclass(frozen=True, kw_only=True)
class Gating:
    """Settings of a convolutional gating MLP."""

    hidden: int
    """Outputs of the first projection; half of them are the gate."""
    kernel: int
    causal: bool
    linear: bool
    """Whether a projection follows the convolution."""
    activation: str

    @property
    def channels(self) -> int:
        """Number of channels of the gate, and of its convolution."""
        return self.hidden // 2


def read_gating(conf: Section) -> Gating:
    """Read the settings of the gating MLP from an encoder_conf."""
    hidden = conf.integer("cgmlp_linear_units", 2048)
    if hidden % 2:
        raise conf.wrong("cgmlp_linear_units", hidden, "even (half of the units form the gate)")
    causal = conf.flag("causal", default=False)
    return Gating(
        hidden=hidden,
        kernel=read_kernel(conf, "cgmlp_conv_kernel", 31, causal=causal),
        causal=causal,
        linear=conf.flag("use_linear_after_conv", default=False),
        activation=conf.choice("gate_activation", "identity", ("identity", *ACTIVATIONS)),
    )


def two_branches(
    conf: Section, top: Section, *, causal: bool, feed_forward: FeedForward | None = None
) -> EncoderArchitecture:
    """Return the settings common to branchformers; for the arguments, see `encoder_architecture`."""
    old = "attention_layer_type"  # the key until WeNet 3.0.1
    key, attentions = old if old in conf else "selfattention_layer_type", ("rel_selfattn", "selfattn")
    return encoder_architecture(
        conf, top, attentions=attentions, attention_key=key, num_blocks=12, has_macaron=feed_forward is None,
        has_order=False, causal=causal, feed_forward=feed_forward,
    )  # fmt: skip


class SpatialGatingUnit(nn.Module):
    """A unit that normalises and convolves one half of the channels, and multiplies the other half by the result."""

    def __init__(self, config: Gating) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.channels)
        self.conv = TimeDepthwise(config.channels, config.kernel, causal=config.causal)
        self.linear = nn.Linear(config.channels, config.channels) if config.linear else None
        self.act = nn.Identity() if config.activation == "identity" else activation(config.activation)

    def forward(self, x: Tensor, valid: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gate `x` [batch, time, 2 * channels]; `valid` [batch, time] is false for padding."""
        value, gate = x.chunk(2, dim=-1)
        if cache is None:  # WeNet pads with zeros, which the normalisation then turns into its bias
            cache = self.norm.bias.view(1, -1, 1).expand(-1, -1, self.conv.kernel_size[0] - 1)
        gate, kept = self.conv.over(self.norm(gate), valid, cache)
        gate = gate if self.linear is None else self.linear(gate)
        return value * self.act(gate), kept


class ConvolutionalGatingMLP(nn.Module):
    """A projection, a `SpatialGatingUnit` and a second projection."""

    def __init__(self, dim: int, config: Gating) -> None:
        super().__init__()
        self.config = config
        self.channel_proj1 = nn.Sequential(nn.Linear(dim, config.hidden), nn.GELU())
        self.csgu = SpatialGatingUnit(config)
        self.channel_proj2 = nn.Linear(config.channels, dim)

    def forward(self, x: Tensor, valid: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Apply the layer to [batch, time, dim]; also return the frames to cache."""
        y, kept = self.csgu(self.channel_proj1(x), valid, cache)
        return self.channel_proj2(y), kept


def gating(g: GraphBuilder, x: ir.Value, module: ConvolutionalGatingMLP, around: Surroundings, row: int) -> ir.Value:
    """Return the output for `x` [batch, time, dim]. `row` is the block's row in the histories of `around`."""
    unit, kind = module.csgu, module.config.activation
    with g.scope("cgmlp", group="feed_forward"):
        projections = (half(g, x, module.channel_proj1[0], "channel_proj1", name) for name in ("value", "gate"))
        value, gate = (g.call(layers.activation_layer("gelu"), y)[0] for y in projections)
        with g.scope("csgu"):
            gate = normalization(g, gate, unit.norm, "norm")
            gate = unit.conv.nodes(g, gate, around, row, "conv")
            if unit.linear is not None:
                gate = linear(g, gate, unit.linear, "linear")
            if kind != "identity":
                (gate,) = g.call(layers.activation_layer(kind), gate)
            y = g.op("Mul", value, gate)
        return linear(g, y, module.channel_proj2, "channel_proj2")


class TwoBranchBlock(nn.Module):
    """The common base of blocks that run attention in parallel with a gating MLP."""

    def __init__(self, config: EncoderArchitecture, gates: Gating) -> None:
        super().__init__()
        self.attn = MultiHeadAttention(config.dim, config.attention)
        self.cgmlp = ConvolutionalGatingMLP(config.dim, gates)
        self.norm_mha, self.norm_mlp, self.norm_final = (nn.LayerNorm(config.dim) for _ in range(3))

    def branches(self, x: Tensor, context: Context, caches: BlockCaches) -> tuple[Tensor, Tensor, BlockCaches]:
        """Return the outputs of attention and of the gating MLP, and the caches, updated with this call's frames."""
        branch = self.norm_mha(x)
        following = {ATT_CACHE: self.attn.keys_values(branch, caches.get(ATT_CACHE))}
        attended = self.attn(branch, following[ATT_CACHE], context.mask, context.positions)
        gated, gates = self.cgmlp(self.norm_mlp(x), context.valid, caches.get(CNN_CACHE))
        return attended, gated, following | ({} if gates is None else {CNN_CACHE: gates})


class TwoBranchNodes(EncoderNodes):
    """Builds the graph layers that all encoders with a `TwoBranchBlock` share."""

    ATTENTION = "attn"

    def share(self, x: ir.Value) -> None:
        """See `EncoderNodes`."""
        super().share(x)
        modules = [cast("TwoBranchBlock", block).cgmlp for block in self.encoder.encoders]
        gates, config = None, modules[0].config
        if config.causal and config.kernel > 1:
            with self.g.scope(group="convolution_state"):
                shape = (len(modules), 1, 1, config.channels)
                # the normalisation turns the zeros before the first frame into its bias
                biases: list[Tensor] = [module.csgu.norm.bias for module in modules]
                gates = parameter(self.g, "initial_gates", shape, lambda: torch.stack(biases)[:, None, None])
        self.seen = self.around(gates)

    def branches(self, residual: Residual, block: TwoBranchBlock, index: int) -> tuple[ir.Value, ir.Value]:
        """Return the outputs of attention and of the gating MLP."""
        attended = self.self_attention(residual.normalized(block.norm_mha, "norm_mha"), block, index)
        y = residual.normalized(block.norm_mlp, "norm_mlp")
        return attended, gating(self.g, y, block.cgmlp, self.seen, index)
