"""The Branchformer (arXiv 2207.02971) and the E-Branchformer (arXiv 2210.00077).

Their blocks run attention in parallel with a convolutional gating MLP (arXiv 2105.08050). The Branchformer merges the
branches by a projection, the E-Branchformer by a convolution.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture, FeedForward, encoder_architecture, read_kernel
from u2moe.export.attention import MultiHeadAttention
from u2moe.export.convolution import Surroundings, TimeDepthwise
from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE, BlockCaches, Context, EncoderBlock
from u2moe.export.encoders.nodes import EncoderNodes, next_history
from u2moe.export.layers import Residual, half, linear, normalization, parameter
from u2moe.export.moe import activation, feed_forward
from u2moe.export.text_files import Section
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.graph.builder import GraphBuilder

MergeMethod = Literal["concat", "learned_ave", "fixed_ave"]
MERGE_METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)
MERGE_CACHE = "merge_cache"


@dataclass(frozen=True, kw_only=True)
class Gating:
    """Settings of a convolutional gating MLP."""

    hidden: int  # outputs of the first projection; half of them are the gate
    kernel: int
    causal: bool
    linear: bool  # whether a projection follows the convolution
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
    causal, linear = conf.flag("causal", default=False), conf.flag("use_linear_after_conv", default=False)
    kernel = read_kernel(conf, "cgmlp_conv_kernel", 31, causal=causal)
    kind = conf.choice("gate_activation", "identity", ("identity", *ACTIVATIONS))
    return Gating(hidden=hidden, kernel=kernel, causal=causal, linear=linear, activation=kind)


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


class TwoBranchBlock(EncoderBlock):
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

    def _share(self, x: ir.Value) -> None:
        super()._share(x)
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
        attended = self._self_attention(residual.normalized(block.norm_mha, "norm_mha"), block, index)
        return attended, gating(self.g, residual.normalized(block.norm_mlp, "norm_mlp"), block.cgmlp, self.seen, index)


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Settings that only the Branchformer encoder has."""

    gating: Gating
    merge: MergeMethod  # `learned_ave` weights the branches by averages over the whole utterance, so it cannot stream
    gating_weights: tuple[float, ...]  # of the gating MLP in each block, for `fixed_ave`; attention has 1 minus this


def read_branchformer(top: Section) -> EncoderArchitecture:
    """Return the architecture described by a train.yaml."""
    conf = top.section("encoder_conf")
    gates = read_gating(conf)
    for branch in ("use_attn", "use_cgmlp"):
        if not conf.flag(branch, default=True):
            raise conf.unsupported(branch, conf.value(branch), ("true",))
    conf.known |= {"stochastic_depth_rate", "attn_branch_drop_rate"}  # training only
    merge = conf.choice("merge_method", "concat", MERGE_METHODS)
    # blocks have the gating MLP in place of a feed-forward layer
    feed_forward = FeedForward(hidden=gates.hidden, activation="gelu")
    shared = two_branches(conf, top, causal=gates.causal and merge != "learned_ave", feed_forward=feed_forward)
    weights = _weights(conf, shared.num_blocks, needed=merge == "fixed_ave")
    return replace(shared, own=Branches(gating=gates, merge=merge, gating_weights=weights))


def _weights(conf: Section, num_blocks: int, *, needed: bool) -> tuple[float, ...]:
    """Return `cgmlp_weight` for each block. If `needed`, refuse 0 and 1, which make WeNet leave out a branch."""
    found = conf.value("cgmlp_weight")
    found = 0.5 if found is None else found
    listed: list[Any] = found if isinstance(found, list) else [found] * num_blocks
    are_numbers = all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in listed)
    if not are_numbers or len(listed) != num_blocks:
        raise conf.wrong("cgmlp_weight", found, f"a number, or one for each of {num_blocks} blocks")
    if needed and not all(0 < weight < 1 for weight in listed):
        raise conf.unsupported("cgmlp_weight", found, ("numbers above 0 and below 1",))
    return tuple(float(weight) for weight in listed)


