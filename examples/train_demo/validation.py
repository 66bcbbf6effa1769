"""Losses and greedy word error rates of a network on sets that are not used for training."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from batches import Corpus, Tokenizer
from objective import Objective, losses
from torch import Tensor

from u2moe.export.model import SpeechModel
from u2moe.runtime.text.word_errors import WordErrors

CHUNK_SIZES = (None, 16)


@dataclass(frozen=True, kw_only=True)
class Score:
    """Losses per token, and the word error rate of the first pass without beam search."""

    chunk_size: int | None
    ctc: float
    left: float
    right: float
    word_error_rate: float
    teacher: float | None = None
    """Distance from a teacher's targets, if the network has a head that predicts them."""

    def __str__(self) -> str:
        losses = f"ctc {self.ctc:.3f} left {self.left:.3f} right {self.right:.3f}"
        taught = "" if self.teacher is None else f" teacher {self.teacher:.3f}"
        return f"chunk {self.chunk_size or 'all'}: {losses}{taught} WER {self.word_error_rate:.1%}"

    def columns(self) -> str:
        """Return context, losses and word error rate as columns of a table."""
        losses = f"{self.ctc:.4f}\t{self.left:.4f}\t{self.right:.4f}"
        return f"{self.chunk_size or 'all'}\t{losses}\t{self.word_error_rate:.4f}"


def greedy(log_probs: Tensor, blank: int) -> list[int]:
    """Return the tokens of the best path through `log_probs` [time, vocab], with repeats merged and blanks dropped."""
    best: list[int] = torch.unique_consecutive(log_probs.argmax(-1)).tolist()
    return [token for token in best if token != blank]


@torch.inference_mode()
def validate(
    model: SpeechModel, corpus: Corpus, tokenizer: Tokenizer, objective: Objective, num_frames: int
) -> Iterator[Score]:
    """Yield the scores with each context."""
    device = next(model.parameters()).device
    model.eval()
    for chunk_size in CHUNK_SIZES:
        errors, sums, count, distances = WordErrors(), torch.zeros(3), 0, list[Tensor]()
        for batch in corpus.in_order(num_frames):
            parts, encoder_out, times = losses(model, batch.to(str(device)), objective, [chunk_size], (False, True))
            assert parts.left is not None
            assert parts.right is not None
            sums += torch.stack((parts.ctc, parts.left, parts.right)).cpu() * len(batch.texts)
            count += len(batch.texts)
            distances += [] if parts.teacher is None else [parts.teacher.cpu() * len(batch.texts)]
            for row, time, text in zip(model.ctc.ctc_lo(encoder_out), times.tolist(), batch.texts, strict=True):
                errors.add(text, tokenizer.decode(greedy(row[:time], model.config.blank)))
        ctc, left, right = (sums / count).tolist()
        taught = float(torch.stack(distances).sum()) / count if distances else None
        yield Score(chunk_size=chunk_size, ctc=ctc, left=left, right=right, word_error_rate=errors.rate, teacher=taught)
    model.train()
