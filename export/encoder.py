"""The encoder in plain torch, tensor names as in WeNet's state dict.

There are two ways to run it: `forward` over whole (padded) utterances with an optional chunk mask, used for training
and parity, and `forward_chunk` with explicit caches, the reference for the streaming graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from u2moe.export.architecture import Convolution, EncoderArchitecture
from u2moe.export.attention import MultiHeadAttention, norm, positional_encoding
from u2moe.export.moe import ACTIVATIONS, feed_forward


class GlobalCMVN(nn.Module):
    """Mean and variance normalisation of the features by statistics of the training data."""

    mean: Tensor
    istd: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("istd", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., mel] to [..., mel]."""
        return (x - self.mean) * self.istd


class Subsampling(nn.Module):
    """Convolutions over time and mel that reduce the frame rate by `subsampling_rate`, and a projection to `dim`."""

    LAYERS: ClassVar = {"conv2d": ((3, 2), (3, 2)), "conv2d6": ((3, 2), (5, 3)), "conv2d8": ((3, 2), (3, 2), (3, 2))}
    """(kernel, stride) of each convolution."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__()
        self.layers = self.LAYERS[config.subsampling]
        modules: list[nn.Module] = []
        for kernel, stride in self.layers:
            modules += [nn.Conv2d(config.dim if modules else 1, config.dim, kernel, stride), nn.ReLU()]
        self.conv = nn.Sequential(*modules)
        projection = nn.Linear(config.dim * self.output_length(config.input_size), config.dim)
        old_name = config.subsampling == "conv2d"
        self.out = nn.Sequential(projection) if old_name else None
        self.linear = None if old_name else projection
        self.scale = math.sqrt(config.dim)

    def output_length(self, length: int) -> int:
        """Frames (or mel bins) left from `length`; 0 if that is shorter than the window."""
        for kernel, stride in self.layers:
            length = (length - kernel) // stride + 1
        return max(length, 0)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """`output_length` of each element."""
        for kernel, stride in self.layers:
            lengths = (lengths - kernel) // stride + 1
        return lengths.clamp(min=0)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, frames, mel] to [batch, time, dim], scaled by sqrt(dim)."""
        x = self.conv(x.unsqueeze(1)).transpose(1, 2).flatten(2)
        layer, _ = self.projection
        return cast("Tensor", layer(x)) * self.scale

    @property
    def projection(self) -> tuple[nn.Linear, str]:
        """The projection to `dim`, and what WeNet calls it."""
        if isinstance(self.out, nn.Sequential):
            return cast("nn.Linear", self.out[0]), "out.0"
        return cast("nn.Linear", self.linear), "linear"


