"""The Squeezeformer encoder (arXiv 2206.00888) in plain torch. The middle blocks run at half the frame rate.

`squeezeformer_nodes` builds the same layers for a graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import (
    MOST_BLOCKS,
    Attention,
    Convolution,
    EncoderArchitecture,
    FeedForward,
    Norm,
    NormKind,
    checked_encoder,
    read_chunks,
    read_kernel,
)
from u2moe.export.attention import MultiHeadAttention, added, attended
from u2moe.export.convolution import ConvolutionModule
from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE, BlockCaches, Context, EncoderBlock, SpeechEncoder
from u2moe.export.layers import parameter, transposed, vector, weight_and_bias
from u2moe.export.moe import DenseFeedForward
from u2moe.export.subsampling import Convolutions
from u2moe.export.text_files import Section
from u2moe.runtime.bundle.contract import Cache
from u2moe.runtime.graph import layers
from u2moe.runtime.graph.activation import ACTIVATIONS
from u2moe.runtime.graph.builder import GraphBuilder

HALF_ATT_CACHE = "half_att_cache"  # keys and values of the blocks at half the frame rate
Reduction = Literal["conv1d", "stream"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
NORMS: tuple[NormKind, ...] = ("batch_norm", "layer_norm")


@dataclass(frozen=True, kw_only=True)
class Squeezed:
    """Settings that only the Squeezeformer encoder has."""

    reduce: int  # index of the first block at half the frame rate
    recover: int  # index of the first block that runs at the full frame rate again
    reduction: Reduction  # `stream` reads only every second frame; `conv1d` convolves all frames with stride 2
    adaptive: bool  # whether layers scale and shift their inputs
    shifted: bool  # whether the position scores are shifted, as in Transformer-XL. The encoder then cannot stream
    depthwise_subsampling: bool

    def is_half(self, index: int) -> bool:
        """Whether a block runs at half the frame rate."""
        return self.reduce <= index < self.recover


def read(top: Section) -> EncoderArchitecture:
    """Return the architecture described by a train.yaml."""
    conf = top.section("encoder_conf")
    dim, num_heads = conf.integer("encoder_dim", 256), conf.integer("attention_heads", 4)
    if dim % 2:
        raise conf.wrong("encoder_dim", dim, "even (positions are encoded as pairs of sine and cosine)")
    if conf.integer("output_size", 256) != dim:
        raise conf.unsupported("output_size", conf.value("output_size"), (f"{dim}, the value of encoder_dim",))
    if dim % num_heads:
        raise conf.wrong("attention_heads", num_heads, f"a divisor of encoder_dim {dim}")
    conf.known |= {"input_dropout_rate", "feed_forward_dropout_rate", "dropout", "init_weights"}  # training only
    conf.choice("pos_enc_layer_type", "rel_pos", ("rel_pos",))
    activation = conf.choice("activation_type", "swish", tuple(ACTIVATIONS))
    num_blocks = conf.integer("num_blocks", 12, most=MOST_BLOCKS)
    own = Squeezed(
        reduce=_block(conf, "reduce_idx", 5, least=1, most=num_blocks - 1),
        recover=_block(conf, "recover_idx", 11, least=1, most=num_blocks - 1),
        reduction=conf.choice("time_reduction_layer_type", "conv1d", REDUCTIONS),
        adaptive=conf.flag("adaptive_scale", default=True),
        shifted=conf.flag("do_rel_shift", default=True),
        depthwise_subsampling=conf.flag("dw_stride", default=False),
    )
    if own.recover <= own.reduce:
        raise conf.wrong("recover_idx", own.recover, f"above reduce_idx {own.reduce}")
    causal = conf.flag("causal", default=False)
    kernel = read_kernel(conf, "cnn_module_kernel", 31, causal=causal)
    norm = Norm(kind=conf.choice("cnn_norm_type", "batch_norm", NORMS))
    head_dim, hidden = dim // num_heads, dim * conf.integer("feed_forward_expansion_factor", 4)
    encoder = EncoderArchitecture(
        kind="squeezeformer", input_size=top.integer("input_dim"), dim=dim, num_blocks=num_blocks, subsampling="conv2d",
        positions="rel_pos", feed_forward=FeedForward(hidden=hidden, activation=activation), macaron=False,
        attention=Attention(num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, relative=True),
        convolution=Convolution(
            kernel=kernel, causal=causal, channels=dim, bias=True, norm=norm, activation=activation
        ),
        norm=Norm(), pre_norm=conf.flag("normalize_before", default=False), final_norm=False, **read_chunks(conf),
        causal=causal and own.reduction == "stream" and not own.shifted, chunk_multiple=2, own=own,
    )  # fmt: skip
    if encoder.static_chunk_size % 2 and not encoder.dynamic_chunk:
        raise conf.unsupported("static_chunk_size", encoder.static_chunk_size, ("even numbers",))
    return checked_encoder(conf, top, encoder)


def _block(conf: Section, key: str, default: int, *, least: int, most: int) -> int:
    """Return the block index under `key`, which may be a number or a list of one number."""
    found = conf.value(key) if key in conf else default
    number = found[0] if isinstance(found, list) and len(found) == 1 else found
    if not isinstance(number, int) or isinstance(number, bool):
        raise conf.unsupported(key, found, ("the index of one block",))
    if not least <= number <= most:
        raise conf.wrong(key, found, f"the index of a block from {least} to {most}")
    return number


class SqueezeSubsampling(Convolutions):
    """Two convolutions (the second may be depthwise), a factor of sqrt(dim), and a projection."""

    def __init__(self, config: EncoderArchitecture) -> None:
        super().__init__(config)
        dim, grouped = config.dim, cast("Squeezed", config.own).depthwise_subsampling
        projection = self.projection[0]
        del self.conv, self.out
        self.pw_conv = nn.Conv2d(1, dim, 3, 2)
        self.dw_conv = nn.Conv2d(dim, dim, 3, 2, groups=dim if grouped else 1)
        self.input_proj = nn.Sequential(projection)

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        """Map [batch, frames, mel] to [batch, time, dim]."""
        x = self.dw_conv(self.pw_conv(x.unsqueeze(1)).relu()).relu()
        return cast("Tensor", self.input_proj(x.transpose(1, 2).flatten(2) * self.scale))

    def nodes(self, g: GraphBuilder, features: ir.Value, lens: ir.Value) -> ir.Value:  # noqa: ARG002 - as in the base
        """See `Subsampling`. A depthwise convolution becomes a full one with many zeros."""
        layer, projection, channels = self.dw_conv, cast("nn.Linear", self.input_proj[0]), self.dw_conv.out_channels

        def weight() -> Tensor:
            return layer.weight if layer.groups == 1 else torch.eye(channels)[:, :, None, None] * layer.weight

        form = layers.SubsamplingLayer(kernels=(3, 3), strides=(2, 2), bins=self.input_size)
        with g.scope("embed", group="subsampling"):
            weights = [
                *weight_and_bias(g, self.pw_conv, "pw_conv."),
                parameter(g, "dw_conv.weight", (channels, channels, 3, 3), weight),
                vector(g, "dw_conv.bias", cast("Tensor", layer.bias)),
                transposed(g, "input_proj.0.weight", projection.weight, self.scale),
                vector(g, "input_proj.0.bias", projection.bias),
            ]
            return g.call(form.function(projection.in_features), features, *weights)[0]


class Scaling(nn.Module):
    """A layer that scales and shifts its input. WeNet creates both tensors even if they are not used."""

    def __init__(self, dim: int, config: Attention | FeedForward | Convolution, own: Squeezed) -> None:
        super().__init__(dim, config)
        self.adaptive = own.adaptive
        self.ada_scale, self.ada_bias = nn.Parameter(torch.ones(1, 1, dim)), nn.Parameter(torch.zeros(1, 1, dim))

    def scaled(self, x: Tensor) -> Tensor:
        """Scale and shift [batch, time, dim] if `adaptive` is true."""
        return self.ada_scale * x + self.ada_bias if self.adaptive else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Scale the input, and apply the layer."""
        return super().forward(self.scaled(x), *args, **kwargs)


