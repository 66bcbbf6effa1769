"""Graphs as sessions of which values inside are seen, also in several formats at once, and the tokens of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.layers import layer_of, scope
from u2moe.quantize.recipes import FORMATS
from u2moe.runtime.bundle.contract import MOE_DOMAIN, PACKED
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.bundle.weight_formats import HALF
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.builder import define
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.model.encoder import Encoder, Windows, required_cache_size
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.native import Kernels, choose_kernels
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import DEFAULT_PROVIDER

Array = npt.NDArray[Any]


class ObservedGraph:
    """A graph as a session; it is loaded on its first run.

    Attributes:
        observed: names of the values that can be seen.
        names: those that the next run shows, all of them at first.
        seen: what the last run showed, by name.
    """

    def __init__(
        self,
        model: ir.Model,
        values: Sequence[ir.Value],
        options: onnxruntime.SessionOptions | None = None,
        kernels: Kernels | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> None:
        """Make values of this type outputs; `options` and `kernels` are those of the session."""
        self._model, self._options, self._kernels = model, options, kernels
        self._outputs = [str(value.name) for value in model.graph.outputs]
        self.observed = self.names = list(dict.fromkeys(str(value.name) for value in values))
        self.seen: dict[str, Array] = {}
        for value in values:
            if value.producer() is not None and not value.is_graph_output():
                value.type = ir.TensorType(dtype)
                model.graph.outputs.append(value)

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        options = self._options
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
        if self._kernels is not None:
            self._kernels.register(options)
        # passed as values: a hard link beside the changed graph would make onnx-ir refuse the file in other processes
        weights = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value.const_value.numpy())
            for name, value in self._model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        options.add_external_initializers(list(weights), list(weights.values()))
        content = ir.to_proto(self._model).SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=[DEFAULT_PROVIDER])

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`."""
        names = list(dict.fromkeys([*self._outputs, *(name for name in self.names if name not in feeds)]))
        found = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        self.seen = {name: feeds[name] if name in feeds else found[name] for name in self.names}
        return {name: found[name] for name in self._outputs}


def observed_model(manifest: Manifest, graphs: Mapping[str, ObservedGraph]) -> Model:
    """The model of a bundle whose graphs are these, by the names of the contract."""
    sessions = (cast("Session", graphs.get(name)) for name in ("encoder", "ctc", "decoder"))  # all that it needs is run
    return Model(manifest, *sessions)


Levels = Mapping[str, int]
"""By layer, the number of the version that it is computed in."""
SWITCHES = "switches"
"""Name of the input that says whether each layer has a level, or a later one: bool [layers * versions]."""


