"""Positional encodings: added to the input of the blocks, or read by their attention."""

import math
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.attention import inverse_frequencies, positional_encoding
from u2moe.export.layers import parameter
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.builder import GraphBuilder

TABLE_LENGTHS = {"rel_pos": 5000, "abs_pos": 5000, "abs_pos_whisper": 1500, "rope_pos": 3000}
"""Number of positions in the tables that WeNet saves. Here encodings are computed, so positions are unlimited."""
NUM_LEARNED = 448  # number of positions that can be learned. WeNet has no setting for it


class LearnedPositions(nn.Module):
    """A learned encoding for each of `NUM_LEARNED` positions. A longer utterance is an error."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pe = nn.Parameter(torch.zeros(1, NUM_LEARNED, dim))

    def forward(self, positions: Tensor) -> Tensor:
        """Return encodings [..., dim] of positions [...]."""
        return self.pe[0][positions]

    def nodes(self, g: GraphBuilder, positions: ir.Value) -> ir.Value:
        """Build `forward` in a graph. Negative positions are padding that no frame sees, and get the first encoding."""
        with g.scope(group="positions"):
            table = parameter(g, "pe", tuple(self.pe.shape[1:]), lambda: self.pe[0])
        with g.scope(f"REFUSED: there are {NUM_LEARNED} learned positions"):  # onnxruntime's error names this node
            return g.op("Gather", table, g.op("Max", positions, 0), axis=0)


def encodings(config: EncoderArchitecture, positions: Tensor) -> Tensor:
    """Return encodings [..., dim] of positions [...], or angles [..., size] of rotary positions."""
    if config.positions == "no_pos":
        return torch.zeros(*positions.shape, config.dim, device=positions.device)
    if config.positions in ("rel_pos", "abs_pos"):
        return positional_encoding(positions, config.dim)
    angles = positions.float().unsqueeze(-1) * torch.tensor(_frequencies(config), device=positions.device)
    return angles if config.positions == "rope_pos" else torch.cat((angles.sin(), angles.cos()), dim=-1)


def encoding_nodes(g: GraphBuilder, config: EncoderArchitecture, positions: ir.Value) -> Sequence[ir.Value]:
    """Return encodings of int64 positions [batch, keys]. For `rope_pos`: cosines and sines. For `no_pos`: []."""
    if config.positions == "no_pos":
        return []
    with g.scope("positional_encoding"):
        if config.positions in ("rel_pos", "abs_pos"):
            return g.call(layers.sinusoids(inverse_frequencies(config.dim).tolist()), positions)
        frequencies = _frequencies(config)
        halves = g.call(layers.sines_and_cosines(frequencies), positions)
        if config.positions == "abs_pos_whisper":
            return halves
        sines, cosines = g.ops("Split", halves[0], [len(frequencies)] * 2, axis=-1, num_outputs=2)
        return [cosines, sines]


def position_table(config: EncoderArchitecture, length: int) -> Tensor | None:
    """Return the table that WeNet saves, if any: [1, length, dim], or [1, length, size, 2] for rotary positions."""
    if config.positions == "no_pos" or config.learned_positions:
        return None
    table = encodings(config, torch.arange(length)).unsqueeze(0)
    return torch.stack((table.cos(), table.sin()), dim=-1) if config.positions == "rope_pos" else table


def _frequencies(config: EncoderArchitecture) -> list[float]:
    """Return angular frequencies, computed in Python: the last bit of torch's results depends on the processor."""

    def single(value: float) -> float:
        return torch.tensor(value, dtype=torch.float32).item()

    if config.positions == "rope_pos":
        number = config.attention.head_dim // 2
        return [1 / single(10000.0 ** single(index / number)) for index in range(number)]
    number = config.dim // 2  # abs_pos_whisper
    return [math.exp(single(-(math.log(10000) / (number - 1)) * index)) for index in range(number)]
