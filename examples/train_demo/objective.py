"""The loss of U2++: CTC, and attention decoders in two directions. Each batch trains one of the decoders at random."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from batches import Batch
from network import block_outputs, decode, head
from torch import Tensor, nn
from torch.nn import functional

from u2moe.export.model import SpeechModel

MAX_CHUNK = 25
ANSWERING = 3 / 4
"""Share of the encoder blocks after which the teacher's targets are predicted. Later blocks are trained only on
words."""
DELAY = 1
"""Number of frames by which the prediction is delayed, since the encoder's convolutions look back; see the README."""
CONSISTENCY = 0.2
"""Weight of the consistency of two views, relative to their CTC loss (arXiv 2410.05101)."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Weights of the parts of the loss, and the parts of the network that are trained."""

    ctc_weight: float
    reverse_weight: float
    """Share of the right-to-left decoder in the attention loss."""
    smoothing: float
    channels: int
    """Channels of the first convolution that are used. With 128 channels it is a third of all work, with 32 a tenth."""

    teacher_weight: float = 0.0
    """Weight of the distance from a teacher's targets for the same speech."""

    @classmethod
    def of(cls, model_conf: dict[str, Any], channels: int, teacher_weight: float = 0.0) -> "Objective":
        """Return the objective of WeNet's `model_conf`."""
        return cls(
            ctc_weight=model_conf["ctc_weight"],
            reverse_weight=model_conf["reverse_weight"],
            smoothing=model_conf["lsm_weight"],
            channels=channels,
            teacher_weight=teacher_weight,
        )


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean loss per token of each part. A decoder that is not trained has no loss."""

    ctc: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    consistency: Tensor | None = None
    """Divergence between two views of the same speech; None with one view."""

    teacher: Tensor | None = None
    """Distance from a teacher's targets: 1 for a network that knows nothing, 0 for a perfect one."""

    def total(self, objective: Objective) -> Tensor:
        """Return the weighted sum of the parts. If only one decoder is trained, its loss counts for the two."""
        words = self._of_words(objective)
        return words if self.teacher is None else words + objective.teacher_weight * self.teacher

    def _of_words(self, objective: Objective) -> Tensor:
        parts = [part for part in (self.left, self.right) if part is not None]
        if not parts:
            return self.ctc
        attention = parts[0]
        if self.left is not None and self.right is not None:
            attention = torch.lerp(self.left, self.right, objective.reverse_weight)
        ctc = self.ctc if self.consistency is None else self.ctc + CONSISTENCY * self.consistency
        return objective.ctc_weight * ctc + (1 - objective.ctc_weight) * attention


def random_chunk(num_frames: int, rng: random.Random) -> int | None:
    """Draw a chunk size as WeNet does: full context (None) half of the time, otherwise 1 to 25 encoder frames."""
    chunk = rng.randint(1, max(num_frames - 1, 1))
    return None if chunk > num_frames // 2 else chunk % MAX_CHUNK + 1


def ctc_loss(log_probs: Tensor, times: Tensor, batch: Batch, blank: int) -> Tensor:
    """Return the mean CTC loss per token. A clip without speech counts as one token."""
    total = functional.ctc_loss(
        log_probs.transpose(0, 1),
        batch.tokens.clamp(min=0),
        times,
        batch.token_lengths,
        blank,
        "sum",
        zero_infinity=True,
    )
    return total / batch.token_lengths.clamp(min=1).sum()


def consistency(log_probs: Tensor, times: Tensor, batch: Batch) -> Tensor:
    """Return the divergence between the two views of each frame, per token as for the CTC loss.

    `log_probs` [2 * batch, time, vocab] has the first views, then the second views. Each view is trained toward the
    other view, which is held constant (arXiv 2410.05101).
    """
    other = torch.cat(log_probs.detach().chunk(2)[::-1])
    divergence = (other.exp() * (other - log_probs)).sum(-1)
    inside = torch.arange(log_probs.shape[1], device=times.device) < times.unsqueeze(1)
    return (divergence * inside).sum() / batch.token_lengths.clamp(min=1).sum()


def teacher_loss(answer: nn.Module, states: Tensor, times: Tensor, targets: Tensor) -> Tensor | None:
    """Return the mean squared distance between predictions and targets. None: no frame has a target.

    `answer` makes predictions from `states` [batch, time, dim]. The variances of the targets sum to 1.
    """
    states, targets = states[:, DELAY:], targets[:, : states.shape[1] - DELAY]
    steps = torch.arange(states.shape[1], device=targets.device)
    told = (steps < times.unsqueeze(1) - DELAY) & ~targets[..., 0].isnan()
    if not told.any():
        return None
    distance: Tensor = answer(states[told]).float() - targets[told]
    return distance.square().sum(-1).mean()


def attention_loss(
    model: SpeechModel, encoder_out: Tensor, times: Tensor, batch: Batch, smoothing: float, *, backwards: bool
) -> Tensor:
    """Return the mean cross entropy per token of one decoder, which reads forwards or backwards."""
    decoder = model.right_decoder if backwards else model.left_decoder
    if decoder is None:
        raise ValueError("this recipe trains decoders in both directions")
    tokens, lengths = batch.tokens, batch.token_lengths.unsqueeze(1)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    inside = steps < lengths
    if backwards:
        tokens = tokens.gather(1, torch.where(inside, lengths - 1 - steps, steps))
    start = tokens.new_full((len(tokens), 1), model.config.sos)
    inputs = torch.cat((start, tokens.masked_fill(~inside, model.config.eos)), 1)
    targets = torch.cat((tokens, torch.full_like(start, -1)), 1).scatter(1, lengths, model.config.eos)
    logits = decode(decoder, inputs, batch.token_lengths + 1, encoder_out, times).float()
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, label_smoothing=smoothing)


def losses(
    model: SpeechModel,
    batch: Batch,
    objective: Objective,
    chunk_sizes: Sequence[int | None],
    directions: tuple[bool, ...],
) -> tuple[Losses, Tensor, Tensor]:
    """Return the losses of a batch, and the encoder's output and times.

    `chunk_sizes` has the number of frames that the encoder sees at once (None: all) for each view of the speech. With
    two views, the second half of the batch repeats the first half under other conditions. `directions` names the
    decoders to train: False is the one that reads forwards, and True the one that reads backwards.
    """
    outputs, times = block_outputs(model.encoder, batch.mels, batch.lengths, chunk_sizes, objective.channels)
    encoder_out, answer = model.encoder.after_norm(outputs[-1]), head(model)
    taught = None
    if answer is not None and batch.targets is not None:
        taught = teacher_loss(answer, outputs[int(ANSWERING * len(outputs)) - 1], times, batch.targets)
    attention = {
        backwards: attention_loss(model, encoder_out, times, batch, objective.smoothing, backwards=backwards)
        for backwards in directions
    }
    log_probs = model.ctc.ctc_lo(encoder_out).float().log_softmax(-1)
    parts = Losses(
        ctc=ctc_loss(log_probs, times, batch, model.config.blank),
        left=attention.get(False),
        right=attention.get(True),
        consistency=consistency(log_probs, times, batch) if len(chunk_sizes) == 2 else None,
        teacher=taught,
    )
    return parts, encoder_out, times