class SwitchedGraph(ObservedGraph):
    """Versions of a graph with a switch for each layer in which they differ.

    A layer's level is the number of a version, 0 for the first.

    Attributes:
        bytes: by layer, in order, the bytes of its weights at each level. Layers that the last versions have in common
            have fewer levels.
        groups: by layer, the group of its weights, see `recipes.FORMATS`.
        inputs: by layer, the names of the values that its products read.
        outputs: by layer, the names of the values that it gives; what layers read and give can be seen.
        levels: those of the next run; layers that are not named: 0.
    """

    def __init__(self, *versions: ir.Model) -> None:
        """Two or more that `read_single` reads, which are changed.

        Of three, the second must have all values that layers of the others read.
        """
        self._versions, self._model = versions, versions[1]
        self._switches = ir.val(SWITCHES, dtype=ir.DataType.BOOL, shape=("layers",))
        for version in versions:
            for domain, number in version.graph.opset_imports.items():
                self._model.graph.opset_imports.setdefault(domain, number)
        self._num_added = 0
        self.bytes: dict[str, list[int]] = {}
        self.groups: dict[str, str] = {}
        self.inputs: dict[str, list[str]] = {}
        self.outputs: dict[str, list[str]] = {}
        self._values = {value.name: value for node in self._model.graph for value in node.outputs}
        self._values |= {value.name: value for value in self._model.graph.inputs}
        found = [
            {node.outputs[0].name: node for node in version.graph if node.domain == MOE_DOMAIN} for version in versions
        ]
        calls = {name: [own[name] for own in found] for name in found[0] if all(name in own for own in found[1:])}
        for options in calls.values():
            while len(options) > 1 and _weight_names(options[-1]) == _weight_names(options[-2]):
                options.pop()
            if len(options) > 1:
                self._describe(options)
                self._switch(options)
        self.levels: Levels = {}
        names = dict.fromkeys(name for own in (*self.inputs.values(), *self.outputs.values()) for name in own)
        super().__init__(self._model, [self._values[name] for name in names])
        if self.bytes:
            self._model.graph.inputs.append(self._switches)

    def _describe(self, options: Sequence[ir.Node]) -> None:
        layer, sizes = layer_of(options[0]), [_weight_bytes(node) for node in options]
        known = self.bytes.setdefault(layer, [])
        num_levels = max(len(known), len(sizes))
        padded = [[*own, *own[-1:] * num_levels][:num_levels] if own else [0] * num_levels for own in (known, sizes)]
        self.bytes[layer] = [sum(pair) for pair in zip(*padded, strict=True)]
        weights = [value for value in options[0].inputs if value is not None and value.const_value is not None]
        self.groups.setdefault(layer, next(filter(FORMATS.__contains__, map(group_of, weights)), "other"))
        read = self.inputs.setdefault(layer, [])
        read += [str(x.name) for x in options[0].inputs[:1] if x is not None and x.const_value is None]
        self.outputs.setdefault(layer, []).extend(str(value.name) for value in options[0].outputs)

    def _switch(self, options: Sequence[ir.Node]) -> None:
        """Put a choice between the calls of all levels in place of the one in the graph."""
        graph, node = self._model.graph, options[1]
        names = [str(value.name) for value in node.outputs]
        # The last comes first: within two Ifs, onnxruntime packs no weights, and MatMulNBits then rounds otherwise.
        first, conditions = list(self.bytes).index(layer_of(options[0])) * len(self._versions), []
        for level in range(len(options) - 1, 0, -1):
            number = self._before(node, "Constant", [], value=ir.tensor(first + level))
            conditions.append(self._before(node, "Gather", [self._switches, number], axis=0))
        branch = ir.Node("", "If", conditions[:1], num_outputs=len(names), name=f"{node.name}/If")
        graph.insert_before(node, branch)
        ir.convenience.replace_all_uses_with(list(node.outputs), branch.outputs)
        graph.remove(node)
        inside = [option if option is node else self._copied(option, index) for index, option in enumerate(options)]
        self._fill(branch, inside[::-1], conditions)
        for value, outer in zip(branch.outputs, names, strict=True):
            value.name = outer
            self._values[outer] = value

    def _before(self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """The output of a new node in front of another."""
        self._num_added += 1
        added = ir.node(op_type, inputs, attributes, name=f"{node.name}/{op_type}_{self._num_added}")
        added.outputs[0].name = added.name
        self._model.graph.insert_before(node, added)
        return added.outputs[0]

    def _fill(self, branch: ir.Node, options: Sequence[ir.Node], conditions: Sequence[ir.Value]) -> None:
        """Make an If compute the first option whose condition holds, or the last."""
        other = options[1]
        if len(options) > 2:
            num_outputs = len(branch.outputs)
            other = ir.Node("", "If", conditions[1:2], num_outputs=num_outputs, name=f"{branch.name}/If")
            self._fill(other, options[1:], conditions[1:])
        for key, inner in (("then_branch", options[0]), ("else_branch", other)):
            for index, value in enumerate(inner.outputs):
                value.name = f"{branch.name}/{key}:{index}"
            content = ir.Graph([], inner.outputs, nodes=[inner], name=f"{branch.name}/{key}")
            branch.attributes[key] = ir.AttrGraph(key, content)

    def _copied(self, call: ir.Node, level: int) -> ir.Node:
        """A call of another version in this graph, with its function and its weights."""
        function = define(self._model.functions, self._versions[level].functions[call.op_identifier()])
        inputs = [None if value is None else self._value(value, level) for value in call.inputs]
        attributes = list(call.attributes.values())
        name = f"{call.name}/{level}"
        return ir.Node(call.domain, function.name, inputs, attributes, num_outputs=len(call.outputs), name=name)

    def _value(self, value: ir.Value, level: int) -> ir.Value:
        """The value of that name in this graph; of weights, whose names may mean others here, a copy."""
        if value.const_value is None:
            return self._values[value.name]
        name = f"{value.name}/{level}"
        if name not in self._model.graph.initializers:
            copy = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            self._model.graph.register_initializer(copy)
        return self._model.graph.initializers[name]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`, at `levels`."""
        levels = np.array([self.levels.get(layer, 0) for layer in self.bytes])
        switches = (levels[:, np.newaxis] >= np.arange(len(self._versions))).ravel()
        return super().run({**feeds, SWITCHES: switches} if self.bytes else feeds)


def _weight_bytes(node: ir.Node) -> int:
    weights = [value.const_value for value in node.inputs if value is not None]
    return sum(weight.nbytes for weight in weights if weight is not None)


def _weight_names(node: ir.Node) -> list[str | None]:
    return [value.name for value in node.inputs if value is not None and value.const_value is not None]


@dataclass(frozen=True, kw_only=True)
class RoutedLayer:
    """A mixture of experts of an encoder.

    Attributes:
        name: the layer's scope.
        tokens: name of its input.
        gate: weight of the router, float32 [dim, experts].
        gate_name: its name in the graph.
        top_k: experts per token.
        expert_bytes: bytes of one expert's weights as stored.
    """

    name: str
    tokens: str
    gate: Array
    gate_name: str
    top_k: int
    expert_bytes: int

    def choices(self, tokens: Array) -> Array:
        """Experts [n, k] of tokens [..., dim], the most likely first."""
        logits = tokens.astype(np.float32).reshape(-1, len(self.gate)) @ self.gate
        return np.argsort(-logits, axis=1, kind="stable")[:, : self.top_k]

    def shares(self, tokens: Array) -> Array:
        """Routing weights [n, experts] of tokens [n, dim]; 0 for experts that are not chosen."""
        logits, chosen = tokens @ self.gate, self.choices(tokens)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = np.zeros_like(odds)
        np.put_along_axis(shares, chosen, np.take_along_axis(odds, chosen, axis=1), axis=1)
        weights: Array = shares / shares.sum(axis=1, keepdims=True)
        return weights

    def counts(self, tokens: Array) -> npt.NDArray[np.int64]:
        """Number of tokens [..., dim] routed to each expert: [experts]."""
        return np.bincount(self.choices(tokens).ravel(), minlength=self.gate.shape[1]).astype(np.int64)


class ExpertInputs:
    """The encoder of a bundle, with the inputs of its mixtures of experts as extra outputs; float32 or quantized.

    Attributes:
        layers: the mixtures by scope, in order; empty for a dense model.

    Raises:
        BundleError: the router of a mixture of experts is not a weight.
        KernelsError: weights are packed for native kernels, which cannot run here.
    """

    def __init__(self, bundle: Bundle, options: onnxruntime.SessionOptions | None = None) -> None:
        """Read the graph; it is loaded on its first run, with `options` if given, and with native kernels if packed."""
        self.config = bundle.manifest.model
        model = ir.load(bundle.path / self.config.graphs()[0].file)
        self.layers = {layer.name: layer for node in model.graph if (layer := routed_layer(node)) is not None}
        inputs = [x for node in model.graph if mixture_of(node) is not None and (x := node.inputs[0]) is not None]
        quantization = bundle.manifest.quantization
        kernels = choose_kernels("native", [DEFAULT_PROVIDER]) if PACKED in quantization else None
        dtype = ir.DataType.FLOAT16 if quantization.get("whole") == HALF.name else ir.DataType.FLOAT
        self._graph = ObservedGraph(model, inputs, options, kernels, dtype)

    def chunks(
        self, frames: Array, chunk_size: int | None = None, num_left_chunks: int = -1
    ) -> Iterator[dict[str, Array]]:
        """Tokens [time, dim] that each layer reads, by its name, for every chunk of features; of full context one."""
        windows = Windows(self.config, chunk_size)
        windows.accept(frames)
        windows.finish()
        encoder = Encoder(cast("Session", self._graph), self.config)  # it needs only `run`
        caches, required = encoder.start(), required_cache_size(chunk_size or 1, num_left_chunks)
        while (window := windows.take()) is not None:
            _, caches = encoder.step(window[np.newaxis], caches, required_cache_size=required)
            seen = self._graph.seen
            yield {name: seen[layer.tokens].astype(np.float32)[0] for name, layer in self.layers.items()}

    def experts(self, frames: Array) -> dict[str, Array]:
        """Sorted experts [time, k] of each layer's tokens, with full context; none of too few frames for a chunk."""
        tokens = next(self.chunks(frames), {}) if self.layers else {}
        return {name: np.sort(self.layers[name].choices(x), axis=1) for name, x in tokens.items()}


def routed_layer(node: ir.Node) -> RoutedLayer | None:
    """The mixture of experts that a node calls, or None."""
    mixture = mixture_of(node)
    if mixture is None:
        return None
    x, gate, *weights = node.inputs
    if x is None or gate is None or gate.const_value is None:
        raise BundleError(f"{node.name} has no router among its weights")
    makers = [weight.producer() if weight is not None else None for weight in weights]
    stored = [maker.inputs[0] if maker else weight for maker, weight in zip(makers, weights, strict=True)]
    num_bytes = sum(weight.const_value.nbytes for weight in stored if weight is not None and weight.const_value)
    return RoutedLayer(
        name=scope(node),
        tokens=str(x.name),
        gate=gate.const_value.numpy().astype(np.float32),
        gate_name=str(gate.name),
        top_k=mixture.top_k,
        expert_bytes=num_bytes // mixture.num_experts,
    )
