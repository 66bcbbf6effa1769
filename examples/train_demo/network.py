"""Computes the network of `u2moe.export.model` in a way that makes training on a CPU fast, with the same results.

It supports only the settings in the recipe's train.yaml: a pre-norm conformer with WeNet's relative attention and
causal convolutions, dense or with experts, and two attention decoders.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from routing import feed_forward
from torch import Tensor, nn
from torch.nn import functional

from u2moe.export.attention import MultiHeadAttention, positional_encoding
from u2moe.export.convolution import ConvolutionModule
from u2moe.export.encoders.conformer import ConformerBlock
from u2moe.export.encoders.network import SpeechEncoder, chunk_mask
from u2moe.export.model import AttentionDecoder, DecoderBlock, SpeechModel
from u2moe.export.moe import MixtureOfExperts
from u2moe.export.subsampling import Convolutions, Subsampling

Part = TypeVar("Part", bound=nn.Module)

HEAD = "teacher"
"""Name of the head that predicts a teacher's targets."""
HIDDEN = -1e4
"""Number added to the score of a key that a query may not see."""


def present(part: Part | None) -> Part:
    """Return a part of a network. Raise ValueError if the network lacks it, as in some configurations."""
    if part is None:
        raise ValueError("this recipe's networks have all parts of a conformer, and normalize their features")
    return part


def front(layer: Subsampling) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Return the first two convolutions, which process the features."""
    first, _, second, *_ = cast("Convolutions", layer).conv
    return cast("nn.Conv2d", first), cast("nn.Conv2d", second)


@torch.no_grad()
def narrow_front(model: SpeechModel, channels: int) -> None:
    """Set the weights of the first convolution to zero, except those of its first `channels` channels."""
    first, second = front(model.encoder.embed)
    for unused in (first.weight[channels:], cast("Tensor", first.bias)[channels:], second.weight[:, channels:]):
        unused.zero_()


def lower_precision(model: SpeechModel) -> None:
    """Convert weights to bfloat16, except weights of routers and the statistics of the features."""
    model.bfloat16()
    present(model.encoder.global_cmvn).float()
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.gate.float()
    # twice as fast on CPUs; the type stubs of older versions of torch omit this signature
    model.encoder.embed.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]


@dataclass(frozen=True)
class Sight:
    """The visible frames of one encoder call, and their positions."""

    keys: Tensor
    """0 for frames that exist, `HIDDEN` for padding [batch, 1, 1, time]."""
    chunks: Tensor | None
    """0 inside the chunk and before it, `HIDDEN` after it [1 or batch, 1, time, time]; None: full context."""
    real: Tensor
    """True for frames that exist, false for padding [batch, time]."""
    valid: Tensor
    """1 for frames that exist, 0 for padding [batch, time, 1]."""
    positions: Tensor
    """Positional encodings [time, dim]."""


def heads(x: Tensor, num_heads: int) -> Tensor:
    """Reshape [batch, time, heads * size] to [batch, heads, time, size]."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(query keys + bias) values, with the heads joined [batch, time, dim]."""
    scores = (query @ keys.transpose(-2, -1)).float() + bias.float()  # softmax is slow and imprecise in bfloat16
    return (scores.softmax(-1).to(values.dtype) @ values).transpose(1, 2).flatten(2)


