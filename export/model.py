"""The U2++ network in plain torch: encoder, CTC head and decoders, tensor names as in WeNet's state dict."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from u2moe.export.architecture import Architecture
from u2moe.export.decoder import AttentionDecoder, BidirectionalDecoder
from u2moe.export.encoders.kinds import KINDS


class CTCHead(nn.Module):
    """Projection to log-probabilities over the vocabulary."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(dim, vocab_size)

    def forward(self, encoder_out: Tensor) -> Tensor:
        """[batch, time, dim] to log-probabilities [batch, time, vocab]."""
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
        """Frames that the decoders attend to [rows, time]: all valid ones, or those that are no blank."""
        valid = torch.arange(encoder_out.shape[1], device=encoder_out.device) < encoder_lengths.unsqueeze(1)
        if not self.config.non_blank_memory:
            return valid
        spoken = valid & (self.ctc.ctc_lo(encoder_out).argmax(dim=-1) != 0)
        # WeNet fails where all frames are blank; to attend to them all is one answer to a question without any
        return torch.where(spoken.any(dim=1, keepdim=True), spoken, valid)

    def score(
        self, hypotheses: Tensor, lengths: Tensor, encoder_out: Tensor, encoder_lengths: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Token scores as the decoder graph gives them, see `u2moe.runtime.bundle.contract.decoder`.

        `hypotheses` [rows, length] without sos and eos, `encoder_out` [rows, time, dim].
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
