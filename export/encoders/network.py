"""The common part of all encoders, in plain torch, with the tensor names of WeNet's state dict.

An encoder runs in two ways. `forward` processes whole (padded) utterances with an optional chunk mask, for training and
parity. `forward_chunk` uses explicit caches and is the reference for the streaming graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from u2moe.export.architecture import EncoderArchitecture
from u2moe.export.attention import norm
from u2moe.export.positions import encodings
from u2moe.export.subsampling import KINDS, Subsampling
from u2moe.runtime.bundle.contract import Cache

BlockCaches = dict[str, Tensor]  # state of one block between chunks: [batch, ...] by the cache names of the manifest
ATT_CACHE = "att_cache"
CNN_CACHE = "cnn_cache"


class GlobalCMVN(nn.Module):
    """Mean and variance normalisation of the features, with statistics of the training data."""

    mean: Tensor
    istd: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("istd", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., mel]."""
        return (x - self.mean) * self.istd


@dataclass(frozen=True)
class Context:
    """Inputs common to all blocks in one call of the encoder."""

    mask: Tensor  # true where a query may see a key [batch, 1, time, keys]
    valid: Tensor  # true for frames that exist [batch, time]
    positions: Tensor  # positional encodings of the keys, or their angles for rotary attention [batch or 1, keys, ...]

    def strided(self, step: int) -> Context:
        """Return the context of every `step`th frame; axes of size one do not change."""
        return Context(self.mask[:, :, ::step, ::step], self.valid[:, ::step], self.positions[:, ::step])


def chunk_mask(time: int, chunk_size: int, num_left_chunks: int) -> Tensor:
    """Return [time, time]: whether a frame sees another in its chunk or `num_left_chunks` before it (negative: all)."""
    chunks = torch.arange(time) // chunk_size
    distance = chunks.unsqueeze(1) - chunks.unsqueeze(0)
    visible = distance >= 0
    return visible if num_left_chunks < 0 else visible & (distance <= num_left_chunks)


class EncoderBlock(nn.Module):
    """Base of the blocks, which are constructed from a configuration and the index of the block.

    A block is called with [batch, time, dim], the `Context` and its caches, which are empty at the start. It returns
    [batch, time, dim] and its caches with the frames of this call appended.
    """

    stride = 1  # number of frames that become one frame of the next block

    @staticmethod
    def convolutions(config: EncoderArchitecture) -> list[tuple[str, int, int]]:
        """Return (cache name, channels, kernel size) for each of a block's convolutions that need a cache."""
        own = config.convolution
        return [(CNN_CACHE, own.channels, own.kernel)] if own is not None and own.causal else []

    @classmethod
    def caches(cls, config: EncoderArchitecture) -> tuple[Cache, ...]:
        """Return the caches that a stream keeps from chunk to chunk."""
        num, found = config.num_blocks, [item for item in cls.convolutions(config) if item[2] > 1]
        histories = (Cache(name=name, num_blocks=num, shape=(size, kernel - 1)) for name, size, kernel in found)
        return cls._attention_cache(config, num), *histories

    @staticmethod
    def _attention_cache(
        config: EncoderArchitecture, num_blocks: int, name: str = ATT_CACHE, rate: float = 1.0
    ) -> Cache:
        """Return the cache for keys and values of `num_blocks` blocks."""
        shape = (config.attention.num_kv_heads, 0, 2 * config.attention.head_dim)
        return Cache(name=name, num_blocks=num_blocks, shape=shape, rate=rate)