class SqueezeAttention(Scaling, MultiHeadAttention):
    """Relative attention on a scaled input; its position scores may be shifted."""

    def __init__(self, dim: int, config: Attention, own: Squeezed) -> None:
        super().__init__(dim, config, own)
        self.shifted = own.shifted

    def attend(self, x: Tensor, past: BlockCaches, name: str, context: Context) -> tuple[Tensor, Tensor]:
        """Apply attention to `x` [batch, time, dim]; also return the cache `name` with new keys and values appended."""
        keys_values = self.keys_values(self.scaled(x), past.get(name))
        if not self.shifted:
            return self(x, keys_values, context.mask, context.positions), keys_values
        x = self.scaled(x)
        keys, values = keys_values.chunk(2, dim=-1)
        query, located = self._heads(self.linear_q(x)), self._heads(self.linear_pos(context.positions))
        content, position = self.relative_scores(query, keys, located)
        # put a zero before each row, drop the first `time` numbers, and split the rest into rows of the original length
        batch, heads, time, num_keys = position.shape
        padded = nn.functional.pad(position, (1, 0)).view(batch, heads, num_keys + 1, time)
        shifted = padded[:, :, 1:].reshape(position.shape)
        return self.linear_out(attended(content + shifted, values, context.mask)), keys_values


class SqueezeFeedForward(Scaling, DenseFeedForward):
    """A feed-forward layer on a scaled input."""


