"""The E-Branchformer encoder (arXiv 2210.00077): attention and a gating MLP side by side, merged by a convolution."""

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.convolution import TimeDepthwise
from u2moe.export.encoders.cgmlp import Gating, TwoBranchBlock, TwoBranchNodes, read_gating, two_branches
from u2moe.export.encoders.network import CNN_CACHE, BlockCaches, Context, SpeechEncoder
from u2moe.export.encoders.nodes import next_history
from u2moe.export.layer_config import read_kernel
from u2moe.export.layers import Residual, linear
from u2moe.export.moe import feed_forward
from u2moe.export.yaml_section import Section

MERGE_CACHE = "merge_cache"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Settings that only the E-Branchformer encoder has."""

    gating: Gating
    merge_kernel: int
    """Taps of the convolution that merges the branches."""
    feed_forward: bool
    """Whether blocks have feed-forward layers: one after the branches and, with macaron, one before them."""


def read(top: Section) -> EncoderArchitecture:
    """Return the architecture described by a train.yaml."""
    conf = top.section("encoder_conf")
    gates = read_gating(conf)
    kernel = read_kernel(conf, "merge_conv_kernel", 3, causal=gates.causal)
    own = Merged(gating=gates, merge_kernel=kernel, feed_forward=conf.flag("use_ffn", default=True))
    conf.known |= {"stochastic_depth_rate", "conv_bias", "merge_method"}  # training only, or for other layers
    shared = two_branches(conf, top, causal=gates.causal)
    return replace(shared, macaron=shared.macaron and own.feed_forward, own=own)


class EBranchformerBlock(TwoBranchBlock):
    """Residual layers: macaron feed-forward, attention in parallel with a gating MLP, and feed-forward.

    Both feed-forward layers are optional. WeNet's forward_chunk drops the history of the merging convolution after each
    chunk. Here that history is cached. The output therefore equals that of training, which encodes the whole utterance
    with a chunk mask.
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


class EBranchformerEncoder(SpeechEncoder):
    """E-Branchformer blocks."""

    BLOCK = EBranchformerBlock

    @staticmethod
    def convolutions(config: EncoderArchitecture) -> list[tuple[str, int, int]]:
        """See `SpeechEncoder`."""
        own = cast("Merged", config.own)
        caches = [(CNN_CACHE, own.gating.channels, own.gating.kernel), (MERGE_CACHE, 2 * config.dim, own.merge_kernel)]
        return caches if own.gating.causal else []


class EBranchformerNodes(TwoBranchNodes):
    """Builds the encoder as layers of a graph."""

    def share(self, x: ir.Value) -> None:
        """See `EncoderNodes`."""
        super().share(x)
        own, initial = cast("Merged", self.config.own), None
        if own.gating.causal and own.merge_kernel > 1:
            initial = self.g.constant(np.zeros((self.config.num_blocks, 1, 1, 2 * self.config.dim), np.float32))
        self.merges = self.around(initial, MERGE_CACHE)

    def block(self, residual: Residual, block: nn.Module, index: int) -> None:
        """See `EncoderNodes`."""
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

    def next_caches(self) -> dict[str, ir.Value]:
        """See `EncoderNodes`."""
        kept = self.merges.kept
        merges = {f"r_{MERGE_CACHE}": next_history(self.g, kept)} if kept else {}
        return super().next_caches() | merges
