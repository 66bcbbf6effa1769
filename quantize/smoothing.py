"""Moves the magnitude of large activation channels into neighbouring weights. Float32 results do not change.

A token has one scale for all its channels. If one channel is a hundred times as large as the others, only one or two
of the 127 steps are left for the others. SmoothQuant (Xiao et al. 2023) divides such a channel where it is computed and
multiplies the weights that read it. The factors are powers of two, so that nothing is rounded. All products and sums
are then either unchanged or multiplied by such a factor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.quantize.arithmetic import ACTIVATION_LEVELS, NOTHING, Float, int8_columns, kernel_matrix
from u2moe.quantize.layers import ExpertLayer, calls, expert_layers, inputs_of
from u2moe.quantize.rounding import PIECE_ROWS, Activations, Rows
from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.graph.builder import lazy_tensor
from u2moe.runtime.graph.file import array_of, group_of, save_graph, shape_of, with_external
from u2moe.runtime.graph.layers import halves

Exponents = npt.NDArray[np.int64]
NORMALIZATIONS = ("Normalization", "RmsNormalization", "AddNormalization")
STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # candidates: shares of the differences in channel size that move into the weights
UNSEEN, LEAST_EXPONENT = 0.5, 3  # strength and smallest exponent without recordings: only large outliers are certain
LEAST_GAIN = 0.02  # share of a layer's error that smoothing must remove; less may be due to chance
LEAST_GAIN_OF_OUTPUT = 0.25  # the same for the encoder output: higher, because other programs may read these channels
NUM_ROWS = 512  # rows of each value for judging candidates, besides those in which a channel is largest
NUM_WINDOWS = 96  # number of windows of features for judging candidates in the front end
LARGEST_EXPONENT = 32  # limit of a channel's exponent, so that nothing becomes subnormal or infinite


@dataclass(frozen=True, kw_only=True)
class ChannelSite:
    """Channels between the parameters that produce them and the weights that read them.

    The products' int8 error must fall by the share `least_gain`.
    """

    value: ir.Value | None = None  # value [..., rows] that the weights read; None inside a function
    made: Sequence[ir.Value]  # parameters [..., columns], or kernels [columns, in, time, frequency]
    columns: npt.NDArray[np.int64]  # index of the column in `made` that produces each channel
    # weights [rows, out], or kernels [out, in, time, frequency], whose rows are in the order (time, frequency, in)
    read: Sequence[ir.Value]
    channels: npt.NDArray[np.int64]  # index of the channel that each row of `read` reads
    # in the front end, returns some inputs [n, rows] of the weights; otherwise, inputs are recorded as those of `value`
    rows: Callable[[Activations], Float | None] | None = None
    least_gain: float = LEAST_GAIN

    @property
    def name(self) -> str:
        """The name of the value; "" if it has none or there is no value."""
        return (self.value.name or "") if self.value is not None else ""

    def sizes(self) -> Float:
        """Estimate the magnitude of each channel without recordings."""
        first, *others = map(array_of, self.made)
        if first.ndim > 2:  # a kernel and a bias
            return np.asarray(np.linalg.norm(kernel_matrix(first), axis=0) + np.abs(others[0]))
        if first.ndim > 1:  # a weight and perhaps a bias
            return np.asarray(np.abs(first[:, self.columns]).max(axis=0))
        return np.asarray(np.sum([np.abs(first), *map(np.abs, others)], axis=0))


def sites_of(*models: ir.Model) -> list[ChannelSite]:
    """Return all sites of float32 graphs. If all graphs of a network are given, its encoder output is also a site.

    Sites are outputs of normalisations that are read only by products, feed-forward layers and mixtures; channels of
    the front end; values of attention; hidden units of feed-forward layers after relu or a gate, and of experts after
    relu.
    """
    sites = [site for model in models for site in _sites_of(model)] + list(_encoder_output(models))
    return [site for site in sites if all(len(value.uses()) == 1 for value in (*site.made, *site.read))]


def _sites_of(model: ir.Model) -> Iterator[ChannelSite]:
    mixtures = {layer.node: layer for layer in expert_layers(model)}
    for node in calls(model, *NORMALIZATIONS):
        value = node.outputs[-1]
        read = [_weights_of(value, use.node, mixtures) for use in value.uses()]
        if all(read) and not value.is_graph_output():
            yield _of_norm(node, read, value)
    for node in calls(model, "Subsampling", "SubsamplingConvolutions"):
        yield from _front_end(node)
    for node in calls(model, "Attention", "CachedAttention"):
        yield from _values(node)
    for node in calls(model, "FeedForward", "GatedFeedForward"):
        gated = plain_name(node.op_type) == "GatedFeedForward"
        if gated or node.attributes["activation"].as_string() == "relu":
            yield _hidden(inputs_of(node)[1 + gated :])
    for layer in mixtures.values():
        if layer.mixture.activation == "relu":
            yield from map(_hidden, layer.experts)


def smooth(
    models: Sequence[ir.Model], activations: Activations, progress: Callable[[float], None] = lambda _: None
) -> int:
    """Scale channels of float32 graphs and of the recorded inputs in place; return the number of scaled channels.

    Log-probabilities and scores do not change. Channels of the encoder output are scaled if all graphs of a network are
    given. Without recorded rows, weights alone determine a site's scales. `progress` is called with the finished share
    of the work.
    """
    num_scaled, sites = 0, sites_of(*models)
    for number, site in enumerate(sites):
        progress(number / len(sites))
        rows = _sample(activations.rows(site.name)) if site.rows is None else site.rows(activations)
        exponents = _exponents(site, rows)
        if exponents.any():
            scale(site, exponents)
            if site.name:
                activations.divide(site.name, exponents[site.channels])
            num_scaled += int(np.count_nonzero(exponents))
    return num_scaled


def rewritten_bundle(bundle: Bundle, folder: Path, rewrite: Callable[[Sequence[ir.Model]], object]) -> Bundle:
    """Write a copy of a bundle with changed weights; `rewrite` changes all graphs in place."""
    graphs = bundle.manifest.model.graphs()
    models = [ir.load(bundle.path / graph.file) for graph in graphs]
    rewrite(models)
    with BundleWriter(folder) as staging:
        for graph, model in zip(graphs, models, strict=True):
            save_graph(model, staging.path / graph.file)
        add_others(staging, bundle)
        return staging.finish(with_external(bundle.manifest, staging.path))


def add_others(staging: BundleWriter, bundle: Bundle) -> None:
    """Stage the files of a bundle that are neither graphs of the network nor their weights."""
    graphs = tuple(graph.file for graph in bundle.manifest.model.graphs())
    for name in bundle.manifest.files:
        if not name.startswith(graphs):
            staging.add(name, bundle.path / name)


def _sample(rows: Rows | None) -> Float | None:
    """Return some rows, evenly spaced, and for each channel the row in which it is largest."""
    if rows is None:
        return None
    evenly = np.linspace(0, len(rows) - 1, min(NUM_ROWS, len(rows))).astype(int)
    sizes, largest = [], []
    for begin in range(0, len(rows), PIECE_ROWS):
        magnitudes = np.abs(rows[begin : begin + PIECE_ROWS])
        sizes.append(magnitudes.max(axis=0))
        largest.append(begin + magnitudes.argmax(axis=0))
    most = np.argmax(sizes, axis=0)[np.newaxis]
    return rows[np.concatenate([evenly, np.take_along_axis(np.array(largest), most, axis=0)[0]])]


def _of_norm(node: ir.Node, read: Iterable[Sequence[ir.Value]], value: ir.Value) -> ChannelSite:
    """Return the site of a normalisation's output: `value`, or another graph's input; `read`: weights by reader."""
    made = inputs_of(node)[2 if plain_name(node.op_type) == "AddNormalization" else 1 :]
    return _in_order(made, [*chain(*read)], value)


def _encoder_output(models: Sequence[ir.Model]) -> Iterator[ChannelSite]:
    """Yield the encoder output's site if that output comes from a normalisation and is only multiplied by weights."""
    graphs = {model.graph.name: model.graph for model in models}
    if not {"encoder", "ctc"} <= graphs.keys():
        return
    output, (value,) = graphs["encoder"].outputs[0], graphs["ctc"].inputs
    copies = []
    while (maker := output.producer()) is not None and maker.op_type == "Identity" and maker.inputs[0] is not None:
        copies.append(maker)
        output = maker.inputs[0]
    values = [each for graph in graphs.values() for each in graph.inputs if each.name == value.name]
    readers = [use.node for each in values for use in each.uses() if use.node.op_type != "Shape"]
    read = [_weights_of(node.inputs[0], node, {}) if node.inputs[0] is not None else [] for node in readers]
    is_normalized = maker is not None and maker.domain == MOE_DOMAIN and plain_name(maker.op_type) in NORMALIZATIONS
    if maker is not None and is_normalized and all(read) and all(use.node in copies for use in output.uses()):
        yield replace(_of_norm(maker, read, value), least_gain=LEAST_GAIN_OF_OUTPUT)


