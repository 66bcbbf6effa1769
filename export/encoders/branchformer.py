"""The Branchformer encoder (arXiv 2207.02971): attention and a gating MLP side by side, merged by a projection."""

from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture, FeedForward
from u2moe.export.encoders.cgmlp import Gating, TwoBranchBlock, TwoBranchNodes, read_gating, two_branches
from u2moe.export.encoders.network import CNN_CACHE, BlockCaches, Context, SpeechEncoder
from u2moe.export.layers import Residual, linear
from u2moe.export.yaml_section import Section

MergeMethod = Literal["concat", "learned_ave", "fixed_ave"]
MERGE_METHODS: tuple[MergeMethod, ...] = get_args(MergeMethod)


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Settings that only the Branchformer encoder has."""

    gating: Gating
    merge: MergeMethod
    """`learned_ave` weights the branches by averages over the whole utterance, so it cannot stream."""
    gating_weights: tuple[float, ...]
    """Weight of the gating MLP in each block, for `fixed_ave`; the weight of attention is 1 minus this."""


def read(top: Section) -> EncoderArchitecture:
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


class BranchformerEncoder(SpeechEncoder):
    """Branchformer blocks."""

    BLOCK = BranchformerBlock

    @staticmethod
    def convolutions(config: EncoderArchitecture) -> list[tuple[str, int, int]]:
        """See `SpeechEncoder`."""
        gates = cast("Branches", config.own).gating
        return [(CNN_CACHE, gates.channels, gates.kernel)] if gates.causal else []


class BranchformerNodes(TwoBranchNodes):
    """Builds the encoder as layers of a graph."""

    def block(self, residual: Residual, block: nn.Module, index: int) -> None:
        """See `EncoderNodes`."""
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