class BranchformerBlock(TwoBranchBlock):
    """A residual block that runs attention in parallel with a gating MLP."""

    def __init__(self, config: EncoderArchitecture, index: int) -> None:
        own, dim = cast("Branches", config.own), config.dim
        super().__init__(config, own.gating)
        self.merge, self.gating_weight = own.merge, own.gating_weights[index]
        # WeNet creates these four projections for every merge method
        self.pooling_proj1, self.pooling_proj2 = nn.Linear(dim, 1), nn.Linear(dim, 1)
        self.weight_proj1, self.weight_proj2 = nn.Linear(dim, 1), nn.Linear(dim, 1)
        self.merge_proj = nn.Linear(2 * dim if own.merge == "concat" else dim, dim)

    @staticmethod
    def convolutions(config: EncoderArchitecture) -> list[tuple[str, int, int]]:
        """See `EncoderBlock`."""
        gates = cast("Branches", config.own).gating
        return [(CNN_CACHE, gates.channels, gates.kernel)] if gates.causal else []

    def forward(self, x: Tensor, context: Context, caches: BlockCaches) -> tuple[Tensor, BlockCaches]:
        """Apply the block to `x` [batch, time, dim]. Also return the caches, updated with this call's frames."""
        attended, gated, following = self.branches(x, context, caches)
        return self.norm_final(x + self.merge_proj(self._merged(attended, gated, context.valid))), following

    def _merged(self, attended: Tensor, gated: Tensor, valid: Tensor) -> Tensor:
        if self.merge == "concat":
            return torch.cat((attended, gated), dim=-1)
        if self.merge == "fixed_ave":
            return (1 - self.gating_weight) * attended + self.gating_weight * gated
        parts = (attended, self.pooling_proj1, self.weight_proj1), (gated, self.pooling_proj2, self.weight_proj2)
        logits = []
        for branch, pooling, weight in parts:
            scores = pooling(branch) / branch.shape[-1] ** 0.5
            shares = torch.softmax(scores.masked_fill(~valid.unsqueeze(-1), -torch.inf), dim=1)
            logits.append(weight((shares * branch).sum(dim=1)))
        weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
        return weights[:, 0, None, None] * attended + weights[:, 1, None, None] * gated


