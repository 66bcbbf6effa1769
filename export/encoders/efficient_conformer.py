"""The Efficient Conformer encoder (arXiv 2109.01163): strided convolutions and attention over groups of frames.

At commit 0154699, WeNet's forward_chunk fails for this encoder, because its attention expects each cache as a pair of
tensors. With corrected caches, and for whole utterances with a chunk mask, WeNet's output equals that of this module.
"""

import math
from dataclasses import dataclass, replace
from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from u2moe.export.architecture import Attention, Convolution, EncoderArchitecture, encoder_architecture
from u2moe.export.attention import MultiHeadAttention, attended
from u2moe.export.convolution import ConvolutionModule, convolution_parts, initial_cache
from u2moe.export.encoders.conformer import ConformerBlock, ConformerNodes
from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE, Context
from u2moe.export.encoders.nodes import FrameNodes, next_history
from u2moe.export.layers import AttentionNodes, Residual, linear, parameter, product, sinusoids
from u2moe.export.text_files import Section
from u2moe.runtime.bundle.contract import Cache
from u2moe.runtime.graph.attention import END, Heads, attention, to_heads
from u2moe.runtime.graph.convolution import ReducingConvolution

IGNORED = (
    "mlp_type", "mlp_bias", "n_expert", "n_expert_activated", "n_kv_head", "head_dim", "query_bias", "key_bias",
    "value_bias", "conv_bias", "layer_norm_type", "norm_eps", "conv_norm_eps", "conv_inner_factor", "final_norm",
)  # fmt: skip
"""Keys of a conformer's encoder_conf that WeNet accepts for this encoder but does not use."""
CACHES = (ATT_CACHE, CNN_CACHE)


@dataclass(frozen=True, kw_only=True)
class Strided:
    """Settings that only the Efficient Conformer encoder has."""

    strides: tuple[int, ...]  # for each block, the number of its frames that become one frame of the next block
    kernels: tuple[int, ...]  # taps of the convolution of each block
    group_sizes: tuple[int, ...]  # for each block, the number of frames in an attention group

    def step(self, index: int) -> int:
        """Return how many subsampled frames one frame of block `index` spans."""
        return math.prod(self.strides[:index])

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
    reduction = math.prod(own.strides)
    # no chunk may end within a group
    multiple = math.lcm(reduction, *(own.step(index) * size for index, size in enumerate(own.group_sizes)))
    if not shared.dynamic_chunk and shared.static_chunk_size % multiple:
        raise conf.unsupported("static_chunk_size", shared.static_chunk_size, (f"multiples of {multiple}",))
    return replace(shared, own=own, frame_reduction=reduction, chunk_multiple=multiple // reduction)


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
        padded = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self.group_size))
        return padded.reshape(len(x), -1, *self.pos_bias_u.shape).transpose(1, 2)

    def forward(self, x: Tensor, keys_values: Tensor, mask: Tensor, positions: Tensor | None = None) -> Tensor:
        """See `MultiHeadAttention`. All arguments refer to frames, not groups."""
        frames = (part.transpose(1, 2).flatten(2) for part in keys_values.chunk(2, dim=-1))
        query, keys, values, located = map(self._groups, (self.linear_q(x), *frames, self.linear_pos(positions)))
        scores = torch.add(*self.relative_scores(query, keys, located))
        context = attended(scores, values, mask[:, :, :: self.group_size, :: self.group_size])
        context = context.reshape(len(x), -1, x.shape[2])
        return cast("Tensor", self.linear_out(context[:, : x.shape[1]]))


class EfficientBlock(ConformerBlock):
    """A conformer block with optional grouped attention and an optionally strided convolution."""

    def __init__(self, config: EncoderArchitecture, index: int) -> None:
        own, dim = cast("Strided", config.own), config.dim
        convolution = replace(cast("Convolution", config.convolution), kernel=own.kernels[index])
        super().__init__(replace(config, convolution=convolution))
        self.stride, group_size = own.strides[index], own.group_sizes[index]
        self.attention_cache, self.convolution_cache = (cache_name(each, own.step(index)) for each in CACHES)
        if group_size > 1:
            self.self_attn = GroupedAttention(dim, config.attention, group_size)
        if self.stride > 1:
            self.conv_module = ConvolutionModule(dim, convolution, self.stride)
            self.concat_linear = nn.Linear(2 * dim, dim)  # in WeNet's state dict, but never used

    def beside(self, x: Tensor, context: Context) -> Tensor:
        """See `ConformerBlock`. Returns the average of each group of frames that the convolution combines into one."""
        if self.stride == 1:
            return x
        exists = context.valid.unsqueeze(-1).to(x.dtype)  # only existing frames count

        def total(values: Tensor) -> Tensor:
            padded = nn.functional.pad(values, (0, 0, 0, -x.shape[1] % self.stride))
            return padded.reshape(len(x), -1, self.stride, values.shape[2]).sum(dim=2)

        return total(x * exists) / total(exists).clamp(min=1)

    @classmethod
    def caches(cls, config: EncoderArchitecture) -> tuple[Cache, ...]:
        """See `EncoderBlock`."""
        own, found = cast("Strided", config.own), []
        for step, blocks in own.rates().items():
            attention, history = (cache_name(each, step) for each in CACHES)
            found.append(cls._attention_cache(config, len(blocks), attention, config.frame_reduction / step))
            shape = (cast("Convolution", config.convolution).channels, own.kernels[blocks[0]] - 1)
            found += [Cache(name=history, num_blocks=len(blocks), shape=shape)] if shape[1] else []
        return tuple(found)


