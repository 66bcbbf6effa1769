"""The E-Branchformer encoder (arXiv 2210.00077): attention and a gating MLP side by side, merged by a convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.attention import MultiHeadAttention
from u2moe.export.depthwise import Surroundings, TimeDepthwise, depthwise
from u2moe.export.encoders.cgmlp import (
    ConvolutionalGatingMLP,
    Gating,
    gating,
    initial_gates,
    read_gating,
    read_kernel,
)
from u2moe.export.encoders.frames import next_history
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
from u2moe.export.layer_config import check_static_chunk, encoder_architecture
from u2moe.export.layers import Residual, linear
from u2moe.export.moe import feed_forward
from u2moe.export.yaml_section import Section
from u2moe.runtime.bundle.contract import Cache

MERGE_CACHE = "merge_cache"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Settings of this encoder alone."""

    gating: Gating
    merge_kernel: int
    """Taps of the convolution that merges the branches."""
    feed_forward: bool
    """Whether blocks have a feed-forward layer after the branches (and before them, if macaron)."""


def read(top: Section, *, normalized: bool) -> EncoderArchitecture:
    """The architecture in a train.yaml."""
    conf = top.section("encoder_conf")
    gates = read_gating(conf)
    own = Merged(
        gating=gates,
        merge_kernel=read_kernel(conf, "merge_conv_kernel", 3, causal=gates.causal),
        feed_forward=conf.flag("use_ffn", default=True),
    )
    for unused in ("stochastic_depth_rate", "conv_bias"):  # training only; a layer that these blocks do not have
        conf.value(unused)
    shared = encoder_architecture(
        conf,
        top,
        normalized=normalized,
        activation="swish",
        positions="rel_pos",
        attentions=("rel_selfattn", "selfattn"),
        num_blocks=12,
        has_macaron=True,
        has_order=False,
    )
    macaron = shared.macaron and own.feed_forward
    encoder = replace(shared, macaron=macaron, causal=gates.causal and shared.causal, own=own)
    check_static_chunk(conf, encoder)
    return encoder


class EBranchformerBlock(nn.Module):
    """Half feed-forward (macaron), attention beside a gating MLP, feed-forward, each residual; first and last optional.

    Between chunks, WeNet's forward_chunk forgets what the merging convolution has seen. Here it is cached, and the
    output is that of the whole utterance under a mask of chunks, as the network was trained.
    """

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__()
        own, dim = cast("Merged", config.own), config.dim
        self.attn = MultiHeadAttention(dim, config.attention)
        self.cgmlp = ConvolutionalGatingMLP(dim, own.gating)
        self.feed_forward = feed_forward(dim, config.feed_forward) if own.feed_forward else None
        self.feed_forward_macaron = feed_forward(dim, config.feed_forward) if config.macaron else None
        if own.feed_forward:
            self.norm_ff = nn.LayerNorm(dim)
        if config.macaron:
            self.norm_ff_macaron = nn.LayerNorm(dim)
        self.norm_mha, self.norm_mlp, self.norm_final = (nn.LayerNorm(dim) for _ in range(3))
        self.depthwise_conv_fusion = TimeDepthwise(2 * dim, own.merge_kernel, causal=own.gating.causal)
        self.merge_proj = nn.Linear(2 * dim, dim)
        self.scale = 0.5 if config.macaron else 1.0

    def forward(self, x: Tensor, context: Context, caches: BlockCaches) -> tuple[Tensor, BlockCaches]:
        """[batch, time, dim] to the same, and the caches with this call's frames appended."""
        if self.feed_forward_macaron is not None:
            x = x + self.scale * self.feed_forward_macaron(self.norm_ff_macaron(x))
        branch = self.norm_mha(x)
        following = {ATT_CACHE: with_past(caches, ATT_CACHE, self.attn.keys_values(branch))}
        attended = self.attn(branch, following[ATT_CACHE], context.mask, context.positions)
        gated, gates = self.cgmlp(self.norm_mlp(x), context.valid, caches.get(CNN_CACHE))
        both = torch.cat((attended, gated), dim=-1)
        convolution = self.depthwise_conv_fusion
        history = caches.get(MERGE_CACHE, both.new_zeros(1, both.shape[2], convolution.kernel_size[0] - 1))
        merged, kept = convolution.over(both, context.valid, history)
        x = x + self.merge_proj(both + merged)
        if self.feed_forward is not None:
            x = x + self.scale * self.feed_forward(self.norm_ff(x))
        found = {CNN_CACHE: gates, MERGE_CACHE: kept}
        return self.norm_final(x), following | {name: each for name, each in found.items() if each is not None}


