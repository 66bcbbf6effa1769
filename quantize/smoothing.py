"""Moves large activation channels into the weights beside them, by powers of two: the network stays equal in float32.

A token has one scale for all its channels: one that is a hundred times as large as the others leaves these two of 127
steps. SmoothQuant (Xiao et al. 2023) divides such a channel where it is made, and multiplies the weights that read it.
With powers of two nothing rounds: all products and sums are the same numbers, scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.quantize.arithmetic import ACTIVATION_LEVELS, NOTHING, Float, int8_columns
from u2moe.quantize.layers import ExpertLayer, calls, expert_layers, inputs_of
from u2moe.quantize.rounding import Activations
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.graph.file import array_of, group_of, save_graph, shape_of, with_external

Exponents = npt.NDArray[np.int64]
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Candidate shares of the differences between channels that move into the weights."""
UNSEEN, LEAST_EXPONENT = 0.5, 3
"""The share where no recordings tell, and the least exponent then: a guess is good enough for true outliers only."""
LEAST_GAIN = 0.02
"""Part of a layer's error that smoothing must take away: less is chance."""
NUM_ROWS = 512
"""Rows of each value on which candidates are judged, besides those with the largest channels."""
LARGEST_EXPONENT = 12
"""Limit of a channel's exponent: nothing becomes subnormal or infinite."""


@dataclass(frozen=True, kw_only=True)
class ChannelSite:
    """Channels between the parameters that make them and the weights that read them.

    Attributes:
        value: the value [..., rows] that the weights read; None inside a function.
        made: parameters [..., columns] that make the channels; `columns`: that of each channel.
        read: weights [rows, out]; `channels`: the channel that each row reads.
        size: estimates the size of each channel where there are no recordings.
    """

    value: ir.Value | None = None
    made: Sequence[ir.Value]
    columns: npt.NDArray[np.int64]
    read: Sequence[ir.Value]
    channels: npt.NDArray[np.int64]
    size: Callable[[], Float]

    @property
    def name(self) -> str:
        """The name of the value; "" without one."""
        return (self.value.name or "") if self.value is not None else ""


def sites_of(model: ir.Model) -> list[ChannelSite]:
    """All sites of a float32 graph.

    These are outputs of normalisations that only products, feed-forward layers and mixtures read; values of attention;
    and hidden units of feed-forward layers and experts behind relu or a gate.
    """
    mixtures = {layer.node: layer for layer in expert_layers(model)}
    sites = [site for node in calls(model, "Normalization", "RmsNormalization", "AddNormalization")
             for site in _normalized(node, mixtures)]  # fmt: skip
    sites += [site for node in calls(model, "Attention", "CachedAttention") for site in _values(node)]
    for node in calls(model, "FeedForward", "GatedFeedForward"):
        gated = plain_name(node.op_type) == "GatedFeedForward"
        if gated or node.attributes["activation"].as_string() == "relu":
            parameters = inputs_of(node)[1 + gated :]
            half = len(parameters) // 2
            sites.append(_hidden(parameters[:half], parameters[half]))
    for layer in mixtures.values():
        if layer.mixture.activation == "relu":
            first = zip(layer.w1, layer.b1, strict=True) if layer.mixture.bias else zip(layer.w1, strict=True)
            sites += [_hidden(made, weight) for made, weight in zip(first, layer.w2, strict=True)]
    return [site for site in sites if all(len(value.uses()) == 1 for value in (*site.made, *site.read))]


def smooth(model: ir.Model, activations: Activations) -> int:
    """Scale the channels of a float32 graph in place, and what its layers read; returns the number of scaled channels.

    Outputs stay the same numbers. Sites of which nothing was recorded are scaled by their weights alone.
    """
    num_scaled = 0
    for site in sites_of(model):
        rows = activations.rows(site.name)
        exponents = _exponents(site, None if rows is None else _sample(rows))
        if exponents.any():
            scale(site, exponents)
            activations.divide(site.name, exponents[site.channels])
            num_scaled += int(np.count_nonzero(exponents))
    return num_scaled


def rewritten_bundle(bundle: Bundle, folder: Path, rewrite: Callable[[ir.Model], None]) -> Bundle:
    """Write a bundle with other weights: `rewrite` changes each graph in place."""
    with BundleWriter(folder) as staging:
        for graph in bundle.manifest.model.graphs():
            model = ir.load(bundle.path / graph.file)
            rewrite(model)
            save_graph(model, staging.path / graph.file)
        for name in bundle.manifest.files:
            if not (staging.path / name).exists() and not name.endswith(".onnx.data"):
                staging.add(name, bundle.path / name)
        return staging.finish(with_external(bundle.manifest, staging.path))


def _sample(rows: Float) -> Float:
    """Some rows, evenly from all, and for each channel the one in which it is largest."""
    evenly = np.linspace(0, len(rows) - 1, min(NUM_ROWS, len(rows))).astype(int)
    chosen: Float = rows[np.concatenate([evenly, np.abs(rows).argmax(axis=0)])]
    return chosen


def _normalized(node: ir.Node, mixtures: Mapping[ir.Node, ExpertLayer]) -> Iterator[ChannelSite]:
    value = node.outputs[-1]
    made = inputs_of(node)[2 if plain_name(node.op_type) == "AddNormalization" else 1 :]
    read = [_weights_of(value, use.node, mixtures) for use in value.uses()]
    if all(read) and not value.is_graph_output():
        weights = [weight for each in read for weight in each]
        yield _in_order(
            made, weights, lambda: np.sum([np.abs(array_of(parameter)) for parameter in made], axis=0), value
        )


