"""Depthwise convolutions over time that stand alone: in plain torch, and as one layer of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.layers import parameter, vector
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.convolution import DepthwiseConvolution


class TimeDepthwise(nn.Conv1d):
    """A depthwise convolution; it sees frames before each (causal), or as many after it as before."""

    def __init__(self, channels: int, kernel: int, *, causal: bool) -> None:
        super().__init__(channels, channels, kernel, padding=0 if causal else (kernel - 1) // 2, groups=channels)
        self.causal = causal

    def over(self, x: Tensor, valid: Tensor, history: Tensor) -> tuple[Tensor, Tensor | None]:
        """[batch, time, channels] to the same, and the last frames [batch, channels, kernel-1] if it is causal.

        `history` holds the frames before, [batch or 1, channels, kernel-1]; `valid` is true for frames that exist
        [batch, time]: others look like the end.
        """
        if not self.causal:
            return self(x.masked_fill(~valid.unsqueeze(-1), 0.0).transpose(1, 2)).transpose(1, 2), None
        past = self.kernel_size[0] - 1
        seen = torch.cat((history.expand(len(x), -1, -1).to(x.dtype), x.transpose(1, 2)), dim=2)
        return self(seen).transpose(1, 2), seen[:, :, seen.shape[2] - past :]


@dataclass(frozen=True)
class Surroundings:
    """The frames around those of a call, for one convolution in each block.

    Attributes:
        histories: frames before a chunk [blocks, batch, kernel - 1, channels], or for whole utterances the one that
            stands for all before the first [blocks, 1, 1, channels]; None: it sees none.
        valid: 1 for frames that exist [batch, time, 1], for whole utterances.
        streaming: whether this is a chunk.
    """

    histories: ir.Value | None
    valid: ir.Value | None
    streaming: bool


def depthwise(
    g: GraphBuilder, x: ir.Value, layer: TimeDepthwise, around: Surroundings, place: int, name: str
) -> tuple[ir.Value, ir.Value | None]:
    """The layer on [batch, time, channels], and what is to be cached; `place` is its block's in the histories."""
    channels, kernel = layer.in_channels, layer.kernel_size[0]
    form = DepthwiseConvolution(kernel=kernel)
    with g.scope(name, group="depthwise_convolutions"):
        weights = [
            parameter(g, "weight", (channels, 1, 1, kernel), lambda: layer.weight.unsqueeze(2)),
            vector(g, "bias", cast("Tensor", layer.bias)),
        ]
        if not layer.causal:
            return g.call(form.centred(channels), x, cast("ir.Value", around.valid), *weights)[0], None
        if around.histories is None:
            return g.call(form.causal(channels), x, *weights)[0], None
        if around.streaming:
            y, kept = g.call(form.cached(channels), x, around.histories, g.constant(place), *weights)
            return y, kept
        return g.call(form.causal(channels), x, around.histories, g.constant(place), *weights)[0], None