def projections(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Return the results of several linear layers with the same input, computed as one product."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return functional.linear(x, weight, bias).chunk(len(layers), dim=-1)


def self_attention(layer: MultiHeadAttention, x: Tensor, sight: Sight) -> Tensor:
    """Apply relative attention: (q + u) k + (q + v) p = q (k + p) + (u k + v p). The last term is a number per key."""
    scale = 1 / math.sqrt(layer.config.head_dim)
    query, keys, values = (
        heads(part, layer.config.num_heads) for part in projections(x, layer.linear_q, layer.linear_k, layer.linear_v)
    )
    places = heads(layer.linear_pos(sight.positions).unsqueeze(0), layer.config.num_heads)
    content, place = layer.pos_bias_u.unsqueeze(-1), layer.pos_bias_v.unsqueeze(-1)
    bias = scale * (keys @ content + places @ place).transpose(-2, -1) + sight.keys
    bias = bias if sight.chunks is None else bias + sight.chunks
    return cast("Tensor", layer.linear_out(attention(scale * query, keys + places, values, bias)))


def convolution(layer: ConvolutionModule, x: Tensor, sight: Sight) -> Tensor:
    """Apply the convolution module: pointwise convolution, gate, causal depthwise and pointwise convolution.

    Channels stay the last axis.
    """
    first, last = layer.pointwise_conv1, layer.pointwise_conv2
    gated = functional.glu(functional.linear(x * sight.valid, first.weight.squeeze(-1), first.bias), dim=-1)
    start = functional.glu(cast("Tensor", first.bias), dim=0).expand(len(x), layer.config.kernel - 1, -1)
    history = torch.cat((start, gated), 1).transpose(1, 2).unsqueeze(2)
    depthwise = layer.depthwise_conv
    # as a convolution over two axes, one of size 1, oneDNN does not move channels: five times as fast
    y = functional.conv2d(history, depthwise.weight.unsqueeze(2), depthwise.bias, groups=history.shape[1])
    y = y.squeeze(2).transpose(1, 2)
    y = layer.activation(layer.norm(y))
    return functional.linear(y, last.weight.squeeze(-1), last.bias)


def block(layer: ConformerBlock, x: Tensor, sight: Sight) -> Tensor:
    """Apply one conformer block to [batch, time, dim]."""
    x = x + 0.5 * feed_forward(present(layer.feed_forward_macaron), layer.norm_ff_macaron(x), sight.real)
    x = x + self_attention(layer.self_attn, layer.norm_mha(x), sight)
    x = x + convolution(present(layer.conv_module), layer.norm_conv(x), sight)
    x = x + 0.5 * feed_forward(layer.feed_forward, layer.norm_ff(x), sight.real)
    return cast("Tensor", layer.norm_final(x))


def subsample(layer: Subsampling, mels: Tensor, channels: int) -> Tensor:
    """Apply the convolutions. Only `channels` channels of the first are computed; the others have weights of zero."""
    first, second = front(layer)
    x = mels.unsqueeze(1).contiguous(memory_format=torch.channels_last)
    x = functional.conv2d(x, first.weight[:channels], cast("Tensor", first.bias)[:channels], first.stride).relu()
    x = functional.conv2d(x, second.weight[:, :channels], second.bias, second.stride).relu()
    projection, _ = cast("Convolutions", layer).projection
    return cast("Tensor", projection(x.transpose(1, 2).flatten(2))) * layer.scale


def add_head(model: SpeechModel, width: int) -> None:
    """Add a head that predicts a teacher's targets. It is only for training; a finished model does not have it.

    The weights of the head start at zero, so it affects nothing else until it has learnt something.
    """
    answer = nn.Linear(model.config.encoder.dim, width)
    nn.init.zeros_(answer.weight)
    nn.init.zeros_(answer.bias)
    model.add_module(HEAD, answer)


def head(model: SpeechModel) -> nn.Module | None:
    """Return the head that predicts a teacher's targets, if the network has one."""
    return dict(model.named_children()).get(HEAD)


def hidden_chunks(time: int, chunk_sizes: Sequence[int | None], batch_size: int) -> Tensor | None:
    """Return the mask that hides the frames after each frame's chunk, see `Sight`.

    Each chunk size applies to an equal share of the batch.
    """
    if not any(chunk_sizes):
        return None
    seen = torch.stack([chunk_mask(time, size or time, -1) for size in chunk_sizes]).unsqueeze(1)
    return HIDDEN * (~seen if len(seen) == 1 else ~seen.repeat_interleave(batch_size // len(seen), 0))


def block_outputs(
    encoder: SpeechEncoder, mels: Tensor, lengths: Tensor, chunk_sizes: Sequence[int | None], channels: int
) -> tuple[list[Tensor], Tensor]:
    """Return the output [batch, time, dim] of each encoder block for some features, and the lengths of the outputs.

    Each of `chunk_sizes` (None: full context) applies to an equal share of the batch.
    """
    kind = front(encoder.embed)[0].weight.dtype
    x = subsample(encoder.embed, present(encoder.global_cmvn)(mels).to(kind), channels)
    time = x.shape[1]
    times = encoder.embed.output_lengths(lengths)
    real = torch.arange(time, device=x.device) < times.unsqueeze(1)
    chunks = hidden_chunks(time, chunk_sizes, len(x))
    sight = Sight(
        keys=HIDDEN * (~real).to(kind).view(len(x), 1, 1, time),
        chunks=None if chunks is None else chunks.to(x),
        real=real,
        valid=real.to(kind).unsqueeze(-1),
        positions=positional_encoding(torch.arange(time, device=x.device), encoder.config.dim).to(kind),
    )
    outputs = []
    for layer in encoder.encoders:
        x = block(cast("ConformerBlock", layer), x, sight)
        outputs.append(x)
    return outputs, times


def encode(
    encoder: SpeechEncoder, mels: Tensor, lengths: Tensor, chunk_size: int | None, channels: int
) -> tuple[Tensor, Tensor]:
    """Encode as `SpeechEncoder.forward` does."""
    outputs, times = block_outputs(encoder, mels, lengths, [chunk_size], channels)
    return encoder.after_norm(outputs[-1]), times


def decoder_block(
    layer: DecoderBlock, x: Tensor, real: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor
) -> Tensor:
    """Apply one decoder block to [rows, length, dim]. `real` [rows, length] is false for padding."""
    own, other = layer.self_attn, layer.src_attn
    scale, num_heads = 1 / math.sqrt(own.config.head_dim), own.config.num_heads
    q, k, v = (heads(part, num_heads) for part in projections(layer.norm1(x), own.linear_q, own.linear_k, own.linear_v))
    x = x + own.linear_out(attention(scale * q, k, v, mask))
    q = heads(other.linear_q(layer.norm2(x)), num_heads)
    k, v = (heads(part, num_heads) for part in projections(memory, other.linear_k, other.linear_v))
    x = x + other.linear_out(attention(scale * q, k, v, memory_mask))
    return x + feed_forward(layer.feed_forward, layer.norm3(x), real)


def decode(
    decoder: AttentionDecoder, inputs: Tensor, lengths: Tensor, memory: Tensor, memory_lengths: Tensor
) -> Tensor:
    """Return logits as `AttentionDecoder.forward` does. Values after the length of a row are undefined."""
    length, kind = inputs.shape[1], memory.dtype
    steps = torch.arange(length, device=inputs.device)
    real = steps < lengths.unsqueeze(1)
    mask = HIDDEN * (steps.unsqueeze(1) < steps).to(kind)
    hidden = torch.arange(memory.shape[1], device=inputs.device) >= memory_lengths.view(-1, 1, 1, 1)
    x = decoder.embed(inputs) * math.sqrt(decoder.config.dim) + positional_encoding(steps, decoder.config.dim).to(kind)
    for layer in decoder.decoders:
        x = decoder_block(cast("DecoderBlock", layer), x, real, mask, memory, HIDDEN * hidden.to(kind))
    return cast("Tensor", decoder.output_layer(decoder.after_norm(x)))