class ConvolutionModule(nn.Module):
    """Pointwise, gated, depthwise and pointwise convolution over time (arXiv 2005.08100)."""

    def __init__(self, dim: int, config: Convolution) -> None:
        super().__init__()
        self.config = config
        padding = 0 if config.causal else (config.kernel - 1) // 2
        channels = config.channels
        self.pointwise_conv1 = nn.Conv1d(dim, 2 * channels, 1, bias=config.bias)
        self.depthwise_conv = nn.Conv1d(
            channels, channels, config.kernel, padding=padding, groups=channels, bias=config.bias
        )
        self.norm = norm(channels, config.norm)
        self.pointwise_conv2 = nn.Conv1d(channels, dim, 1, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()

    def gated(self, x: Tensor) -> Tensor:
        """The gated linear unit of the first projection: [batch, time, dim] to [batch, channels, time]."""
        return nn.functional.glu(self.pointwise_conv1(x.transpose(1, 2)), dim=1)

    def initial_cache(self, batch: int) -> Tensor:
        """The depthwise convolution's history before the first frame: the gated unit's output for zeros, not zeros.

        [batch, channels, kernel-1].
        """
        bias = self.pointwise_conv1.bias
        frame = torch.zeros(2 * self.config.channels) if bias is None else bias
        start = nn.functional.glu(frame.to(self.pointwise_conv1.weight), dim=0)
        return start.view(1, -1, 1).expand(batch, -1, self.config.kernel - 1)

    def forward(self, x: Tensor, valid: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[batch, time, dim], true for valid frames [batch, time], cache [batch, channels, kernel-1] if causal."""
        gated = self.gated(x.masked_fill(~valid.unsqueeze(-1), 0.0))
        if self.config.causal:
            history = self.initial_cache(len(x)) if cache is None else cache
            gated = torch.cat((history.to(gated.dtype), gated), dim=2)
            cache = gated[:, :, gated.shape[2] - self.config.kernel + 1 :]
        y = self.depthwise_conv(gated)
        over_channels = self.config.norm.kind != "batch_norm"
        y = self.norm(y.transpose(1, 2)).transpose(1, 2) if over_channels else self.norm(y)
        y = self.pointwise_conv2(self.activation(y)).transpose(1, 2)
        return y.masked_fill(~valid.unsqueeze(-1), 0.0), cache


@dataclass(frozen=True)
class Context:
    """What all blocks share in one call of the encoder."""

    mask: Tensor
    """True where a query may see a key [batch, 1, time, keys]."""
    valid: Tensor
    """True for frames that exist [batch, time]."""
    positions: Tensor
    """Sinusoids of the keys [batch or 1, keys, dim]."""


@dataclass(frozen=True)
class BlockCache:
    """State of one block between chunks."""

    att: Tensor
    """Keys and values of past frames [batch, kv_heads, cache, 2 * head_dim]."""
    cnn: Tensor | None
    """Past inputs of the depthwise convolution [batch, channels, kernel-1]."""


class ConformerBlock(nn.Module):
    """Half feed-forward (macaron), attention, convolution, feed-forward, each residual; first and third optional."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = MultiHeadAttention(config.dim, config.attention)
        self.feed_forward = feed_forward(config.dim, config.feed_forward)
        self.norm_ff = norm(config.dim, config.norm)
        self.norm_mha = norm(config.dim, config.norm)
        self.feed_forward_macaron: nn.Module | None = None
        self.conv_module: ConvolutionModule | None = None
        if config.macaron:
            self.feed_forward_macaron = feed_forward(config.dim, config.feed_forward)
            self.norm_ff_macaron = norm(config.dim, config.norm)
        if config.convolution is not None:
            self.conv_module = ConvolutionModule(config.dim, config.convolution)
            self.norm_conv = norm(config.dim, config.norm)
            self.norm_final = norm(config.dim, config.norm)
        self.scale = 0.5 if config.macaron else 1.0

    def forward(self, x: Tensor, context: Context, cache: BlockCache | None) -> tuple[Tensor, BlockCache]:
        """[batch, time, dim] to the same, and the cache with this call's frames appended."""
        if self.feed_forward_macaron is not None:
            branch = self.norm_ff_macaron(x) if self.pre_norm else x
            x = x + self.scale * self.feed_forward_macaron(branch)
            x = x if self.pre_norm else self.norm_ff_macaron(x)

        branch = self.norm_mha(x) if self.pre_norm else x
        keys_values = self.self_attn.keys_values(branch)
        if cache is not None:
            keys_values = torch.cat((cache.att, keys_values), dim=2)
        x = x + self.self_attn(branch, keys_values, context.mask, context.positions)
        x = x if self.pre_norm else self.norm_mha(x)

        cnn_cache = None if cache is None else cache.cnn
        if self.conv_module is not None:
            branch = self.norm_conv(x) if self.pre_norm else x
            branch, cnn_cache = self.conv_module(branch, context.valid, cnn_cache)
            x = x + branch
            x = x if self.pre_norm else self.norm_conv(x)

        branch = self.norm_ff(x) if self.pre_norm else x
        x = x + self.scale * self.feed_forward(branch)
        x = x if self.pre_norm else self.norm_ff(x)
        if self.conv_module is not None:
            x = self.norm_final(x)
        return x, BlockCache(keys_values, cnn_cache)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each residual."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.self_attn = MultiHeadAttention(config.dim, config.attention)
        self.feed_forward = feed_forward(config.dim, config.feed_forward)
        self.norm1 = norm(config.dim, config.norm)
        self.norm2 = norm(config.dim, config.norm)

    def forward(self, x: Tensor, context: Context, cache: BlockCache | None) -> tuple[Tensor, BlockCache]:
        """[batch, time, dim] to the same, and the cache with this call's frames appended."""
        branch = self.norm1(x) if self.pre_norm else x
        keys_values = self.self_attn.keys_values(branch)
        if cache is not None:
            keys_values = torch.cat((cache.att, keys_values), dim=2)
        x = x + self.self_attn(branch, keys_values, context.mask, context.positions)
        x = x if self.pre_norm else self.norm1(x)
        branch = self.norm2(x) if self.pre_norm else x
        x = x + self.feed_forward(branch)
        x = x if self.pre_norm else self.norm2(x)
        return x, BlockCache(keys_values, None)


def chunk_mask(time: int, chunk_size: int, num_left_chunks: int) -> Tensor:
    """True where frame i may see frame j [time, time]: its chunk and `num_left_chunks` before it (negative: all)."""
    chunks = torch.arange(time) // chunk_size
    distance = chunks.unsqueeze(1) - chunks.unsqueeze(0)
    visible = distance >= 0
    return visible if num_left_chunks < 0 else visible & (distance <= num_left_chunks)


class SpeechEncoder(nn.Module):
    """Normalisation, subsampling and the blocks of a conformer or transformer encoder."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__()
        self.config = config
        self.global_cmvn = GlobalCMVN(config.input_size) if config.normalized_input else None
        self.embed = Subsampling(config)
        block = ConformerBlock if config.kind == "conformer" else TransformerBlock
        self.encoders = nn.ModuleList(block(config) for _ in range(config.num_blocks))
        self.after_norm = norm(config.dim, config.norm)

    def _embed(self, features: Tensor) -> Tensor:
        return cast("Tensor", self.embed(features if self.global_cmvn is None else self.global_cmvn(features)))

    def _finish(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.after_norm(x)) if self.config.pre_norm and self.config.final_norm else x

    def forward(
        self, features: Tensor, lengths: Tensor, chunk_size: int | None = None, num_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """Whole utterances [batch, frames, mel], valid frames [batch], to [batch, time, dim] and valid times [batch].

        `chunk_size` None is full context, but an encoder with a static chunk size always uses that size.
        """
        x = self._embed(features)
        time = x.shape[1]
        lengths = self.embed.output_lengths(lengths)
        valid = torch.arange(time, device=x.device) < lengths.unsqueeze(1)
        mask = valid.view(len(x), 1, 1, time).expand(-1, 1, time, -1)
        if self.config.static_chunk_size > 0 and not self.config.dynamic_chunk:
            chunk_size = self.config.static_chunk_size
        if chunk_size is not None:
            mask = mask & chunk_mask(time, chunk_size, num_left_chunks).to(x.device)
        positions = positional_encoding(torch.arange(time, device=x.device), self.config.dim).unsqueeze(0)
        x = x + positions if self.config.absolute_positions else x
        context = Context(mask, valid, positions.to(x.dtype))
        for block in self.encoders:
            x, _ = block(x, context, None)
        return self._finish(x), lengths

    def forward_chunk(
        self, chunk: Tensor, offset: int, caches: list[BlockCache] | None, required_cache_size: int
    ) -> tuple[Tensor, list[BlockCache]]:
        """One chunk of one stream: [1, frames, mel] to [1, time, dim] and the caches for the next call.

        `offset` is the number of encoder frames before this chunk; `required_cache_size` cached frames are kept,
        all of them if it is negative.
        """
        x = self._embed(chunk)
        time = x.shape[1]
        cached = 0 if caches is None else caches[0].att.shape[2]
        positions = positional_encoding(torch.arange(offset - cached, offset + time), self.config.dim).unsqueeze(0)
        x = x + positions[:, cached:] if self.config.absolute_positions else x
        context = Context(torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.ones(1, time, dtype=torch.bool), positions)
        new_caches = []
        for index, block in enumerate(self.encoders):
            x, cache = block(x, context, None if caches is None else caches[index])
            start = 0 if required_cache_size < 0 else max(cached + time - required_cache_size, 0)
            new_caches.append(BlockCache(cache.att[:, :, start:], cache.cnn))
        return self._finish(x), new_caches
