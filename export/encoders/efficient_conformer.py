"""The Efficient Conformer encoder (arXiv 2109.01163) in plain torch: strided convolutions and attention over groups.

`efficient_conformer_nodes` builds the same layers for a graph. At commit 0154699, WeNet's forward_chunk fails for this
encoder. The attention expects each cache as a pair of tensors, but receives one tensor. With corrected caches, WeNet's
output equals the output of this module. So does WeNet's output for the whole utterance with a chunk mask.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from u2moe.export.architecture import Attention, Convolution, EncoderArchitecture
from u2moe.export.attention import MultiHeadAttention, attended
from u2moe.export.convolution import ConvolutionModule
from u2moe.export.encoders.conformer import ConformerBlock
from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE, BlockCaches, Context, SpeechEncoder, attention_cache
from u2moe.export.layer_config import encoder_architecture
from u2moe.export.yaml_section import Section
from u2moe.runtime.bundle.contract import Cache

IGNORED = (
    "mlp_type", "mlp_bias", "n_expert", "n_expert_activated", "n_kv_head", "head_dim", "query_bias", "key_bias",
    "value_bias", "conv_bias", "layer_norm_type", "norm_eps", "conv_norm_eps", "conv_inner_factor", "final_norm",
)  # fmt: skip
"""Keys of a conformer's encoder_conf that WeNet accepts for this encoder but does not use."""
CACHES = (ATT_CACHE, CNN_CACHE)


@dataclass(frozen=True, kw_only=True)
class Strided:
    """Settings that only the Efficient Conformer encoder has."""

    strides: tuple[int, ...]
    """For each block, the number of its frames that become one frame of the next block."""
    kernels: tuple[int, ...]
    """Taps of the convolution of each block."""
    group_sizes: tuple[int, ...]
    """For each block, the number of frames in an attention group."""

    def step(self, index: int) -> int:
        """Return how many subsampled frames one frame of block `index` spans."""
        return math.prod(self.strides[:index])

    @property
    def chunk_multiple(self) -> int:
        """Chunk sizes must be multiples of this number of subsampled frames, so that no chunk ends within a group."""
        groups = (self.step(index) * size for index, size in enumerate(self.group_sizes))
        return math.lcm(math.prod(self.strides), *groups)

    def rates(self) -> dict[int, range]:
        """Return, for each value of `step`, the range of blocks that have it."""
        steps = [self.step(index) for index in range(len(self.strides))]
        return {step: range(steps.index(step), steps.index(step) + steps.count(step)) for step in steps}