def cache_name(name: str, step: int) -> str:
    """Return the name of the cache for blocks whose frames each cover `step` subsampled frames."""
    return name if step == 1 else f"{name}_{step}"


class EfficientConformerNodes(ConformerNodes):
    """Builds the encoder as layers of a graph."""

    own: Strided

    @property
    def _longest_history(self) -> int:
        longest = max((kernel - 1) * self.own.step(index) for index, kernel in enumerate(self.own.kernels))
        return longest + -longest % self.config.frame_reduction

    def _share(self, x: ir.Value) -> None:
        modules = [cast("ConvolutionModule", block.conv_module) for block in self.encoder.encoders]
        self.start = initial_cache(self.g, modules)
        self.following: dict[str, ir.Value] = {}
        time = self.g.op("Shape", x, start=1, end=2)
        with self.g.scope("frames"):
            self.offset = self._position(time) if self.streaming else [0]
            required = self.inputs.get("required_cache_size")
            self.required = None if required is None else self.g.op("Mul", required, self.config.frame_reduction)
        self._enter(time, 1)

    def _enter(self, time: ir.Value, step: int) -> None:
        """Start building the blocks that share a frame rate."""
        g, blocks, start = self.g, self.own.rates().get(step, range(0)), self.start
        self.time, self.step, self.blocks = time, step, blocks
        attention, history = (self.inputs.get(cache_name(each, step)) for each in CACHES)
        with g.scope(f"frames_{step}"):
            required = None if attention is None else self.required
            self.frames = FrameNodes(g, time, self.output_lens, self.offset, step, attention, required)
            self.exists = g.op("Unsqueeze", g.op("Cast", self.frames.visible, to=ir.DataType.FLOAT), [2])
            self.valid = g.op("Slice", self.exists, self.frames.cache_time, [END], [1])
            self.encodings = sinusoids(g, self.frames.positions, self.config.dim)
            has_history = blocks and self.own.kernels[blocks.start] > 1 and start is not None
            start = g.op("Slice", start, [blocks.start], [blocks.stop], [0]) if has_history else None
            self.seen = self.frames.surroundings(start, history)

    def _leave(self) -> None:
        """Store the new caches of the blocks at the current frame rate."""
        attention, history = (f"r_{cache_name(each, self.step)}" for each in CACHES)
        if self.frames.kept:
            self.following[attention] = self.frames.next_attention_cache()
        if self.seen.kept:
            self.following[history] = next_history(self.g, self.seen.kept)

    def _next_caches(self) -> dict[str, ir.Value]:
        self._leave()
        return self.following

    def _convolve(self, residual: Residual, block: ConformerBlock, module: ConvolutionModule, index: int) -> None:
        """See `ConformerNodes`. For a strided convolution, residual frames are averaged before its output is added."""
        g, row, stride, pre_norm = self.g, index - self.blocks.start, module.stride, self.config.pre_norm
        if stride == 1:
            super()._convolve(residual, block, module, row)
            return
        branch = residual.normalized(block.norm_conv, "norm_conv") if pre_norm else residual.total
        branch, x = self._reduced(branch, module, row), residual.total

        def total(values: ir.Value, width: int) -> ir.Value:
            frames = g.op("Reshape", self._padded(values, stride), [0, -1, stride, width])
            return g.op("ReduceSum", frames, [2], keepdims=0)

        number = g.op("Max", total(self.valid, 1), 1.0)  # only existing frames count
        average = g.op("Div", total(g.op("Mul", x, self.valid), self.config.dim), number)
        self.output_lens = g.op("Div", g.op("Add", self.output_lens, stride - 1), stride)
        self._leave()
        self._enter(g.op("Div", g.op("Add", self.time, stride - 1), stride), self.step * stride)
        residual.add_branch(branch, average)
        if not pre_norm:
            residual.normalize(block.norm_conv, "norm_conv")

    def _reduced(self, x: ir.Value, module: ConvolutionModule, row: int) -> ir.Value:
        g, config, valid = self.g, module.config, self.valid
        padding = 0 if config.causal else (config.kernel - 1) // 2
        form = ReducingConvolution(kernel=config.kernel, stride=module.stride, before=padding, after=padding)
        seen, taps, finish = convolution_parts(g, x, module)
        if config.causal:
            valid = g.constant(torch.ones(1, 1, 1).numpy())
            if self.seen.histories is not None:
                past = g.op("Gather", self.seen.histories, g.constant(row), axis=0)
                shape = g.op("Concat", g.op("Shape", seen, end=1), [config.kernel - 1, config.channels], axis=0)
                seen = g.op("Concat", g.op("Expand", past, shape), seen, axis=1)
                kept = g.op("Unsqueeze", g.op("Slice", seen, [1 - config.kernel], [END], [1]), [0])
                self.seen.kept.extend([kept] if self.streaming else [])
        return finish(g.call(form.function(config.channels), seen, valid, *taps)[0])

    def _padded(self, x: ir.Value, size: int) -> ir.Value:
        """Pad [batch, time, ...] with zeros at the end, until the number of frames is a multiple of `size`."""
        missing = self.g.op("Mod", self.g.op("Sub", [0], self.time), [size])
        return self.g.op("Pad", x, self.g.op("Concat", [0, 0, 0, 0], missing, [0], axis=0))

    def _self_attention(self, x: ir.Value, block: nn.Module, index: int) -> ir.Value:
        layer, row = self.attention_of(block), index - self.blocks.start
        with self.g.scope(self.ATTENTION, group="attention"):
            if isinstance(layer, GroupedAttention):
                return self._grouped(x, layer, row)
            (bias,) = self.frames.biases([layer], [self.encodings])
            return self.frames.attend(AttentionNodes(self.g, layer), x, bias, [self.encodings], row)

    def _grouped(self, x: ir.Value, layer: GroupedAttention, row: int) -> ir.Value:
        """Attend between groups of frames: adjacent frames form one vector, which is then split into heads."""
        g, size = self.g, layer.group_size
        num_heads, head_dim = layer.pos_bias_u.shape
        heads = Heads(num_heads=num_heads, num_kv_heads=num_heads, size=head_dim)
        width, scale = num_heads * head_dim, 1 / math.sqrt(head_dim)

        def grouped(y: ir.Value, exists: ir.Value, *shape: int) -> ir.Value:
            return g.op("Reshape", self._padded(g.op("Mul", y, exists), size), [0, -1, *shape])

        query = g.op("Mul", grouped(linear(g, x, layer.linear_q, "linear_q"), self.valid, width), scale)
        query = g.op("Add", query, parameter(g, "pos_bias_u", (width,), lambda: layer.pos_bias_u.flatten() * scale))
        own = layer.config.head_dim
        both = to_heads(g, AttentionNodes(g, layer).key_value(x), num_heads, 2 * own)
        if self.streaming:
            self.frames.kept.append(g.op("Unsqueeze", g.op("Slice", both, self.frames.first_kept_new, [END], [2]), [0]))
            both = g.op("Concat", g.op("Gather", self.frames.cache, g.constant(row), axis=0), both, axis=2)
        parts = []
        for part in g.ops("Split", both, [own, own], axis=-1, num_outputs=2):
            frames = g.op("Reshape", g.op("Transpose", part, perm=[0, 2, 1, 3]), [0, 0, num_heads * own])
            parts.append(grouped(frames, self.exists, num_heads, head_dim))
        key_value = g.op("Reshape", g.op("Concat", *parts, axis=-1), [0, -1, 2 * width])
        positions = grouped(linear(g, self.encodings, layer.linear_pos, "linear_pos"), self.exists, width)
        weight = parameter(g, "position_bias", (width, num_heads), lambda: _position_bias(layer))
        located = g.op("Unsqueeze", g.op("Transpose", product(g, positions, weight), perm=[0, 2, 1]), [2])
        bias = g.op("Add", located, g.op("Slice", self.frames.bias, [0], [END], [3], [size]))
        (context,) = g.call(attention(heads, "relative"), query, key_value, bias, positions)
        frames = g.op("Slice", g.op("Reshape", context, [0, -1, self.config.dim]), [0], self.time, [1])
        return linear(g, frames, layer.linear_out, "linear_out")


def _position_bias(layer: GroupedAttention) -> torch.Tensor:
    """Return (v - u) / sqrt(size) as [heads * size, heads]. The column of a head is zero outside that head's rows."""
    difference = (layer.pos_bias_v - layer.pos_bias_u) / math.sqrt(layer.pos_bias_u.shape[1])
    num_heads, size = difference.shape
    return (torch.eye(num_heads).unsqueeze(1) * difference.unsqueeze(2)).reshape(num_heads * size, num_heads)
