"""The U2++ network in plain torch, tensor names as in WeNet's state dict.

Two ways through the encoder: `forward` over whole (padded) utterances under an optional chunk mask, which training and
parity use, and `forward_chunk` with explicit caches, the reference of the streaming graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from u2moe.export.architecture import Architecture, Attention, Convolution, Decoder, Encoder, Norm
from u2moe.export.moe import ACTIVATIONS, feed_forward


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), WeNet's variant with a unit offset (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim]."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def norm(dim: int, config: Norm) -> nn.Module:
    """The normalisation of the configured kind."""
    if config.kind == "rms_norm":
        return RMSNorm(dim, config.eps)
    if config.kind == "batch_norm":
        return nn.BatchNorm1d(dim, eps=config.eps)
    return nn.LayerNorm(dim, eps=config.eps)


def inverse_frequencies(dim: int) -> Tensor:
    """Angular frequencies of the sinusoids [ceil(dim / 2)], rounded to float32 as WeNet's table is."""
    return torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10000.0) / dim))


def positional_encoding(positions: Tensor, dim: int) -> Tensor:
    """Sinusoids [..., dim] of integer positions [...]: sine in even, cosine in odd channels; no largest position."""
    angles = positions.to(torch.float32).unsqueeze(-1) * inverse_frequencies(dim).to(positions.device)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim]


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
    """Convolutions over time and mel that leave one frame of `subsampling_rate`, and a projection to `dim`."""

    LAYERS: ClassVar = {"conv2d": ((3, 2), (3, 2)), "conv2d6": ((3, 2), (5, 3)), "conv2d8": ((3, 2), (3, 2), (3, 2))}
    """(kernel, stride) of each convolution."""

    def __init__(self, config: Encoder) -> None:
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
        """Frames (or mel bins) that remain of `length`; fewer than the window leave none."""
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


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with optional grouped heads and WeNet's position term.

    WeNet's rel_selfattn does not shift its scores, so positions are those of the keys:
    score(i, j) = ((q_i + u) k_j + (q_i + v) W_pos pe_j) / sqrt(head_dim).
    """

    def __init__(self, dim: int, config: Attention) -> None:
        super().__init__()
        self.config = config
        inner = config.num_heads * config.head_dim
        inner_kv = config.num_kv_heads * config.head_dim
        self.linear_q = nn.Linear(dim, inner, bias=config.query_bias)
        self.linear_k = nn.Linear(dim, inner_kv, bias=config.key_bias)
        self.linear_v = nn.Linear(dim, inner_kv, bias=config.value_bias)
        self.linear_out = nn.Linear(inner, dim, bias=config.query_bias)
        if config.relative:
            self.linear_pos = nn.Linear(dim, inner, bias=False)
            self.pos_bias_u = nn.Parameter(torch.empty(config.num_heads, config.head_dim))
            self.pos_bias_v = nn.Parameter(torch.empty(config.num_heads, config.head_dim))
            nn.init.xavier_uniform_(self.pos_bias_u)
            nn.init.xavier_uniform_(self.pos_bias_v)

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, time, heads * head_dim] to [batch, heads, time, head_dim]."""
        return x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def keys_values(self, memory: Tensor) -> Tensor:
        """Keys and values [batch, kv_heads, time, 2 * head_dim] of [batch, time, dim]."""
        return torch.cat((self._heads(self.linear_k(memory)), self._heads(self.linear_v(memory))), dim=-1)

    def forward(self, x: Tensor, keys_values: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """Attend from `x` [batch, time, dim] to `keys_values`.

        `mask` is true where a query may see a key, broadcast to [batch, heads, time, keys]; `positions` are the
        sinusoids of the keys [batch or 1, keys, dim], needed by relative attention only.
        """
        repeats = self.config.num_heads // self.config.num_kv_heads
        keys, values = keys_values.repeat_interleave(repeats, dim=1).chunk(2, dim=-1)
        query = self._heads(self.linear_q(x))
        if self.config.relative:
            if positions is None:
                raise ValueError("relative attention needs the positions of its keys")
            position_keys = self._heads(self.linear_pos(positions))
            content = (query + self.pos_bias_u.unsqueeze(1)) @ keys.transpose(-2, -1)
            scores = content + (query + self.pos_bias_v.unsqueeze(1)) @ position_keys.transpose(-2, -1)
        else:
            scores = query @ keys.transpose(-2, -1)
        scores = scores.float() / math.sqrt(self.config.head_dim)
        # rows that see nothing (padding) become zero instead of nan
        weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1).masked_fill(~mask, 0.0)
        context = (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)
        return cast("Tensor", self.linear_out(context))


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
        """What the depthwise convolution sees before the first frame: the unit's answer to zeros, not zeros.

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
    """What every block of one encoder call shares."""

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
    """Half feed-forward (macaron), attention, convolution, feed-forward, each residual; all but two are optional."""

    def __init__(self, config: Encoder) -> None:
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

    def __init__(self, config: Encoder) -> None:
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

    def __init__(self, config: Encoder) -> None:
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

        `chunk_size` None is full context, except that an encoder with a static chunk size always uses that.
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
        branch = self.norm1(x) if self.pre_norm else x
        x = x + self.self_attn(branch, self.self_attn.keys_values(branch), mask)
        x = x if self.pre_norm else self.norm1(x)
        branch = self.norm2(x) if self.pre_norm else x
        x = x + self.src_attn(branch, self.src_attn.keys_values(memory), memory_mask)
        x = x if self.pre_norm else self.norm2(x)
        branch = self.norm3(x) if self.pre_norm else x
        x = x + self.feed_forward(branch)
        return x if self.pre_norm else cast("Tensor", self.norm3(x))


class AttentionDecoder(nn.Module):
    """One direction of the attention decoder."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Sequential(nn.Embedding(config.vocab_size, config.dim))
        self.decoders = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_blocks))
        self.after_norm = norm(config.dim, config.norm)
        self.output_layer = nn.Linear(config.dim, config.vocab_size)

    @property
    def embedding(self) -> nn.Embedding:
        """The table of token embeddings."""
        return cast("nn.Embedding", self.embed[0])

    def forward(self, inputs: Tensor, lengths: Tensor, memory: Tensor, memory_lengths: Tensor) -> Tensor:
        """Logits [rows, length, vocab] of what follows each position of `inputs` [rows, length] (starting with sos)."""
        length, time = inputs.shape[1], memory.shape[1]
        steps = torch.arange(length, device=inputs.device)
        mask = (steps.unsqueeze(1) >= steps) & (steps < lengths.view(-1, 1, 1))
        memory_mask = torch.arange(time, device=inputs.device) < memory_lengths.view(-1, 1, 1, 1)
        x = self.embed(inputs) * math.sqrt(self.config.dim) + positional_encoding(steps, self.config.dim)
        for block in self.decoders:
            x = block(x, mask.unsqueeze(1), memory, memory_mask)
        return cast("Tensor", self.output_layer(self.after_norm(x) if self.config.pre_norm else x))


