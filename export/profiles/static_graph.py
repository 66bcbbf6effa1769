"""Joins the encoder and the CTC head of a bundle into one graph of fixed shape, `static.onnx`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from u2moe.export.comparison import Array
from u2moe.export.joining import Joined, joined, joined_model
from u2moe.export.profiles.folding import folded
from u2moe.runtime.bundle.contract import MOE_DOMAIN, Cache
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle.manifest import MASKED, StaticForm, StaticHistory, StaticRate, step_of
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.errors import UnsupportedError
from u2moe.runtime.graph.attention import END, PositionUse
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.convolution import DepthwiseConvolution, TimeConvolution
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.fixed import FixedHeads, fixed_convolution, fixed_mixture

_USES: Mapping[str, PositionUse] = {"": "", "Rotary": "rotary", "Distance": "distance"}
_ATTENTIONS = {f"{name}CachedAttention": use for name, use in _USES.items()}
_FORMS: Mapping[str, type[DepthwiseConvolution]] = {"": TimeConvolution, "Depthwise": DepthwiseConvolution}
_CONVOLUTIONS = {f"Cached{name}Convolution": form for name, form in _FORMS.items()}


class StaticGraph:
    """Rebuilds the encoder of a bundle with fixed shapes. If it cannot, UnsupportedError states why.

    Mixtures of experts, masks, positions, and layers with caches are rebuilt. All other nodes are kept, and constant
    ones are folded. `form` contains chunks and first position; its other fields are derived. `starts` contains the
    initial contents of the fixed-size caches, by cache name, in the graph's shapes.
    """

    def __init__(self, bundle: Bundle, form: StaticForm) -> None:
        self.bundle, self.config = bundle, bundle.manifest.model
        self._encoder = ir.load(bundle.path / "encoder.onnx")
        self._nodes = list(self._encoder.graph)
        if learned := [node.name for node in self._nodes if "learned positions" in str(node.name)]:
            raise UnsupportedError(f"{bundle.path}: {learned[0]}: learned positions do not allow a fixed shape")
        self._reads = {value: str(value.name) for value in self._encoder.graph.inputs}
        fixed = [cache for cache in self.config.caches if cache.time_axis is None]
        self._histories = {cache.name: self._history(cache.name) for cache in fixed}
        masks = [node for node in self._nodes if _is_mask(node)]
        self._masks = {_step(_origin(node.inputs[0], "Unsqueeze", "And", "Less")): node for node in masks}
        # Calls whose encodings become inputs, by the distance between adjacent positions. Rotary attention depends only
        # on distances, so its positions stay constant and need no input.
        is_rotary = any(_kind(node) == "RotaryCachedAttention" for node in self._nodes)
        kinds = ("Sinusoids",) if is_rotary else ("Sinusoids", "SinesAndCosines")
        self._encodings = {_step(_value(node.inputs[0])): node for node in self._nodes if _kind(node) in kinds}
        ends = {step: "" if step == 1 else f"_{step}" for step in sorted(self._masks)}
        self.form = replace(
            form,
            rates=tuple(
                StaticRate(step=step, mask=f"mask{end}", positions=f"positions{end}" if step in self._encodings else "")
                for step, end in ends.items()
            ),
            frequencies=next((self._frequencies(call) for call in self._encodings.values()), ()),
            interleaved=all(_kind(call) == "Sinusoids" for call in self._encodings.values()),
            histories=tuple(
                StaticHistory(cache=name, start=f"{name}0.npy", steps=self._steps(nodes))
                for name, nodes in self._histories.items()
            ),
        )
        self.starts = {cache.name: self._start(cache) for cache in fixed}

    def model(self, metadata: Mapping[str, str]) -> ir.Model:
        """Return the folded graph."""
        contract = self.form.graph(self.config)
        return folded(joined_model(contract, "static", self.config.axis, dict(metadata), self._body))

    def _body(self, g: GraphBuilder, inputs: dict[str, ir.Value]) -> Joined:
        self._g, self._inputs, form, caches = g, inputs, self.form, self.config.caches
        for rate in form.rates:
            self._mask(self._masks[rate.step], inputs[rate.mask])
            if rate.positions:
                self._encodings[rate.step].outputs[0].replace_all_uses_with(inputs[rate.positions])
        pieces = {cache.name: self._split(cache) for cache in caches}
        for node in self._nodes:
            with g.scope(str(node.name)):
                self._rebuild(node, pieces)
        following = {f"r_{cache.name}": self._next(cache) for cache in caches}
        feeds = {cache.name: g.constant([0]) for cache in caches}  # no node reads them any more
        feeds["chunk"] = inputs["chunk"]
        feeds["chunk_lens"] = g.constant([self.config.num_features(form.chunk_size)])
        feeds["offset"] = g.constant([form.first_position])
        feeds["required_cache_size"] = g.constant(np.array(form.chunk_size * form.num_left_chunks, np.int64))
        results, parts = joined(self.bundle, feeds, self._encoder)
        return {**results, **following}, parts

    def _frequencies(self, call: ir.Node) -> tuple[float, ...]:
        """Return the frequencies of the positional encodings. They are a constant in the function that `call` calls."""
        for node in self._encoder.functions[call.op_identifier()]:
            if node.op_type == "Constant":
                value = node.attributes["value"].as_tensor().numpy()
                if value.dtype == np.float32:
                    return tuple(value.ravel().tolist())
        raise UnsupportedError(f"{self.bundle.path}: {call.name}: has no frequencies of positional encodings")

    def _history(self, cache: str) -> list[ir.Node]:
        """Return the nodes that put the initial frame in place of all frames of `cache` that precede the stream."""
        (value,) = (value for value, name in self._reads.items() if name == cache)
        transposed = [node for node in _readers(value) if node.op_type == "Transpose"]
        found = [node for source in transposed for node in _readers(source.outputs[0])]
        self._reads |= {node.outputs[0]: cache for node in found}
        return found

    def _steps(self, histories: list[ir.Node]) -> tuple[int, ...]:
        """Return the distance between adjacent frames of each block, in frames after subsampling."""
        steps = {
            _row(reader, node.outputs[0]): _step(_origin(node.inputs[0], "Unsqueeze", "GreaterOrEqual"))
            for node in histories
            for reader in _readers(node.outputs[0])
        }
        return tuple(steps[row] for row in sorted(steps))

    def _start(self, cache: Cache) -> Array:
        value, (channels, past) = _value(self._histories[cache.name][0].inputs[2]), cache.shape
        if value.const_value is None:  # a slice of the frames of all blocks
            source, first, last, *_ = _producer(value).inputs
            frames = _array(source)[_number(first) : _number(last)]
        else:
            frames = _array(value)
        start = np.broadcast_to(frames[:, 0], (cache.num_blocks, past, channels)).astype(np.float32, order="C")
        return start.reshape(self.form.cache_shape(self.config, cache))

    def _split(self, cache: Cache) -> Sequence[ir.Value]:
        """Return each block's part of a cache."""
        num, value = cache.num_blocks, self._inputs[cache.name]
        sizes = [self.form.cache_shape(self.config, cache)[1] // num] * num
        return self._g.ops("Split", value, sizes, axis=1, num_outputs=num) if num > 1 else [value]

    def _mask(self, node: ir.Node, mask: ir.Value) -> None:
        """Make the score bias an input of the graph. Encoders that need a mask of frames derive it from the bias."""
        g = self._g
        for reader in _readers(_origin(node.inputs[0], "Unsqueeze")):
            if reader.op_type == "Cast":
                exists = g.op("Add", g.op("Div", g.op("Squeeze", mask, [1, 2]), -MASKED), 1.0)
                reader.outputs[0].replace_all_uses_with(exists)
        node.outputs[0].replace_all_uses_with(mask)

    def _rebuild(self, node: ir.Node, pieces: Mapping[str, Sequence[ir.Value]]) -> None:
        """Replace the outputs of a node if its layer has a different form in the graph of fixed shape."""
        g, kind = self._g, _kind(node)
        read = next((value for value in node.inputs if value in self._reads), None)
        if (mixture := mixture_of(node)) is not None:
            x, gate, *weights = (_value(each) for each in node.inputs)
            node.outputs[0].replace_all_uses_with(fixed_mixture(g, mixture, x, gate, weights))
        elif read is None:
            return
        elif kind == "Shape":
            for cache in self.config.caches:
                if cache.name == self._reads[read]:
                    size = self.form.cache_shape(self.config, cache)[2] if cache.time_axis else cache.shape[1]
                    node.outputs[0].replace_all_uses_with(g.constant([size]))
        elif kind in (*_ATTENTIONS, *_CONVOLUTIONS, "Gather"):
            piece = pieces[self._reads[read]][_row(node, read)]
            found = (piece,) if kind == "Gather" else self._layer(node, kind, piece, self._reads[read])
            for old, new in zip(node.outputs, found, strict=True):
                old.replace_all_uses_with(new)

    def _layer(self, node: ir.Node, kind: str, past: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """Build an attention layer or a convolution that reads a cache; return its output and the frames to cache."""
        attributes: dict[str, Any] = {key: each.value for key, each in node.attributes.items()}
        inputs = [_value(each) for each in node.inputs]
        if kind in _CONVOLUTIONS:
            attributes |= {key: bool(attributes[key]) for key in ("bias", "norm") if key in attributes}
            return fixed_convolution(self._g, _CONVOLUTIONS[kind](**attributes), inputs, past)
        query, key_value, _, _, _, bias, *positions = inputs
        use: PositionUse = "relative" if attributes.pop("relative", 0) else _ATTENTIONS[kind]
        step = next(step_of(self.config, cache) for cache in self.config.caches if cache.name == name)
        frames = {"past": self.form.left_frames(self.config, step), "time": self.form.frames(self.config, step)}
        return FixedHeads(**attributes, **frames).attend(self._g, query, key_value, past, bias, use, positions)

    def _next(self, cache: Cache) -> ir.Value:
        """Return a cache for the next chunk."""
        g = self._g
        (output,) = (value for value in self._encoder.graph.outputs if value.name == f"r_{cache.name}")
        if cache.time_axis is None:
            blocks = _producer(_origin(output, "Identity", "Transpose")).inputs
            return g.op("Concat", *map(_without_axis, blocks), axis=1)
        new = g.op("Concat", *map(_without_axis, _producer(_origin(output, "Identity")).inputs[2:]), axis=1)
        step = step_of(self.config, cache)
        time, left = self.form.frames(self.config, step), self.form.left_frames(self.config, step)
        if left <= time:
            return new
        return g.op("Concat", g.op("Slice", self._inputs[cache.name], [time], [END], [2]), new, axis=2)


def decoder_graph(bundle: Bundle, sizes: Mapping[str, int], metadata: Mapping[str, str]) -> ir.Model:
    """Return the decoder of a bundle, folded after its named axes are fixed to `sizes`; see `folded`."""
    decoder, config = ir.load(bundle.path / "decoder.onnx"), bundle.manifest.model
    contract = next(graph for graph in config.graphs() if graph.name == "decoder")

    def body(g: GraphBuilder, inputs: dict[str, ir.Value]) -> Joined:
        for node in list(decoder.graph):
            if (mixture := mixture_of(node)) is not None:
                with g.scope(str(node.name)):
                    x, gate, *weights = (_value(each) for each in node.inputs)
                    node.outputs[0].replace_all_uses_with(fixed_mixture(g, mixture, x, gate, weights))
            if _kind(node) == "SharedPrefixes":  # the number of shared prefixes would not be fixed, so none are shared
                batch, nbest, length = sizes["batch"], sizes["nbest"], sizes["length"] + 1
                every = np.arange(batch * nbest * length)
                of_tokens, of_utterances = every.reshape(batch, nbest, length), every.reshape(batch, -1)
                for value, fixed in zip(node.outputs, (every, of_tokens, of_utterances, every), strict=True):
                    value.replace_all_uses_with(g.constant(fixed))
        for value in decoder.graph.inputs:
            value.replace_all_uses_with(inputs[str(value.name)])
        return {str(value.name): value for value in decoder.graph.outputs}, (decoder,)

    def axis(name: str | int) -> int | None:
        return {**sizes, "length_and_eos": sizes["length"] + 1}.get(str(name), config.axis(name))

    return folded(joined_model(contract, "decoder_fixed", axis, dict(metadata), body))


def _kind(node: ir.Node) -> str:
    """Return a node's operator; for a function, its name without the appended number."""
    return plain_name(node.op_type) if node.domain == MOE_DOMAIN else node.op_type


def _is_mask(node: ir.Node) -> bool:
    """Return whether the node converts a mask of valid positions to a bias for attention scores."""
    least = _value(node.inputs[2]).const_value if node.op_type == "Where" else None
    return least is not None and least.dtype == ir.DataType.FLOAT and least.size == 1 and least.numpy().item() < -1e3


def _step(positions: ir.Value) -> int:
    """Return the distance between adjacent positions, in frames."""
    source = _producer(_producer(positions).inputs[1])
    return _number(source.inputs[1]) if source.op_type == "Mul" else 1


def _row(reader: ir.Node, cache: ir.Value) -> int:
    """Return the index of the block whose part of `cache` is read by `reader`."""
    return _number(reader.inputs[list(reader.inputs).index(cache) + 1])


def _origin(value: ir.Value | None, *operators: str) -> ir.Value:
    """Follow a value back through nodes with these operators, in this order; return the last node's first input."""
    for operator in operators:
        node = _producer(value)
        if node.op_type != operator:
            raise UnsupportedError(f"{node.name} is {node.op_type}, expected {operator}: export the bundle again")
        value = node.inputs[0]
    return _value(value)


def _without_axis(value: ir.Value | None) -> ir.Value:
    """Return a layer's new cache entries without their block axis. Layers of fixed shape do not add this axis."""
    node = _value(value).producer()
    return _value(node.inputs[0] if node is not None and node.op_type == "Unsqueeze" else value)


def _producer(value: ir.Value | None) -> ir.Node:
    node = _value(value).producer()
    if node is None:
        raise UnsupportedError(f"{_value(value).name} is not computed by a node: export the bundle again")
    return node


def _value(value: ir.Value | None) -> ir.Value:
    if value is None:
        raise UnsupportedError("a node of the graph lacks an input: export the bundle again")
    return value


def _array(value: ir.Value | None) -> Array:
    tensor = _value(value).const_value
    if tensor is None:
        raise UnsupportedError(f"{_value(value).name} is not a constant: export the bundle again")
    return tensor.numpy()


def _number(value: ir.Value | None) -> int:
    return int(_array(value).item())


def _readers(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]