class SqueezeConvolution(Scaling, ConvolutionModule):
    """A convolution module on a scaled input."""


class SqueezeformerBlock(EncoderBlock):
    """Residual layers: attention, feed-forward, convolution, and feed-forward."""

    def __init__(self, config: EncoderArchitecture, index: int) -> None:
        super().__init__()
        own, dim = cast("Squeezed", config.own), config.dim
        self.pre_norm = config.pre_norm
        self.cache = HALF_ATT_CACHE if own.is_half(index) else ATT_CACHE
        self.self_attn = SqueezeAttention(dim, config.attention, own)
        self.ffn1 = SqueezeFeedForward(dim, config.feed_forward, own)
        self.conv_module = SqueezeConvolution(dim, cast("Convolution", config.convolution), own)
        self.ffn2 = SqueezeFeedForward(dim, config.feed_forward, own)
        self.layer_norm1, self.layer_norm2, self.layer_norm3, self.layer_norm4 = (nn.LayerNorm(dim) for _ in range(4))

    def forward(self, x: Tensor, context: Context, caches: BlockCaches) -> tuple[Tensor, BlockCaches]:
        """Apply the block to [batch, time, dim]; also return the caches with this call's frames appended."""
        following: BlockCaches = {}

        def attention(y: Tensor) -> Tensor:
            y, following[self.cache] = self.self_attn.attend(y, caches, self.cache, context)
            return y

        def convolved(y: Tensor) -> Tensor:
            y, history = self.conv_module(y, context.valid, caches.get(CNN_CACHE))
            following.update({} if history is None else {CNN_CACHE: history})
            return y

        x = added(x, attention, self.layer_norm1, self.pre_norm)
        x = added(x, self.ffn1, self.layer_norm2, self.pre_norm)
        x = added(x, convolved, self.layer_norm3, self.pre_norm)
        return added(x, self.ffn2, self.layer_norm4, self.pre_norm), following

    @classmethod
    def caches(cls, config: EncoderArchitecture) -> tuple[Cache, ...]:
        """See `EncoderBlock`."""
        own = cast("Squeezed", config.own)
        num_half = own.recover - own.reduce
        _, *histories = super().caches(config)
        half = cls._attention_cache(config, num_half, HALF_ATT_CACHE, rate=0.5)
        return cls._attention_cache(config, config.num_blocks - num_half), half, *histories


class TimeReduction(nn.Module):
    """A layer that halves the frame rate: a depthwise convolution with stride 2, and a projection."""

    KERNELS: ClassVar = {"conv1d": 5, "stream": 1}
    BEFORE: ClassVar = {"conv1d": 3, "stream": 0}
    """Number of frames before frame 2 * i that output frame i reads. WeNet drops outputs past the end."""

    def __init__(self, dim: int, kind: Reduction) -> None:
        super().__init__()
        self.kind = kind
        self.dw_conv = nn.Conv1d(dim, dim, self.KERNELS[kind], stride=2, padding=self.BEFORE[kind], groups=dim)
        self.pw_conv = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Map [batch, time, dim] to [batch, (time + 1) // 2, dim]; `valid` is true for frames that exist."""
        y = self.pw_conv(self.dw_conv(x.masked_fill(~valid.unsqueeze(-1), 0.0).transpose(1, 2)))
        return cast("Tensor", y.transpose(1, 2)[:, : (x.shape[1] + 1) // 2])


class SqueezeformerEncoder(SpeechEncoder):
    """Squeezeformer blocks; the middle ones run at half the frame rate."""

    SUBSAMPLING = SqueezeSubsampling

    def __init__(self, config: EncoderArchitecture, block: type[EncoderBlock]) -> None:
        super().__init__(config, block)
        del self.after_norm
        self.own = cast("Squeezed", config.own)
        self.preln = nn.LayerNorm(config.dim)
        self.time_reduction_layer = TimeReduction(config.dim, self.own.reduction)
        self.time_recover_layer = nn.Linear(config.dim, config.dim)

    def _run_blocks(
        self, x: Tensor, context: Context, caches: Sequence[BlockCaches]
    ) -> tuple[Tensor, list[BlockCaches]]:
        x, following = self.preln(x), []
        valid, half, full = context.valid, context.strided(2), x
        for index, (block, own) in enumerate(zip(self.encoders, caches, strict=True)):
            if index == self.own.reduce:
                full, x = x, self.time_reduction_layer(x, valid)
            if index == self.own.recover:
                recovered = self.time_recover_layer(x.repeat_interleave(2, dim=1))
                x = (full + recovered[:, : full.shape[1]]).masked_fill(~valid.unsqueeze(-1), 0.0)
            x, cache = block(x, half if self.own.is_half(index) else context, own)
            following.append(cache)
        return x, following