class BidirectionalDecoder(nn.Module):
    """Container of both directions, named as in WeNet's state dict."""

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
        """[batch, time, dim] to log-probabilities [batch, time, vocab]."""
        return torch.log_softmax(self.ctc_lo(encoder_out), dim=-1)


class SpeechModel(nn.Module):
    """Encoder, CTC head and attention decoders of one checkpoint."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config
        self.encoder = SpeechEncoder(config.encoder)
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

    def score(
        self, hypotheses: Tensor, lengths: Tensor, encoder_out: Tensor, encoder_lengths: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Token scores as the decoder graph gives them, see `u2moe.runtime.contract.decoder`.

        `hypotheses` [rows, length] without sos and eos, `encoder_out` [rows, time, dim].
        """
        rows, length = hypotheses.shape
        steps = torch.arange(length + 1, device=hypotheses.device)
        inside = steps[:length] < lengths.unsqueeze(1)
        padded = hypotheses.masked_fill(~inside, self.config.eos)
        targets = torch.cat((padded, padded.new_full((rows, 1), self.config.eos)), dim=1)
        scored = steps <= lengths.unsqueeze(1)

        def log_probs(decoder: AttentionDecoder, tokens: Tensor) -> Tensor:
            inputs = torch.cat((tokens.new_full((rows, 1), self.config.sos), tokens), dim=1)
            return torch.log_softmax(decoder(inputs, lengths + 1, encoder_out, encoder_lengths), dim=-1)

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