class EBranchformerEncoder(SpeechEncoder):
    """E-Branchformer blocks."""

    def block(self, index: int) -> nn.Module:  # noqa: ARG002 - all are alike
        """See `SpeechEncoder`."""
        return EBranchformerBlock(self.config)

    @staticmethod
    def caches(config: EncoderArchitecture) -> tuple[Cache, ...]:
        """See `SpeechEncoder`."""
        own, num = cast("Merged", config.own), config.num_blocks
        caches = [attention_cache(config, num)]
        if own.gating.has_history:
            caches.append(Cache(name=CNN_CACHE, num_blocks=num, shape=(own.gating.channels, own.gating.kernel - 1)))
        if own.gating.causal and own.merge_kernel > 1:
            caches.append(Cache(name=MERGE_CACHE, num_blocks=num, shape=(2 * config.dim, own.merge_kernel - 1)))
        return tuple(caches)


class EBranchformerNodes(EncoderNodes):
    """The same as layers of a graph."""

    @property
    def longest_history(self) -> int:
        """See `EncoderNodes`."""
        own = cast("Merged", self.config.own)
        return max(own.gating.kernel, own.merge_kernel) - 1

    def share(self, x: ir.Value) -> None:
        """See `EncoderNodes`."""
        super().share(x)
        own = cast("Merged", self.config.own)
        gates = initial_gates(self.g, [cast("EBranchformerBlock", block).cgmlp for block in self.encoder.encoders])
        merges: ir.Value | None = None
        if own.gating.causal and own.merge_kernel > 1:
            merges = self.g.constant(np.zeros((self.config.num_blocks, 1, 1, 2 * self.config.dim), np.float32))
        self.gates, self.merges = self.around(gates, CNN_CACHE), self.around(merges, MERGE_CACHE)
        self.next_merges: list[ir.Value] = []

    def block(self, residual: Residual, block: nn.Module, index: int) -> None:
        """See `EncoderNodes`."""
        own = cast("EBranchformerBlock", block)
        if own.feed_forward_macaron is not None:
            layer = self.feed_forward(own.feed_forward_macaron, "feed_forward_macaron", own.scale)
            residual.add(layer, own.norm_ff_macaron, "norm_ff_macaron")
        attended = self.self_attention(residual.normalized(own.norm_mha, "norm_mha"), own.attn, index, "attn")
        gated, kept = gating(self.g, residual.normalized(own.norm_mlp, "norm_mlp"), own.cgmlp, self.gates, index)
        self.next_cnn += [] if kept is None else [kept]
        residual.add_branch(self._merged(attended, gated, own, index))
        if own.feed_forward is not None:
            residual.add(self.feed_forward(own.feed_forward, "feed_forward", own.scale), own.norm_ff, "norm_ff")
        residual.normalize(own.norm_final, "norm_final")

    def _merged(self, attended: ir.Value, gated: ir.Value, block: EBranchformerBlock, index: int) -> ir.Value:
        g = self.g
        both = g.op("Concat", attended, gated, axis=-1)
        merged, kept = depthwise(g, both, block.depthwise_conv_fusion, self.merges, index, "depthwise_conv_fusion")
        self.next_merges += [] if kept is None else [kept]
        with g.scope(group="feed_forward"):
            return linear(g, g.op("Add", both, merged), block.merge_proj, "merge_proj")

    def around(self, initial: ir.Value | None, cache: str) -> Surroundings:
        """The frames around those of this call, for a convolution with the frame `initial` before the first."""
        if initial is not None and cache in self.inputs:
            with self.g.scope("frames"):
                initial = self.frames.history(self.inputs[cache], initial)
        return Surroundings(initial, self.frames.valid, self.streaming)

    def next_caches(self) -> dict[str, ir.Value]:
        """See `EncoderNodes`."""
        merges = {f"r_{MERGE_CACHE}": next_history(self.g, self.next_merges)} if self.next_merges else {}
        return super().next_caches() | merges

    @staticmethod
    def attention_of(block: nn.Module) -> MultiHeadAttention:
        """See `EncoderNodes`."""
        return cast("EBranchformerBlock", block).attn
