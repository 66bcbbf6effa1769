"""Graphs whose layers can switch between formats, and encoders that also return the inputs of their experts."""

import contextlib
import ctypes
import mmap
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from types import MappingProxyType
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from u2moe.quantize.arithmetic import Array
from u2moe.quantize.layers import layer_of, scope, stored_value
from u2moe.quantize.recipes import FORMATS
from u2moe.runtime.bundle.contract import MOE_DOMAIN, PACKED
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.errors import BundleError
from u2moe.runtime.graph.dispatch import mixture_of
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.native import Kernels, choose_kernels
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings

Levels = Mapping[str, int]  # for each layer, by name, the number of the version that computes it
Values = Mapping[str, Array]


def trim_memory() -> None:
    """Return freed memory to the system; otherwise glibc keeps it for the thread that allocated it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class LeanSettings(SessionSettings):
    """Settings of sessions that free their memory after each run, instead of holding on to the peak amount."""

    def session_options(self, kernels: Kernels | None = None) -> onnxruntime.SessionOptions:
        """Give freed memory back to the system, then return the usual options without a memory arena."""
        trim_memory()
        options = super().session_options(kernels)
        options.enable_cpu_mem_arena = False
        return options


def observed_model(manifest: Manifest, graphs: Mapping[str, object]) -> Model:
    """Return a model of `graphs`, which maps names in the contract to graphs. The model only calls `run` on them."""
    return Model(manifest, *(cast("Session", graphs.get(name)) for name in ("encoder", "ctc", "decoder")))


class Part:
    """A part of a graph that begins with `layer` ("" for none), in a version for each level.

    `later` contains the names of the values that later parts read or that the whole graph returns. A version is loaded
    on its first run, when the types of its inputs are known.
    """

    def __init__(
        self, layer: str, versions: Sequence[ir.Model], later: frozenset[str], kernels: Kernels | None
    ) -> None:
        self.layer, self.later, self.num_levels = layer, later, len(versions)
        self._versions, self._kernels, self._lock = versions, kernels, Lock()
        self._sessions: dict[int, onnxruntime.InferenceSession] = {}

    def run(self, values: Values, level: int, wanted: frozenset[str] | None = None) -> dict[str, Array]:
        """Run the part on the `values` computed before it. Return the `wanted` outputs; None: all outputs."""
        level = min(level, self.num_levels - 1)
        graph = self._versions[level].graph
        feeds = {name: values[name] for name in _names(graph.inputs)}
        with self._lock:
            if level not in self._sessions:
                self._sessions[level] = self._load(self._versions[level], feeds)
            session = self._sessions[level]
        names = [name for name in _names(graph.outputs) if wanted is None or name in wanted]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def _load(self, model: ir.Model, feeds: Values) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.enable_cpu_mem_arena = False  # the arena never returns memory
        if self._kernels is not None:
            self._kernels.register(options)
        for value in model.graph.inputs:
            value.type = ir.TensorType(ir.DataType.from_numpy(feeds[str(value.name)].dtype))
        # weights are passed as values, not in a file next to the changed graph: that file would be a hard link, and
        # onnx-ir in other processes would then refuse the original, because it has several names
        weights = {
            name: (value.const_value, onnxruntime.OrtValue.ortvalue_from_numpy(value.const_value.numpy()))
            for name, value in model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        options.add_external_initializers(list(weights), [value for _, value in weights.values()])
        content = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=[DEFAULT_PROVIDER])
        for tensor, _ in weights.values():  # most weights were copied; pages of the others are read again on use
            if tensor.raw is not None and hasattr(mmap, "MADV_DONTNEED"):
                tensor.raw.madvise(mmap.MADV_DONTNEED)
        return session

    def after(self, values: Values, found: Values) -> Values:
        """Return what later parts need of `values` (known before the part) and `found` (the part's outputs)."""
        return {name: value for name, value in {**values, **found}.items() if name in self.later}

    def keep(self, level: int | None = None) -> None:
        """Free the memory of all levels except `level`, or of all levels if it is None. A run loads a level again."""
        kept = None if level is None else min(level, self.num_levels - 1)
        self._sessions = {level: session for level, session in self._sessions.items() if level == kept}


class SwitchedGraph:
    """Versions of a graph, cut into `parts` at the layers in which the versions differ, in the order in which they run.

    A part can run in any version. A layer's level is the index of a version, 0 for the first. Versions come from
    `read_single`; their values of the same name differ only by rounding. A single version is cut at every layer, so
    that loading never needs memory for two copies of the graph. Without `kernels`, only onnxruntime runs the parts.
    """

    def __init__(self, *versions: ir.Model, observed: Collection[str] = (), kernels: Kernels | None = None) -> None:
        self._observed, self.seen = frozenset(observed), dict[str, Array]()  # the observed values of the last run
        # by layer: the bytes of its weights at each level (equal last versions share one), and the weights' group
        self.bytes, self.groups = dict[str, list[int]](), dict[str, str]()
        # by layer: the names of the values that its products read, and of those that it returns
        self.inputs, self.outputs = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        switched = set[str]()
        found = [
            {str(node.outputs[0].name): node for node in each.graph if node.domain == MOE_DOMAIN} for each in versions
        ]
        for name in found[0]:
            options = [own[name] for own in found if name in own]
            if len(options) < len(versions):
                continue
            while len(options) > 1 and _weight_names(options[-1]) == _weight_names(options[-2]):
                options.pop()
            if len(options) > 1 or (len(versions) == 1 and _num_bytes(options[0].inputs)):
                self._describe(options)
                switched.add(name)
        self.parts = self._cut(versions, switched, kernels)

    def _describe(self, options: Sequence[ir.Node]) -> None:
        layer, sizes = layer_of(options[0]), [_num_bytes(node.inputs) for node in options]
        known = self.bytes.setdefault(layer, [])
        num_levels = max(len(known), len(sizes))
        padded = [[*own, *own[-1:] * num_levels][:num_levels] if own else [0] * num_levels for own in (known, sizes)]
        self.bytes[layer] = [sum(pair) for pair in zip(*padded, strict=True)]
        weights = [value for value in options[0].inputs if value is not None and value.const_value is not None]
        self.groups.setdefault(layer, next(filter(FORMATS.__contains__, map(group_of, weights)), "other"))
        self.inputs[layer] += _names(x for x in options[0].inputs[:1] if x is not None and x.const_value is None)
        self.outputs[layer] += _names(options[0].outputs)

    def _cut(self, versions: Sequence[ir.Model], switched: set[str], kernels: Kernels | None) -> list[Part]:
        """Cut the graph into parts, and return them in the order in which they run.

        A layer begins a part. Any other node joins the first part in which all its inputs are available. The output of
        the left decoder is thus reduced to scores before the right decoder runs.
        """
        graph = versions[0].graph
        slices: list[tuple[str, list[str]]] = [("", [])]
        places: dict[str, int] = {}
        for node in graph:
            layer, made = layer_of(node), _names(node.outputs)
            place = max((places.get(name, 0) for name in _names(node.inputs)), default=0)
            if made[0] in switched:
                if layer != slices[-1][0]:
                    slices.append((layer, []))
                place = len(slices) - 1
            slices[place][1].extend(made)
            places |= dict.fromkeys(made, place)
        known = set(_names(graph.inputs))
        before = [known := known | set(made) for _, made in [("", []), *slices[:-1]]]
        measured = (*self.inputs.values(), *self.outputs.values()) if len(versions) > 1 else ()
        shown = self._observed.union(*measured)
        later, parts = set(_names(graph.outputs)), []
        for (layer, made), outside in zip(reversed(slices), reversed(before), strict=True):
            if outputs := [name for name in made if name in later or name in shown]:
                chosen = [_extracted(each, outputs, outside) for each in versions[: len(self.bytes.get(layer, [0]))]]
                parts.append(Part(layer, chosen, frozenset(later), kernels))
                later = later.union(*(_names(each.graph.inputs) for each in chosen))
        return parts[::-1]

    def run(self, values: Values, levels: Levels = MappingProxyType({}), begin: int = 0) -> Values:
        """Run the graph from part `begin` on the values before it. Layers that are not in `levels` run at level 0."""
        seen = {name: values[name] for name in self._observed & values.keys()}
        for part in self.parts[begin:]:
            found = part.run(values, levels.get(part.layer, 0), part.later | self._observed)
            seen |= {name: found[name] for name in self._observed & found.keys()}
            values = part.after(values, found)
        self.seen = seen
        return values

    def keep(self, levels: Levels | None = None) -> None:
        """Free all versions of each layer except the one in `levels` (by default 0). None: free all versions."""
        for part in self.parts:
            part.keep(None if levels is None else levels.get(part.layer, 0))


class SwitchedSession:
    """Runs a switched graph at given levels for one recording, and keeps the feeds of each run.

    `known` contains, for each run, the expected feeds and the values before part `begin`. Such a run computes only the
    parts from `begin` on; a run with other feeds computes the whole graph.
    """

    def __init__(
        self, graph: SwitchedGraph, levels: Levels, begin: int = 0, known: Sequence[tuple[Values, Values]] = ()
    ) -> None:
        self._graph, self._levels, self._begin, self._known = graph, levels, begin, known
        self.feeds: list[Values] = []

    def run(self, feeds: Values) -> Values:
        """Run as `Session.run` does."""
        same, before = self._known[len(self.feeds)] if len(self.feeds) < len(self._known) else ({}, {})
        self.feeds.append(feeds)
        if same and all(np.array_equal(value, same[name]) for name, value in feeds.items()):
            return self._graph.run(before, self._levels, self._begin)
        return self._graph.run(feeds, self._levels)


def _names(values: Iterable[ir.Value | None]) -> list[str]:
    return [str(value.name) for value in values if value is not None]


def _extracted(model: ir.Model, outputs: Sequence[str], outside: set[str]) -> ir.Model:
    """Extract the part of a graph, with its weights, that computes `outputs` from the values in `outside`."""
    known = {*_names(model.graph.inputs), *(name for node in model.graph for name in _names(node.outputs))}
    graph = ir.convenience.extract(model.graph, sorted(outside & known), outputs)
    read = [value for value in graph.inputs if value.uses()]
    graph.inputs.clear()
    graph.inputs.extend(read)
    part = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    RemoveUnusedFunctionsPass()(part)  # type: ignore[no-untyped-call]
    return part


def _num_bytes(values: Iterable[ir.Value | None]) -> int:
    weights = [value.const_value for value in values if value is not None]
    return sum(weight.nbytes for weight in weights if weight is not None)


def _weight_names(node: ir.Node) -> list[str]:
    return _names(value for value in node.inputs if value is not None and value.const_value is not None)


@dataclass(frozen=True, kw_only=True)
class RoutedLayer:
    """A mixture-of-experts layer of an encoder, named after its scope."""

    name: str
    tokens: str  # name of the layer's input
    gate: Array  # weight of the router, float32 [dim, experts]
    top_k: int  # experts per token
    expert_bytes: int  # bytes of one expert's stored weights

    def choices(self, tokens: Array) -> Array:
        """Return the experts [n, k] of tokens [..., dim], the most likely first."""
        logits = tokens.astype(np.float32).reshape(-1, len(self.gate)) @ self.gate
        return np.argsort(-logits, axis=1, kind="stable")[:, : self.top_k]

    def shares(self, tokens: Array) -> Array:
        """Return the routing weights [n, experts] of tokens [n, dim]; 0 for experts that are not chosen."""
        logits, chosen = tokens @ self.gate, self.choices(tokens)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = np.zeros_like(odds)
        np.put_along_axis(shares, chosen, np.take_along_axis(odds, chosen, axis=1), axis=1)
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def counts(self, tokens: Array) -> npt.NDArray[np.int64]:
        """Return the number of tokens [..., dim] routed to each expert [experts]."""
        return np.bincount(self.choices(tokens).ravel(), minlength=self.gate.shape[1]).astype(np.int64)


class ExpertInputs:
    """The encoder of a float32 or quantized bundle, with the inputs of its mixtures of experts as extra outputs.

    `layers` contains the mixtures by scope, in order; it is empty for a dense model. Packed bundles run with native
    kernels, and raise KernelsError without them. Raises BundleError if the router of a mixture is not a weight.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.config = bundle.manifest.model
        model = ir.load(bundle.path / self.config.graphs()[0].file)
        self.layers = {layer.name: layer for node in model.graph if (layer := routed_layer(node)) is not None}
        kernels = choose_kernels("native", [DEFAULT_PROVIDER]) if PACKED in bundle.manifest.quantization else None
        observed = [layer.tokens for layer in self.layers.values()]
        self._graph, self._seen = SwitchedGraph(model, observed=observed, kernels=kernels), list[dict[str, Array]]()

    def run(self, feeds: Values) -> Values:
        """Run as `Session.run` does."""
        found, seen = self._graph.run(feeds), self._graph.seen
        self._seen.append({name: seen[layer.tokens].astype(np.float32)[0] for name, layer in self.layers.items()})
        return found

    def chunks(self, frames: Array, chunk_size: int | None = None, num_left_chunks: int = -1) -> list[dict[str, Array]]:
        """Return, for every chunk or the whole recording, the tokens [time, dim] of each mixture, by its scope."""
        encoder, self._seen = Encoder(cast("Session", self), self.config), []  # only `run` is needed
        if chunk_size is None:
            encoder.whole(frames)
        else:
            encoder.chunked(frames, chunk_size, num_left_chunks)
        return self._seen

    def experts(self, frames: Array) -> dict[str, Array]:
        """Return, by layer, each token's sorted experts [time, k] in full context; {} if there are too few frames."""
        chunks = self.chunks(frames) if self.layers else []
        return {name: np.sort(self.layers[name].choices(x), axis=1) for own in chunks for name, x in own.items()}


def routed_layer(node: ir.Node) -> RoutedLayer | None:
    """Return the mixture of experts that a node calls, or None."""
    mixture = mixture_of(node)
    if mixture is None:
        return None
    x, gate, *weights = node.inputs
    if x is None or gate is None or gate.const_value is None:
        raise BundleError(f"{node.name} has no weight for its router")
    num_bytes = _num_bytes(stored_value(weight) for weight in weights if weight is not None)
    router, size = gate.const_value.numpy().astype(np.float32), num_bytes // mixture.num_experts
    return RoutedLayer(name=scope(node), tokens=str(x.name), gate=router, top_k=mixture.top_k, expert_bytes=size)
