"""The encoder in torch eager with WeNet's loop over the experts, which selects and adds up rows for one at a time.

The rest is the network that the exporter compares its graphs with, which has WeNet's mathematics. Any difference in
work favours torch: keys, values and the convolution's history are cached as in WeNet, or better.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS
from u2moe.export.encoders.network import BlockCaches, SpeechEncoder
from u2moe.export.moe import MixtureOfExperts
from u2moe.runtime.model.encoder import required_cache_size

Frames = npt.NDArray[np.float32]


class LoopedExperts(nn.Module):
    """The layer as computed by WeNet's `MoEFFNLayer`, with the weights of ours."""

    def __init__(self, layer: MixtureOfExperts) -> None:
        super().__init__()
        self.gate = layer.gate
        self.experts = layer.experts
        self.num_experts_per_token = layer.num_experts_per_token

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, dim] to the same."""
        tokens = x.view(-1, x.shape[-1])
        logits, chosen = torch.topk(self.gate(tokens), self.num_experts_per_token)
        shares = torch.softmax(logits, dim=1, dtype=torch.float32).to(x.dtype)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == number)
            output[rows] += shares[rows, places, None] * expert(tokens[rows])
        return output.view(x.shape)


def with_loops(encoder: SpeechEncoder) -> SpeechEncoder:
    """The same encoder, changed in place to use WeNet's loop for every mixture of experts."""
    for module in list(encoder.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, MixtureOfExperts):
                setattr(module, name, LoopedExperts(part))
    return encoder


class TorchEncoder:
    """An encoder in torch on numpy arrays, for one stream."""

    def __init__(self, encoder: SpeechEncoder) -> None:
        self.encoder = encoder

    @torch.inference_mode()
    def whole(self, frames: Frames) -> Frames:
        """Encode one utterance [frames, mel] with full context: [time, dim]."""
        output: Tensor = self.encoder(torch.from_numpy(frames[np.newaxis]), torch.tensor([len(frames)]))[0]
        return cast("Frames", output[0].numpy())

    @torch.inference_mode()
    def stream(
        self, chunks: list[Frames], caches: list[BlockCaches] | None = None, offset: int = 0
    ) -> tuple[list[Frames], list[BlockCaches] | None, int]:
        """Encode chunks [1, frames, mel] in order; returns outputs, caches and the next position."""
        required, outputs = required_cache_size(CHUNK_SIZE, NUM_LEFT_CHUNKS), []
        for chunk in chunks:
            output, caches = self.encoder.forward_chunk(torch.from_numpy(chunk), offset, caches, required)
            outputs.append(cast("Frames", output.numpy()))
            offset += output.shape[1]
        return outputs, caches, offset
