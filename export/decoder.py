"""The attention decoders in plain torch, tensor names as in WeNet's state dict."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from u2moe.export.architecture import Decoder
from u2moe.export.attention import MultiHeadAttention, added, norm, positional_encoding
from u2moe.export.moe import feed_forward
from u2moe.export.positions import LearnedPositions


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoder, feed-forward, each residual."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = MultiHeadAttention(config.dim, config.self_attention)
        self.src_attn = MultiHeadAttention(config.dim, config.cross_attention)
        self.feed_forward = feed_forward(config.dim, config.feed_forward)
        self.norm1 = norm(config.dim, config.norm)
        self.norm2 = norm(config.dim, config.norm)
        self.norm3 = norm(config.dim, config.norm)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        """[rows, length, dim] to the same; `memory` [rows, time, dim]; masks broadcast to [rows, 1, length, keys]."""
        own, source = self.self_attn, self.src_attn
        x = added(x, lambda y: cast("Tensor", own(y, own.keys_values(y), mask)), self.norm1, self.pre_norm)
        x = added(
            x, lambda y: cast("Tensor", source(y, source.keys_values(memory), memory_mask)), self.norm2, self.pre_norm
        )
        return added(x, self.feed_forward, self.norm3, self.pre_norm)


class AttentionDecoder(nn.Module):
    """One direction of the attention decoder."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.config = config
        learned = [LearnedPositions(config.dim)] if config.learned_positions else []
        self.embed = nn.Sequential(nn.Embedding(config.vocab_size, config.dim), *learned)
        self.decoders = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_blocks))
        self.after_norm = norm(config.dim, config.norm)
        self.output_layer = nn.Linear(config.dim, config.vocab_size)

    @property
    def embedding(self) -> nn.Embedding:
        """The table of token embeddings."""
        return cast("nn.Embedding", self.embed[0])

    def forward(self, inputs: Tensor, lengths: Tensor, memory: Tensor, visible: Tensor) -> Tensor:
        """Logits [rows, length, vocab] for the token after each of `inputs` [rows, length], which start with sos.

        `visible` is true for the frames of `memory` [rows, time, dim] to attend to [rows, time].
        """
        length = inputs.shape[1]
        steps = torch.arange(length, device=inputs.device)
        mask = (steps.unsqueeze(1) >= steps) & (steps < lengths.view(-1, 1, 1))
        memory_mask = visible.unsqueeze(1).unsqueeze(1)
        x = self.embedding(inputs)
        if self.config.learned_positions:
            x = x + self.embed[1](steps)
        else:
            x = x * math.sqrt(self.config.dim) + positional_encoding(steps, self.config.dim)
        for block in self.decoders:
            x = block(x, mask.unsqueeze(1), memory, memory_mask)
        return cast("Tensor", self.output_layer(self.after_norm(x) if self.config.pre_norm else x))


class BidirectionalDecoder(nn.Module):
    """Both directions, named as in WeNet's state dict."""

    def __init__(self, left: Decoder, right: Decoder) -> None:
        super().__init__()
        self.left_decoder = AttentionDecoder(left)
        self.right_decoder = AttentionDecoder(right)