def read(top: Section) -> EncoderArchitecture:
    """Return the architecture described by a train.yaml."""
    conf = top.section("encoder_conf")
    conf.refuse(IGNORED, "WeNet ignores it for this encoder")
    conf.choice("cnn_module_norm", "batch_norm", ("batch_norm", "layer_norm"))  # WeNet fails with other norms
    shared = encoder_architecture(conf, top, attentions=("rel_selfattn",), has_macaron=True, has_convolution=True)
    conf.choice("pos_enc_layer_type", "rel_pos", ("rel_pos",))
    if shared.convolution is None:
        raise conf.unsupported("use_cnn_module", conf.value("use_cnn_module"), ("true",))
    own = _strided(conf.section("efficient_conf") if "efficient_conf" in conf else conf, shared)
    if not shared.dynamic_chunk and shared.static_chunk_size % own.chunk_multiple:
        raise conf.unsupported("static_chunk_size", shared.static_chunk_size, (f"multiples of {own.chunk_multiple}",))
    reduction = math.prod(own.strides)
    return replace(shared, own=own, frame_reduction=reduction, chunk_multiple=own.chunk_multiple // reduction)


def _strided(conf: Section, shared: EncoderArchitecture) -> Strided:
    num, convolution = shared.num_blocks, cast("Convolution", shared.convolution)
    places = _numbers(conf, "stride_layer_idx", (3,), most=num - 1)
    strides = _numbers(conf, "stride", (2,), least=1, most=16)
    grouped = _numbers(conf, "group_layer_idx", (0, 1, 2, 3), most=1 << 20)
    group_size = conf.integer("group_size", 3, most=64)
    shrinks = conf.flag("stride_kernel", default=True)
    if len(places) != len(strides) or sorted(set(places)) != list(places):
        expected = f"one number for each index in stride_layer_idx {list(places)}, which must ascend"
        raise conf.wrong("stride", list(strides), expected)
    by_block = dict(zip(places, strides, strict=True))
    kernels, kernel = [], convolution.kernel
    for index in range(num):
        if kernel < 1 or (not convolution.causal and kernel % 2 == 0):
            expected = f"a value that gives block {index} an odd kernel instead of {kernel}"
            raise conf.wrong("stride_kernel", shrinks, expected)
        kernels.append(kernel)
        kernel = kernel // by_block.get(index, 1) if shrinks else kernel
    return Strided(
        strides=tuple(by_block.get(index, 1) for index in range(num)),
        kernels=tuple(kernels),
        group_sizes=tuple(group_size if index in grouped else 1 for index in range(num)),
    )


def _numbers(conf: Section, key: str, default: tuple[int, ...], *, least: int = 0, most: int) -> tuple[int, ...]:
    """Return a setting as a tuple; in the file, it is a whole number or a list of whole numbers."""
    found = conf.value(key) if key in conf else list(default)
    listed = found if isinstance(found, list) else [found]
    if not all(isinstance(one, int) and not isinstance(one, bool) and least <= one <= most for one in listed):
        raise conf.wrong(key, found, f"whole numbers from {least} to {most}")
    return tuple(listed)


class GroupedAttention(MultiHeadAttention):
    """Relative attention in which several frames together form one query, one key and one value."""

    def __init__(self, dim: int, config: Attention, group_size: int) -> None:
        super().__init__(dim, config)
        self.group_size = group_size
        shape = config.num_heads, config.head_dim * group_size
        self.pos_bias_u, self.pos_bias_v = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))

    def _groups(self, x: Tensor) -> Tensor:
        """Reshape [batch, time, dim] to [batch, heads, groups, group_size * head_dim]."""
        missing = -x.shape[1] % self.group_size
        padded = nn.functional.pad(x, (0, 0, 0, missing))
        return padded.reshape(len(x), -1, *self.pos_bias_u.shape).transpose(1, 2)

    def forward(self, x: Tensor, keys_values: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """See `MultiHeadAttention`. All arguments refer to frames, not groups."""
        frames = (part.transpose(1, 2).flatten(2) for part in keys_values.chunk(2, dim=-1))
        query, keys, values, located = map(self._groups, (self.linear_q(x), *frames, self.linear_pos(positions)))
        scores = torch.add(*self.relative_scores(query, keys, located))
        context = attended(scores, values, mask[:, :, :: self.group_size, :: self.group_size])
        context = context.reshape(len(x), -1, x.shape[2])
        return cast("Tensor", self.linear_out(context[:, : x.shape[1]]))


class StridedConvolution(ConvolutionModule):
    """A convolution module that outputs one frame for every `stride` frames."""

    def __init__(self, dim: int, config: Convolution, stride: int) -> None:
        super().__init__(dim, config)
        self.stride = stride
        self.depthwise_conv.stride = (stride,)


class EfficientBlock(ConformerBlock):
    """A conformer block with optional grouped attention and an optionally strided convolution."""

    def __init__(self, config: EncoderArchitecture, index: int) -> None:
        own, dim = cast("Strided", config.own), config.dim
        convolution = replace(cast("Convolution", config.convolution), kernel=own.kernels[index])
        super().__init__(replace(config, convolution=convolution))
        self.stride, group_size = own.strides[index], own.group_sizes[index]
        self.attention_cache, self.convolution_cache = (cache_name(each, own.step(index)) for each in CACHES)
        self.is_grouped = group_size > 1
        if self.is_grouped:
            self.self_attn = GroupedAttention(dim, config.attention, group_size)
        if self.stride > 1:
            self.conv_module = StridedConvolution(dim, convolution, self.stride)
            self.concat_linear = nn.Linear(2 * dim, dim)  # in WeNet's state dict, but never used

    def beside(self, x: Tensor, context: Context) -> Tensor:
        """See `ConformerBlock`. Returns the average of each group of frames that the convolution combines into one."""
        return averaged(x, context.valid, self.stride)


def averaged(x: Tensor, valid: Tensor, stride: int) -> Tensor:
    """Return the average of every `stride` adjacent frames of [batch, time, dim], counting only existing frames."""
    if stride == 1:
        return x
    exists = valid.unsqueeze(-1).to(x.dtype)
    missing = (0, 0, 0, -x.shape[1] % stride)

    def total(values: Tensor) -> Tensor:
        padded = nn.functional.pad(values, missing)
        return padded.reshape(len(x), -1, stride, values.shape[2]).sum(dim=2)

    return total(x * exists) / total(exists).clamp(min=1)


def cache_name(name: str, step: int) -> str:
    """Return the name of the cache for blocks whose frames each cover `step` subsampled frames."""
    return name if step == 1 else f"{name}_{step}"


class EfficientConformerEncoder(SpeechEncoder):
    """Conformer blocks; some lower the frame rate."""

    BLOCK = EfficientBlock

    @classmethod
    def caches(cls, config: EncoderArchitecture) -> tuple[Cache, ...]:
        """See `SpeechEncoder`."""
        own, channels = cast("Strided", config.own), cast("Convolution", config.convolution).channels
        found = []
        for step, blocks in own.rates().items():
            kernel, rate = own.kernels[blocks[0]], config.frame_reduction / step
            found.append(attention_cache(config, len(blocks), cache_name(ATT_CACHE, step), rate))
            if kernel > 1:
                shape = (channels, kernel - 1)
                found.append(Cache(name=cache_name(CNN_CACHE, step), num_blocks=len(blocks), shape=shape))
        return tuple(found)

    def run_blocks(
        self, x: Tensor, context: Context, caches: Sequence[BlockCaches]
    ) -> tuple[Tensor, list[BlockCaches]]:
        """See `SpeechEncoder`."""
        following = []
        for block, own in zip(self.encoders, caches, strict=True):
            x, cache = block(x, context, own)
            following.append(cache)
            context = context.strided(cast("EfficientBlock", block).stride)
        return x, following