class BranchformerNodes(TwoBranchNodes):
    """Builds the encoder as layers of a graph."""

    def _block(self, residual: Residual, block: nn.Module, index: int) -> None:
        own = cast("BranchformerBlock", block)
        branches = self.branches(residual, own, index)
        with self.g.scope(group="feed_forward"):
            residual.add_branch(linear(self.g, self._merged(*branches, own), own.merge_proj, "merge_proj"))
        residual.normalize(own.norm_final, "norm_final")

    def _merged(self, attended: ir.Value, gated: ir.Value, block: BranchformerBlock) -> ir.Value:
        g, weight = self.g, block.gating_weight
        if block.merge == "concat":
            return g.op("Concat", attended, gated, axis=-1)
        if block.merge == "fixed_ave":
            return g.op("Add", g.op("Mul", attended, 1 - weight), g.op("Mul", gated, weight))
        first = self._logit(attended, block.pooling_proj1, block.weight_proj1, "1")
        second = self._logit(gated, block.pooling_proj2, block.weight_proj2, "2")
        shares = g.op("Softmax", g.op("Concat", first, second, axis=-1), axis=-1)  # [batch, 1, 2]
        first, second = g.ops("Split", shares, [1, 1], num_outputs=2, axis=-1)
        return g.op("Add", g.op("Mul", first, attended), g.op("Mul", second, gated))

    def _logit(self, branch: ir.Value, pooling: nn.Linear, weight: nn.Linear, number: str) -> ir.Value:
        """Return the logit [batch, 1, 1] of a branch, computed from a weighted average of its valid frames."""
        g = self.g
        scores = g.op("Mul", linear(g, branch, pooling, f"pooling_proj{number}"), self.config.dim**-0.5)
        bias = g.op("Transpose", g.op("Squeeze", self.frames.bias, [1]), perm=[0, 2, 1])
        shares = g.op("Softmax", g.op("Add", scores, bias), axis=1)
        return linear(g, g.op("ReduceSum", g.op("Mul", shares, branch), [1]), weight, f"weight_proj{number}")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Settings that only the E-Branchformer encoder has."""

    gating: Gating
    merge_kernel: int  # taps of the convolution that merges the branches
    feed_forward: bool  # whether blocks have one after the branches and, with macaron, one before them


def read_e_branchformer(top: Section) -> EncoderArchitecture:
    """Return the architecture described by a train.yaml."""
    conf = top.section("encoder_conf")
    gates = read_gating(conf)
    kernel = read_kernel(conf, "merge_conv_kernel", 3, causal=gates.causal)
    own = Merged(gating=gates, merge_kernel=kernel, feed_forward=conf.flag("use_ffn", default=True))
    conf.known |= {"stochastic_depth_rate", "conv_bias", "merge_method"}  # training only, or for other layers
    shared = two_branches(conf, top, causal=gates.causal)
    return replace(shared, macaron=shared.macaron and own.feed_forward, own=own)


class EBranchformerBlock(TwoBranchBlock):
    """Residual layers: feed-forward (macaron, optional), attention beside a gating MLP, and feed-forward (optional).

    WeNet's forward_chunk drops the history of the merging convolution after each chunk. Here that history is cached, so
    the output equals that of training, which encodes the whole utterance with a chunk mask.
    """

    def __init__(self, config: EncoderArchitecture, index: int) -> None:  # noqa: ARG002 - all blocks are alike
        own, dim = cast("Merged", config.own), config.dim
        super().__init__(config, own.gating)
        self.feed_forward = feed_forward(dim, config.feed_forward) if own.feed_forward else None
        self.feed_forward_macaron = feed_forward(dim, config.feed_forward) if config.macaron else None
        if own.feed_forward:
            self.norm_ff = nn.LayerNorm(dim)
        if config.macaron:
            self.norm_ff_macaron = nn.LayerNorm(dim)
        self.depthwise_conv_fusion = TimeDepthwise(2 * dim, own.merge_kernel, causal=own.gating.causal)
        self.merge_proj = nn.Linear(2 * dim, dim)
        self.scale = 0.5 if config.macaron else 1.0

    @staticmethod
    def convolutions(config: EncoderArchitecture) -> list[tuple[str, int, int]]:
        """See `EncoderBlock`."""
        own = cast("Merged", config.own)
        caches = [(CNN_CACHE, own.gating.channels, own.gating.kernel), (MERGE_CACHE, 2 * config.dim, own.merge_kernel)]
        return caches if own.gating.causal else []

    def forward(self, x: Tensor, context: Context, caches: BlockCaches) -> tuple[Tensor, BlockCaches]:
        """Apply the block to `x` [batch, time, dim]. Also return the caches, updated with this call's frames."""
        if self.feed_forward_macaron is not None:
            x = x + self.scale * self.feed_forward_macaron(self.norm_ff_macaron(x))
        attended, gated, following = self.branches(x, context, caches)
        both = torch.cat((attended, gated), dim=-1)
        convolution = self.depthwise_conv_fusion
        history = caches.get(MERGE_CACHE, both.new_zeros(1, both.shape[2], convolution.kernel_size[0] - 1))
        merged, kept = convolution.over(both, context.valid, history)
        x = x + self.merge_proj(both + merged)
        if self.feed_forward is not None:
            x = x + self.scale * self.feed_forward(self.norm_ff(x))
        return self.norm_final(x), following | ({} if kept is None else {MERGE_CACHE: kept})


class EBranchformerNodes(TwoBranchNodes):
    """Builds the encoder as layers of a graph."""

    def _share(self, x: ir.Value) -> None:
        super()._share(x)
        initial = None
        if self.own.gating.causal and self.own.merge_kernel > 1:
            initial = self.g.constant(np.zeros((self.config.num_blocks, 1, 1, 2 * self.config.dim), np.float32))
        self.merges = self.around(initial, MERGE_CACHE)

    def _block(self, residual: Residual, block: nn.Module, index: int) -> None:
        g, own = self.g, cast("EBranchformerBlock", block)
        if own.feed_forward_macaron is not None:
            layer = self.feed_forward(own.feed_forward_macaron, "feed_forward_macaron", own.scale)
            residual.add(layer, own.norm_ff_macaron, "norm_ff_macaron")
        both = g.op("Concat", *self.branches(residual, own, index), axis=-1)
        merged = own.depthwise_conv_fusion.nodes(g, both, self.merges, index, "depthwise_conv_fusion")
        with g.scope(group="feed_forward"):
            residual.add_branch(linear(g, g.op("Add", both, merged), own.merge_proj, "merge_proj"))
        if own.feed_forward is not None:
            residual.add(self.feed_forward(own.feed_forward, "feed_forward", own.scale), own.norm_ff, "norm_ff")
        residual.normalize(own.norm_final, "norm_final")

    def _next_caches(self) -> dict[str, ir.Value]:
        kept = self.merges.kept
        merges = {f"r_{MERGE_CACHE}": next_history(self.g, kept)} if kept else {}
        return super()._next_caches() | merges