def _front_end(node: ir.Node) -> Iterator[ChannelSite]:
    """Yield the site of the channels after each convolution. A positive scale passes through Relu unchanged."""
    features, *parameters = inputs_of(node)
    count = len(node.attributes["kernels"].as_ints())
    for number in range(1, count + 1):
        made, read, value = parameters[2 * number - 2 : 2 * number], parameters[2 * number : 2 * number + 1], None
        if not read:  # the projection is a separate layer
            value = node.outputs[0]
            weights = [_weights_of(value, use.node, {}) for use in value.uses()]
            read = [*chain(*weights)] if all(weights) else []
        if read:
            order, rows = np.arange(shape_of(made[0])[0]), len(kernel_matrix(array_of(read[0])))
            channels = (np.tile if number < count else np.repeat)(order, rows // len(order))
            windows = None if value is not None else partial(_windows, node, str(features.name), number)
            yield ChannelSite(value=value, made=made, columns=order, read=read, channels=channels, rows=windows)


def _windows(node: ir.Node, features: str, number: int, activations: Activations) -> Float | None:
    """Compute the values after `number` convolutions of a front end, for evenly spaced windows of the features."""
    frames, parameters = activations.rows(features), inputs_of(node)[1:]
    if frames is None:
        return None
    kernels, strides = (list(node.attributes[name].as_ints()) for name in ("kernels", "strides"))
    length = 1
    for kernel, stride in zip(kernels[number::-1], strides[number::-1], strict=True):
        length = (length - 1) * stride + kernel
    starts = np.linspace(0, max(len(frames) - length, 0), NUM_WINDOWS).astype(int)
    x = frames[np.minimum(starts[:, np.newaxis] + np.arange(length), len(frames) - 1)][..., np.newaxis]
    for index, (kernel, stride) in enumerate(zip(kernels[:number], strides[:number], strict=True)):
        weight, bias = (array_of(value) for value in parameters[2 * index : 2 * index + 2])
        x = np.maximum(_patches(x, kernel, stride) @ kernel_matrix(weight) + bias, 0)
    if number < len(kernels):
        return _patches(x, kernels[number], strides[number]).reshape(-1, kernels[number] ** 2 * x.shape[-1])
    return x.swapaxes(2, 3).reshape(-1, x.shape[-1] * x.shape[-2])


def _patches(x: Float, kernel: int, stride: int) -> Float:
    """Return the windows of x [n, time, frequency, in] as rows [n, time', frequency', time * frequency * in]."""
    views = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))[:, ::stride, ::stride]
    return views.transpose(0, 1, 2, 4, 5, 3).reshape(*views.shape[:3], -1)


