"""Attention, normalisations and positional encodings in plain torch, with the tensor names of WeNet's state dict."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from u2moe.export.architecture import Attention, Norm
from u2moe.runtime.graph.attention import FURTHEST_LEFT, FURTHEST_RIGHT


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), WeNet's variant with a unit offset (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., dim]."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def norm(dim: int, config: Norm) -> nn.Module:
    """Return a normalisation layer of the configured kind."""
    if config.kind == "rms_norm":
        return RMSNorm(dim, config.eps)
    if config.kind == "batch_norm":
        return nn.BatchNorm1d(dim, eps=config.eps)
    return nn.LayerNorm(dim, eps=config.eps)


def added(x: Tensor, layer: Callable[[Tensor], Any], norm: nn.Module, pre_norm: bool) -> Tensor:
    """Return `x` plus the layer's output; normalise before the layer (pre_norm) or after the addition."""
    return cast("Tensor", x + layer(norm(x)) if pre_norm else norm(x + layer(x)))


def inverse_frequencies(dim: int) -> Tensor:
    """Return the angular frequencies [ceil(dim / 2)] of the sinusoids. As in WeNet's table, exponents are float32."""
    # float64, then rounded, because the last bit of `torch.exp` depends on the processor
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10000.0) / dim)
    return torch.tensor([math.exp(exponent) for exponent in exponents.tolist()], dtype=torch.float32)


def positional_encoding(positions: Tensor, dim: int) -> Tensor:
    """Return the sinusoids [..., dim] of any integer positions [...]: sine in even channels, cosine in odd ones."""
    angles = positions.to(torch.float32).unsqueeze(-1) * inverse_frequencies(dim).to(positions.device)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :dim]


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate channels i and i + size / 2 of `x` [batch, heads, time, size] by `angles` [batch or 1, time, size / 2]."""
    first, second = x.chunk(2, dim=-1)
    cosines, sines = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    return torch.cat((first * cosines - second * sines, first * sines + second * cosines), dim=-1)


def distances(time: int, num_keys: int) -> Tensor:
    """Return the distances [time, keys] of the keys from the last `time` of them, clamped to WeNet's limits."""
    keys = torch.arange(num_keys)
    return (keys - keys[num_keys - time :].unsqueeze(1)).clamp(-FURTHEST_LEFT, FURTHEST_RIGHT)


def attended(scores: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Return the context [batch, time, heads * size] for scores [batch, heads, time, keys] and values.

    The scores are divided by sqrt(size) here. Rows whose mask is false everywhere (padding) become zero, not NaN.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = (scores / math.sqrt(values.shape[-1])).masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(~mask, 0.0)
    return (weights.to(values.dtype) @ values).transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with optional grouped heads and WeNet's position term.

    WeNet's rel_selfattn does not shift the scores. pe_j therefore encodes the position of key j, not a distance:
    score(i, j) = ((q_i + u) k_j + (q_i + v) W_pos pe_j) / sqrt(head_dim).
    """

    def __init__(self, dim: int, config: Attention) -> None:
        super().__init__()
        self.config = config
        inner, inner_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.linear_q = nn.Linear(dim, inner, bias=config.query_bias)
        self.linear_k = nn.Linear(dim, inner_kv, bias=config.key_bias)
        self.linear_v = nn.Linear(dim, inner_kv, bias=config.value_bias)
        self.linear_out = nn.Linear(inner, dim, bias=config.query_bias)
        if config.relative:
            self.linear_pos = nn.Linear(dim, inner, bias=False)
            shape = (config.num_heads, config.head_dim)
            self.pos_bias_u, self.pos_bias_v = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape))) for _ in "uv")
        if config.by_distance:
            self.rel_k_embed = nn.Embedding(FURTHEST_LEFT + FURTHEST_RIGHT + 1, config.head_dim)

    def _heads(self, x: Tensor) -> Tensor:
        """Reshape [batch, time, heads * head_dim] to [batch, heads, time, head_dim]."""
        return x.view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)

    def relative_scores(self, query: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the content part and the position part of the scores. Arguments are [batch, heads, time, size]."""
        content = (query + self.pos_bias_u.unsqueeze(1)) @ keys.transpose(-2, -1)
        return content, (query + self.pos_bias_v.unsqueeze(1)) @ positions.transpose(-2, -1)

    def keys_values(self, memory: Tensor, past: Tensor | None = None) -> Tensor:
        """Return keys and values [batch, kv_heads, time, 2 * head_dim] of `past` and `memory` [batch, time, dim]."""
        new = torch.cat((self._heads(self.linear_k(memory)), self._heads(self.linear_v(memory))), dim=-1)
        return new if past is None else torch.cat((past, new), dim=2)

    def forward(self, x: Tensor, keys_values: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """Attend from `x` [batch, time, dim] to `keys_values`.

        `mask` is true where a query may see a key, and is broadcast to [batch, heads, time, keys]. Relative and rotary
        attention need `positions`: the result of `positions.encodings` for the keys [batch or 1, keys, ...].
        """
        repeats = self.config.num_heads // self.config.num_kv_heads
        keys, values = keys_values.repeat_interleave(repeats, dim=1).chunk(2, dim=-1)
        query = self._heads(self.linear_q(x))
        if (self.config.relative or self.config.rotary) and positions is None:
            raise ValueError("relative and rotary attention need positions of the keys")
        if self.config.rotary and positions is not None:
            query, keys = rotated(query, positions[:, -x.shape[1] :]), rotated(keys, positions)
        if self.config.relative and positions is not None:
            scores = torch.add(*self.relative_scores(query, keys, self._heads(self.linear_pos(positions))))
        else:
            scores = query @ keys.transpose(-2, -1)
        if self.config.by_distance:
            vectors = self.rel_k_embed(distances(x.shape[1], keys.shape[2]).to(x.device) + FURTHEST_LEFT)
            scores = scores + torch.einsum("bhtd,tkd->bhtk", query, vectors)
        return cast("Tensor", self.linear_out(attended(scores, values, mask)))