def _weights_of(value: ir.Value, reader: ir.Node, mixtures: Mapping[ir.Node, ExpertLayer]) -> Sequence[ir.Value]:
    """The weights with which a node multiplies a value; none if it does anything else with it."""
    if list(reader.inputs).count(value) > 1 or reader.inputs[0] is not value:
        return []
    if reader in mixtures:
        return [mixtures[reader].gate, *mixtures[reader].w1]
    num_weights = {"Linear": 1, "FeedForward": 1, "GatedFeedForward": 2}
    return inputs_of(reader)[1 : 1 + num_weights.get(plain_name(reader.op_type) if reader.domain else "", 0)]


def _values(node: ir.Node) -> Iterator[ChannelSite]:
    """Values of attention, head by head after the keys in what one product makes; groups of heads share them."""
    context, key_value = node.outputs[0], inputs_of(node)[1]
    maker, readers = key_value.producer(), [use.node for use in context.uses()]
    if maker is None or [plain_name(each.op_type) for each in (maker, *readers)] != ["Linear", "Linear"]:
        return
    heads, groups, size = (node.attributes[name].as_int() for name in ("num_heads", "num_kv_heads", "size"))
    channel = np.arange(groups * size).reshape(groups, size)
    columns = (channel + size * (1 + np.arange(groups)[:, np.newaxis])).ravel()
    made = inputs_of(maker)[1:]
    yield ChannelSite(
        value=context,
        made=made,
        columns=columns,
        read=inputs_of(readers[0])[1:2],
        channels=np.repeat(channel, heads // groups, axis=0).ravel(),
        size=lambda: np.abs(array_of(made[0])[:, columns]).max(axis=0),
    )


def _hidden(made: Sequence[ir.Value], weight: ir.Value) -> ChannelSite:
    """Hidden units between a first product, with or without a bias, and the weight of a second."""
    return _in_order(made, [weight], lambda: np.abs(array_of(made[0])).max(axis=0))


def _in_order(
    made: Sequence[ir.Value], read: Sequence[ir.Value], size: Callable[[], Float], value: ir.Value | None = None
) -> ChannelSite:
    order = np.arange(shape_of(read[0])[0])
    return ChannelSite(value=value, made=made, columns=order, read=read, channels=order, size=size)


def _exponents(site: ChannelSite, rows: Float | None) -> Exponents:
    """The power of two by which each channel is divided, the best of those for `STRENGTHS`; zeros if none helps."""
    weights = [array_of(weight) for weight in site.read if group_of(weight) != "routers"]  # these stay in float32
    weight_size = _by_channel(site, np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0))
    if rows is None:
        exponents = _balanced(site.size(), weight_size, UNSEEN)
        return np.where(np.abs(exponents) >= LEAST_EXPONENT, exponents, 0)
    size = _by_channel(site, np.abs(rows).max(axis=0))
    candidates = [np.zeros(len(size), np.int64), *(_balanced(size, weight_size, strength) for strength in STRENGTHS)]
    errors = [_error(rows, weights, exponents[site.channels]) for exponents in candidates]
    best = int(np.argmin(errors))
    return candidates[best] if errors[best] <= (1 - LEAST_GAIN) * errors[0] else candidates[0]


def _by_channel(site: ChannelSite, sizes: Float) -> Float:
    """The largest of the rows' sizes that belong to each channel."""
    result = np.zeros(len(site.columns), np.float32)
    np.maximum.at(result, site.channels, sizes)
    return result


def _balanced(size: Float, weight_size: Float, strength: float) -> Exponents:
    found = (size > NOTHING) & (weight_size > NOTHING)
    logs = np.zeros(len(size))
    logs[found] = strength * np.log2(size[found]) - (1 - strength) * np.log2(weight_size[found])
    middle = np.median(logs[found]) if found.any() else 0.0
    exponents = np.where(found, np.rint(logs - middle), 0)
    return np.clip(exponents, -LARGEST_EXPONENT, LARGEST_EXPONENT).astype(np.int64)


def _error(rows: Float, weights: Sequence[Float], exponents: Exponents) -> float:
    """Relative error, summed over the weights, of their products with these rows in int8."""
    scaled = np.ldexp(rows, -exponents)
    step = np.maximum(np.abs(scaled).max(axis=1, keepdims=True), NOTHING) / ACTIVATION_LEVELS
    rounded = np.rint(scaled / step) * step
    total = 0.0
    for weight in weights:
        integers, scale = int8_columns(np.ldexp(weight, exponents[:, np.newaxis]))
        expected = rows @ weight
        difference = np.linalg.norm(rounded @ (integers * scale) - expected)
        total += float(difference / max(float(np.linalg.norm(expected)), NOTHING))
    return total


def scale(site: ChannelSite, exponents: Exponents) -> None:
    """Divide each channel of a site by a power of two, in place; its float32 graph computes the same numbers."""

    def divided(array: Float) -> Float:
        by_column = np.zeros(array.shape[-1], np.int64)
        by_column[site.columns] = exponents
        return np.ldexp(array, -by_column)

    def multiplied(array: Float) -> Float:
        return np.ldexp(array, exponents[site.channels][:, np.newaxis])

    for values, change in ((site.made, divided), (site.read, multiplied)):
        for value in values:
            _replace(value, change)


def _replace(value: ir.Value, change: Callable[[Float], Float]) -> None:
    """Make an initializer one that is read and changed when the graph is saved."""
    before = ir.Value(name=value.name, const_value=value.const_value)

    def load() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(change(array_of(before)), np.float32), name=value.name)

    value.const_value = ir.LazyTensor(load, ir.DataType.FLOAT, ir.Shape(shape_of(value)), name=value.name)