def _weights_of(value: ir.Value, reader: ir.Node, mixtures: Mapping[ir.Node, ExpertLayer]) -> Sequence[ir.Value]:
    """Return the weights by which a node multiplies a value; none if it does anything else with the value."""
    if list(reader.inputs).count(value) > 1 or reader.inputs[0] is not value:
        return []
    if reader in mixtures:
        return [mixtures[reader].gate, *(expert[0] for expert in mixtures[reader].experts)]
    num_weights = {"Linear": 1, "FeedForward": 1, "GatedFeedForward": 2}
    return inputs_of(reader)[1 : 1 + num_weights.get(plain_name(reader.op_type) if reader.domain else "", 0)]


def _values(node: ir.Node) -> Iterator[ChannelSite]:
    """Yield the site of attention's values. One product computes keys and values; the heads of a group share them."""
    context, key_value = node.outputs[0], inputs_of(node)[1]
    maker, readers = key_value.producer(), [use.node for use in context.uses()]
    if maker is None or [plain_name(each.op_type) for each in (maker, *readers)] != ["Linear", "Linear"]:
        return
    heads, groups, size = (node.attributes[name].as_int() for name in ("num_heads", "num_kv_heads", "size"))
    channel = np.arange(groups * size).reshape(groups, size)
    columns = (channel + size * (1 + np.arange(groups)[:, np.newaxis])).ravel()
    channels = np.repeat(channel, heads // groups, axis=0).ravel()
    made, read = inputs_of(maker)[1:], inputs_of(readers[0])[1:2]
    yield ChannelSite(value=context, made=made, columns=columns, read=read, channels=channels)


def _hidden(parameters: Sequence[ir.Value]) -> ChannelSite:
    """Return the site of the hidden units between two products, given the weights and biases of both."""
    made, (weight, *_) = halves(list(parameters))
    return _in_order(made, [weight])


def _in_order(made: Sequence[ir.Value], read: Sequence[ir.Value], value: ir.Value | None = None) -> ChannelSite:
    order = np.arange(shape_of(read[0])[0])
    return ChannelSite(value=value, made=made, columns=order, read=read, channels=order)


def _exponents(site: ChannelSite, rows: Float | None) -> Exponents:
    """Return exponents of channel divisors: those that reduce the error most, or zeros if none reduce it enough."""
    # Without `rows`, errors cannot be measured. The strength is then `UNSEEN`, and small exponents become zero.

    def by_channel(sizes: Float) -> Float:  # the largest of `sizes` among the rows that read each channel
        result = np.zeros(len(site.columns), np.float32)
        np.maximum.at(result, site.channels, sizes)
        return result

    # routers stay in float32
    weights = [kernel_matrix(array_of(weight)) for weight in site.read if group_of(weight) != "routers"]
    weight_size = by_channel(np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0))
    if rows is None:
        exponents = _balanced(site.sizes(), weight_size, UNSEEN)
        return np.where(np.abs(exponents) >= LEAST_EXPONENT, exponents, 0)
    size = by_channel(np.abs(rows).max(axis=0))
    candidates = [np.zeros(len(size), np.int64), *(_balanced(size, weight_size, strength) for strength in STRENGTHS)]
    errors = [_error(rows, weights, exponents[site.channels]) for exponents in candidates]
    best = int(np.argmin(errors))
    return candidates[best] if errors[best] <= (1 - site.least_gain) * errors[0] else candidates[0]


