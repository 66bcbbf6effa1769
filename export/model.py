"""The U2++ network in plain torch: encoder, CTC head and decoders, with the tensor names of WeNet's state dict."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from u2moe.export.architecture import Architecture, Decoder
from u2moe.export.attention import MultiHeadAttention, added, norm, positional_encoding
from u2moe.export.encoders.kinds import KINDS
from u2moe.export.moe import feed_forward
from u2moe.export.positions import LearnedPositions


class DecoderBlock(nn.Module):
    """Residual layers: causal self-attention, attention to the encoder's output, and feed-forward."""

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
        """Apply the block to [rows, length, dim], with `memory` [rows, time, dim] and masks [rows, 1, length, keys]."""
        own, source = self.self_attn, self.src_attn
        x = added(x, lambda y: own(y, own.keys_values(y), mask), self.norm1, self.pre_norm)
        x = added(x, lambda y: source(y, source.keys_values(memory), memory_mask), self.norm2, self.pre_norm)
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
        """Return logits [rows, length, vocab] for the token after each of `inputs` [rows, length].

        Each row of `inputs` starts with sos. `visible` [rows, time] is true for frames of `memory` [rows, time, dim]
        that the decoder may attend to.
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
    """The decoders of both directions, with the tensor names of WeNet's state dict."""

    def __init__(self, left: Decoder, right: Decoder) -> None:
        super().__init__()
        self.left_decoder = AttentionDecoder(left)
        self.right_decoder = AttentionDecoder(right)


class CTCHead(nn.Module):
    """Projection to log-probabilities over the vocabulary."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(dim, vocab_size)

    def forward(self, encoder_out: Tensor) -> Tensor:
        """Return log-probabilities [batch, time, vocab] for [batch, time, dim]."""
        return torch.log_softmax(self.ctc_lo(encoder_out), dim=-1)


class SpeechModel(nn.Module):
    """Encoder, CTC head and attention decoders of one checkpoint."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config
        self.encoder = KINDS[config.encoder.kind].network(config.encoder)
        self.ctc = CTCHead(config.encoder.dim, config.vocab_size)
        self.decoder: nn.Module | None = None
        if config.left_decoder is not None and config.right_decoder is not None:
            self.decoder = BidirectionalDecoder(config.left_decoder, config.right_decoder)
        elif config.left_decoder is not None:
            self.decoder = AttentionDecoder(config.left_decoder)

    @property
    def left_decoder(self) -> AttentionDecoder:
        """The left-to-right decoder; ValueError if the checkpoint has none."""
        if isinstance(self.decoder, BidirectionalDecoder):
            return self.decoder.left_decoder
        if isinstance(self.decoder, AttentionDecoder):
            return self.decoder
        raise ValueError("this model has no attention decoder")

    @property
    def right_decoder(self) -> AttentionDecoder | None:
        """The right-to-left decoder, if there is one."""
        return self.decoder.right_decoder if isinstance(self.decoder, BidirectionalDecoder) else None

    def _visible(self, encoder_out: Tensor, encoder_lengths: Tensor) -> Tensor:
        """Return a mask [rows, time] of the frames that the decoders attend to: all valid or all non-blank frames."""
        valid = torch.arange(encoder_out.shape[1], device=encoder_out.device) < encoder_lengths.unsqueeze(1)
        if not self.config.non_blank_memory:
            return valid
        spoken = valid & (self.ctc.ctc_lo(encoder_out).argmax(dim=-1) != 0)
        # WeNet fails if all frames are blank; here the decoders then attend to all of them
        return torch.where(spoken.any(dim=1, keepdim=True), spoken, valid)

    def score(
        self, hypotheses: Tensor, lengths: Tensor, encoder_out: Tensor, encoder_lengths: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the decoder graph's `score`, `r_score` (None without a right decoder) and `next_log_probs`.

        `u2moe.runtime.bundle.contract.decoder` describes them. `hypotheses` [rows, length] exclude sos and eos;
        `encoder_out` is [rows, time, dim].
        """
        rows, length = hypotheses.shape
        steps = torch.arange(length + 1, device=hypotheses.device)
        inside = steps[:length] < lengths.unsqueeze(1)
        padded = hypotheses.masked_fill(~inside, self.config.eos)
        targets = torch.cat((padded, padded.new_full((rows, 1), self.config.eos)), dim=1)
        scored = steps <= lengths.unsqueeze(1)
        visible = self._visible(encoder_out, encoder_lengths)

        def log_probs(decoder: AttentionDecoder, tokens: Tensor) -> Tensor:
            inputs = torch.cat((tokens.new_full((rows, 1), self.config.sos), tokens), dim=1)
            return torch.log_softmax(decoder(inputs, lengths + 1, encoder_out, visible), dim=-1)

        def gathered(distribution: Tensor, wanted: Tensor) -> Tensor:
            return distribution.gather(2, wanted.unsqueeze(2)).squeeze(2)

        left = log_probs(self.left_decoder, padded)
        score = gathered(left, targets).masked_fill(~scored, 0.0)
        following = left[torch.arange(rows), lengths]
        if self.right_decoder is None:
            return score, None, following
        # position j of the reversed hypothesis is token lengths-1-j; eos stays where it is
        mirror = torch.where(scored & (steps < lengths.unsqueeze(1)), lengths.unsqueeze(1) - 1 - steps, steps)
        reversed_targets = targets.gather(1, mirror)
        right = log_probs(self.right_decoder, reversed_targets[:, :length])
        r_score = gathered(right, reversed_targets).gather(1, mirror).masked_fill(~scored, 0.0)
        return score, r_score, following