class SpeechEncoder(nn.Module):
    """Normalisation, subsampling and the blocks, which are instances of `block`."""

    SUBSAMPLING: ClassVar[type[Subsampling] | None] = None  # the layers before the blocks; None: as configured

    def __init__(self, config: EncoderArchitecture, block: type[EncoderBlock]) -> None:
        super().__init__()
        self.config, self.block = config, block
        self.global_cmvn = GlobalCMVN(config.input_size) if config.normalized_input else None
        self.embed = (self.SUBSAMPLING or KINDS[config.subsampling])(config)
        self.encoders = nn.ModuleList(block(config, index) for index in range(config.num_blocks))
        self.after_norm = norm(config.dim, config.norm)

    def _run_blocks(
        self, x: Tensor, context: Context, caches: Sequence[BlockCaches]
    ) -> tuple[Tensor, list[BlockCaches]]:
        """Run all blocks on `x` [batch, time, dim]; return the output and the caches for the next call."""
        following = []
        for block, own in zip(self.encoders, caches, strict=True):
            x, cache = block(x, context, own)
            following.append(cache)
            context = context.strided(cast("EncoderBlock", block).stride)
        return self.after_norm(x) if self.config.pre_norm and self.config.final_norm else x, following

    def _embed(self, features: Tensor, lengths: Tensor) -> Tensor:
        x = features if self.global_cmvn is None else self.global_cmvn(features)
        return cast("Tensor", self.embed(x, lengths))

    def _encodings(self, positions: Tensor) -> Tensor:
        """Return the encodings [1, time, dim] of positions [time]."""
        learned = self.embed.learned
        return (encodings(self.config, positions) if learned is None else learned(positions)).unsqueeze(0)

    def forward(
        self, features: Tensor, lengths: Tensor, chunk_size: int | None = None, num_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Encode whole utterances [batch, frames, mel]; return [batch, time, dim] and its valid lengths [batch].

        `lengths` [batch] counts valid feature frames. `chunk_size` counts output frames; None means full context. An
        encoder that was trained only with a static chunk size always uses that size.
        """
        x = self._embed(features, lengths)
        time = x.shape[1]
        lengths = self.embed.output_lengths(lengths)
        valid = torch.arange(time, device=x.device) < lengths.unsqueeze(1)
        mask = valid.view(len(x), 1, 1, time).expand(-1, 1, time, -1)
        if self.config.static_chunk_size > 0 and not self.config.dynamic_chunk:
            chunk_size = self.config.static_chunk_size // self.config.frame_reduction
        if chunk_size is not None:
            size = chunk_size * self.config.frame_reduction
            mask = mask & chunk_mask(time, size, num_left_chunks).to(x.device)
        positions = self._encodings(torch.arange(time, device=x.device))
        x = x + positions if self.config.absolute_positions else x
        x, _ = self._run_blocks(x, Context(mask, valid, positions.to(x.dtype)), [{} for _ in self.encoders])
        return x, (lengths + self.config.frame_reduction - 1) // self.config.frame_reduction

    def forward_chunk(
        self, chunk: Tensor, offset: int, caches: list[BlockCaches] | None, required_cache_size: int
    ) -> tuple[Tensor, list[BlockCaches]]:
        """Encode one chunk of one stream: [1, frames, mel] to [1, time, dim] and the caches for the next call.

        `offset` is the number of encoder frames before this chunk. `required_cache_size` is the number of cached frames
        to keep; if it is negative, all are kept.
        """
        caches, offset = caches or [{} for _ in self.encoders], offset * self.config.frame_reduction
        x = self._embed(chunk, torch.tensor([chunk.shape[1]]))
        time = x.shape[1]
        cached = caches[0][ATT_CACHE].shape[2] if ATT_CACHE in caches[0] else 0
        positions = self._encodings(torch.arange(offset - cached, offset + time)).to(x.dtype)
        x = x + positions[:, cached:] if self.config.absolute_positions else x
        context = Context(torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.ones(1, time, dtype=torch.bool), positions)
        x, following = self._run_blocks(x, context, caches)
        return x, [self._last(own, required_cache_size) for own in following]

    def _last(self, caches: BlockCaches, required: int) -> BlockCaches:
        """Return the caches. Growing caches keep the last `required` encoder frames; all if `required` is negative."""
        kept = dict(caches)
        for cache in self.block.caches(self.config):
            if cache.time_axis is not None and cache.name in kept and required >= 0:
                size = kept[cache.name].shape[cache.time_axis - 1]
                num = min(cache.num_frames(required), size)
                kept[cache.name] = kept[cache.name].narrow(cache.time_axis - 1, size - num, num)
        return kept