def _balanced(size: Float, weight_size: Float, strength: float) -> Exponents:
    found = (size > NOTHING) & (weight_size > NOTHING)
    logs = np.zeros(len(size))
    logs[found] = strength * np.log2(size[found]) - (1 - strength) * np.log2(weight_size[found])
    middle = np.median(logs[found]) if found.any() else 0.0
    exponents = np.where(found, np.rint(logs - middle), 0)
    return np.clip(exponents, -LARGEST_EXPONENT, LARGEST_EXPONENT).astype(np.int64)


def _error(rows: Float, weights: Sequence[Float], exponents: Exponents) -> float:
    """Return the sum of the relative errors that int8 causes in the products of `rows` and each of `weights`."""
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
    """Divide each channel of a site by a power of two, and multiply the weights that read it, both in place.

    The initializers become lazy: they are read and scaled when the graph is saved.
    """

    def divided(made: ir.Value) -> Float:
        array: Float = array_of(made)
        by_column = np.zeros(array.shape[0 if array.ndim > 2 else -1], np.int64)
        by_column[site.columns] = exponents
        return np.ldexp(array, -(by_column[:, np.newaxis, np.newaxis, np.newaxis] if array.ndim > 2 else by_column))

    def multiplied(read: ir.Value) -> Float:
        array: Float = array_of(read)
        if array.ndim > 2:
            return np.ldexp(array, exponents[:, np.newaxis, np.newaxis])
        return np.ldexp(array, exponents[site.channels][:, np.newaxis])

    for values, change in ((site.made, divided), (site.read, multiplied)):
        for value in values:
            before = ir.Value(name=value.name, const_value=value.const_value)
            name, shape = str(value.name), shape_of(value)
            value.const_value = lazy_tensor(name, ir.DataType.FLOAT, shape, partial(change, before))
