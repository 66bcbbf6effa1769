"""Finds the fastest kernel for the experts of a bundle on this machine, by timing layers of the bundle in turn.

The layers of a graph have the same sizes and do not differ in anything that matters to kernels, so all get the same
one. Their inputs do matter: neighbouring tokens of speech share experts, so that fewer experts get more tokens each
than with random tokens. A graph that chose between two kernels by the tokens of a call would hold all weights twice,
on disk and in memory, since each kernel has its own layout: so a graph has only one kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.config import KERNELS, Recipe, Tune
from u2moe.quantize.experts.layer import expert_layers
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.routing import ExpertInputs, scope
from u2moe.quantize.tuning.measurement import Spread, interleaved, mean_seconds
from u2moe.quantize.tuning.record import TunedExperts, Tuning
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.errors import BundleError
from u2moe.runtime.model.native import ONNXRUNTIME_ERRORS
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings

Array = npt.NDArray[Any]
Timer = Callable[[str, int, Callable[[], object]], float]
"""Seconds of a call, for a format and a number of tokens."""
LAYER_BYTES = 160_000_000
"""Bytes of int8 weights in the layers that take turns: more than the last-level cache of most processors."""
CALL_S = 0.03
"""Minimum seconds of one measurement."""
ERROR_LIMIT = 1.5
"""A kernel whose error is this many times that of our dispatch with as many bits does not compute the same thing."""
MARGIN, LOSSY_MARGIN = 0.98, 0.9
"""Another kernel is chosen if it takes less than this fraction of the time: smaller gains could be noise. The second
fraction is for a kernel with fewer bits."""
ERROR_TOKENS = 64
"""Number of tokens whose results are compared with float32."""
RANDOM_TOKENS, NUM_WINDOWS = 512, 8
"""Number of random tokens if there is no speech; and calls per measurement, each with different tokens if possible."""


def timed(_kind: str, _tokens: int, call: Callable[[], object]) -> float:
    """Seconds of a call, by the clock."""
    return mean_seconds(call, CALL_S)


def tuned(
    source: Bundle,
    recipe: Recipe,
    features: Sequence[Array] = (),
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Recipe, Tuning | None]:
    """The recipe with the fastest kernels for the experts of each graph, and the measurements; None without `tune`.

    The decoder gets all hypotheses of an utterance in one call, so only the largest number of tokens counts for it.

    Args:
        source: a float32 bundle.
        recipe: formats, and how to choose.
        features: features of speech, float32 [frames, mel] each; if empty, the encoder's layers get random tokens.
        progress: called with a line for each step.

    Raises:
        BundleError: no graph has experts.
    """
    if recipe.tune is None:
        return recipe, None
    found = {}
    speech = _speech_inputs(source, features, max(recipe.tune.shares), progress)
    for graph in source.manifest.model.graphs():
        model = ir.load(source.path / graph.file)
        if not expert_layers(model):
            continue
        tune = recipe.tune
        if graph.name != "encoder":
            shares = dict.fromkeys(tune.shares, 0.0) | {max(tune.shares): 1.0}
            tune = dataclasses.replace(tune, shares=shares)
        inputs = speech if graph.name == "encoder" else {}
        title = f"experts of {graph.name}"
        found[graph.name] = tune_experts(model, recipe, tune, inputs, title=title, progress=progress)
        progress(f"experts of {graph.name}: {found[graph.name].chosen}")
    if not found:
        raise BundleError(f"{source.path}: tune chooses kernels for experts, but no graph has any")
    experts_of = {name: experts.chosen for name, experts in found.items()}
    return dataclasses.replace(recipe, experts_of=experts_of), Tuning.here(found, recipe.tune.num_threads)


def _speech_inputs(
    source: Bundle, features: Sequence[Array], num_tokens: int, progress: Callable[[str], None]
) -> dict[str, Array]:
    """Inputs of the encoder's layers, [time, dim] by their scope, for enough features to give that many tokens."""
    if not features:
        return {}
    progress("inputs of the experts for speech")
    inputs = ExpertInputs(source)
    parts: dict[str, list[Array]] = {layer: [] for layer in inputs.layers}
    total = 0
    for frames in features:
        for layer, x in (found := inputs.tokens(frames)).items():
            parts[layer].append(x)
        total += max(map(len, found.values()), default=0)
        if total >= num_tokens:
            break
    return {layer: np.concatenate(own) for layer, own in parts.items()}


def tune_experts(
    model: ir.Model,
    recipe: Recipe,
    tune: Tune,
    speech: Mapping[str, Array] = MappingProxyType({}),
    *,
    timer: Timer | None = None,
    title: str = "experts",
    progress: Callable[[str], None] = lambda _: None,
) -> TunedExperts:
    """Time the candidate kernels for the experts of a graph, and choose one.

    Args:
        model: a float32 graph with experts; it is not changed.
        recipe: the experts' format, which must be in `KERNELS`, and other settings that affect how they are computed.
        tune: what to measure, and how it counts.
        speech: tokens [time, dim] by the scope of their layer; neighbours choose similar experts. Layers that are not
            listed get random tokens, which use nearly all experts.
        timer: how calls are timed; None: `timed`.
        title: prefix of the progress lines.
        progress: called with a line for each step.

    Raises:
        BundleError: onnxruntime cannot run the recipe's own kernel.
    """
    own = recipe.quantized["experts"]
    layers = _Layers(model, recipe, tune.num_threads, speech)
    sessions, errors, refused = _sessions(layers, own, lossy=tune.lossy, progress=lambda line: progress(title + line))
    windows = {count: layers.windows(count) for count in tune.shares}
    cases = {
        (kind, count): partial(timer or timed, kind, count, partial(_run_all, session, calls))
        for count, calls in windows.items()
        for kind, session in sessions.items()
    }
    seconds = interleaved(cases, tune.repetitions, title=title, progress=progress)

    def in_ms(kind: str, count: int) -> Spread:
        return Spread.of([1e3 * value / len(layers.indices) / len(windows[count]) for value in seconds[kind, count]])

    total = sum(tune.shares.values())
    found = TunedExperts(
        chosen=own,
        tokens="speech" if speech else "random",
        num_layers=len(layers.indices),
        shares={str(count): share / total for count, share in tune.shares.items()},
        times_ms={kind: {str(count): in_ms(kind, count) for count in windows} for kind in sessions},
        errors=errors,
        refused=refused,
    )
    return dataclasses.replace(found, chosen=_choice(found))


def _run_all(session: onnxruntime.InferenceSession, calls: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
    return [session.run(None, feeds) for feeds in calls]


def _sessions(
    layers: _Layers, own: str, *, lossy: bool, progress: Callable[[str], None]
) -> tuple[dict[str, onnxruntime.InferenceSession], dict[str, float], dict[str, str]]:
    """By format: the session that runs the layers, its error, and the reason if it is excluded.

    Raises:
        BundleError: the recipe's own kernel is excluded.
    """
    sessions: dict[str, onnxruntime.InferenceSession] = {}
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    failures: tuple[type[Exception], ...] = (BundleError, *ONNXRUNTIME_ERRORS)  # of a version without the operator
    for first, kind in _candidates(own, lossy=lossy):
        progress(f": making {kind}")
        try:
            session = layers.session(kind)
            error = layers.error(session)
            _check_error(error, errors.get(first, math.inf))
        except failures as failure:
            reason = str(failure).strip().splitlines()[0]
            is_ours = isinstance(failure, BundleError)
            refused[kind] = reason if is_ours else f"onnxruntime {onnxruntime.__version__}: {_shortened(reason)}"
        else:
            sessions[kind], errors[kind] = session, error
    if own in refused:
        raise BundleError(f"experts in {own}: {refused[own]}")
    return sessions, errors, refused


def _candidates(own: str, *, lossy: bool) -> Iterator[tuple[str, str]]:
    """The candidate formats, each with our dispatch of as many bits; the recipe's own first."""
    bits = [own, *(first for first in KERNELS if lossy and list(KERNELS).index(first) > list(KERNELS).index(own))]
    for first in bits:
        for kind in KERNELS[first]:
            yield first, kind


def _shortened(message: str, begin: int = 60, end: int = 140) -> str:
    """Shorten a message: onnxruntime lists all inputs of a node before the actual problem."""
    return message if len(message) <= begin + end + 5 else f"{message[:begin]} ... {message[-end:]}"


def _choice(found: TunedExperts) -> str:
    """The chosen format: in order, each replaces the choice so far if it is faster by the margin."""
    chosen = found.chosen
    for kind in found.times_ms:
        has_fewer_bits = kind.partition("-")[0] != chosen.partition("-")[0]
        if found.ms_per_token(kind) < (LOSSY_MARGIN if has_fewer_bits else MARGIN) * found.ms_per_token(chosen):
            chosen = kind
    return chosen


def _check_error(found: float, expected: float) -> None:
    limit = min(ERROR_LIMIT * expected, 1)
    if not found <= limit:
        raise BundleError(f"error of a layer is {found:.2%}, expected at most {limit:.2%}")


class _Layers:
    """Expert layers of a graph, in every format: enough of them to exceed the caches, or all.

    Attributes:
        indices: the layers that take turns, from first to last.
        streams: tokens [time, dim] for each of them.
    """

    def __init__(self, model: ir.Model, recipe: Recipe, num_threads: int, speech: Mapping[str, Array]) -> None:
        layers = expert_layers(model)
        self.model = model
        self.recipe = recipe
        self.num_threads = num_threads
        if len({layer.sizes for layer in layers}) > 1:
            raise BundleError(f"expert layers have sizes {[layer.sizes for layer in layers]}, expected the same")
        dim, hidden = layers[0].sizes
        per_layer = 2 * dim * hidden * len(layers[0].w1)
        count = min(len(layers), -(-LAYER_BYTES // per_layer))
        self.indices = np.linspace(0, len(layers) - 1, count).astype(int).tolist()
        names = [scope(layers[index].node) for index in self.indices]
        random = np.random.default_rng(0).standard_normal((RANDOM_TOKENS, dim), np.float32)
        self.streams = [speech.get(name, random) for name in names]
        self.compared = self.windows(ERROR_TOKENS)[0]
        alone = self._run(layers_alone(model, self.indices[:1]))
        self.expected = alone.run(None, {"x0": self.compared["x0"]})[0]

    def windows(self, count: int) -> list[dict[str, Array]]:
        """Calls of `count` consecutive tokens, [1, count, dim] for each layer, from several places of their streams."""
        num_tokens = len(self.streams[0])
        if num_tokens < count:
            return [self._feeds([np.resize(stream, (count, stream.shape[1])) for stream in self.streams])]
        starts = np.linspace(0, num_tokens - count, min(NUM_WINDOWS, num_tokens // count)).astype(int)
        return [self._feeds([stream[start : start + count] for stream in self.streams]) for start in starts]

    @staticmethod
    def _feeds(tokens: Sequence[Array]) -> dict[str, Array]:
        return {f"x{index}": own[np.newaxis] for index, own in enumerate(tokens)}

    def session(self, kind: str) -> onnxruntime.InferenceSession:
        """The layers in a format; see `layers_alone`.

        Raises:
            BundleError: the format's kernel cannot compute them.
        """
        alone = layers_alone(self.model, self.indices)
        experts = Recipe(
            name=kind,
            groups={"experts": kind},
            block_size=self.recipe.block_size,
        )
        quantize_graph(alone, experts)
        return self._run(alone)

    def error(self, session: onnxruntime.InferenceSession) -> float:
        """Relative error of the first layer against float32."""
        return relative_error(self.expected, session.run(["y0"], self.compared)[0])

    def _run(self, model: ir.Model) -> onnxruntime.InferenceSession:
        options = SessionSettings(num_threads=self.num_threads).session_options()
        ir.external_data.load_to_model(model)  # unchanged weights may be in a file beside the original graph
        content = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=[DEFAULT_PROVIDER])


def layers_alone(model: ir.Model, indices: Sequence[int]) -> ir.Model:
    """A graph of some of the expert layers: "x0", "x1", ... [batch, tokens, dim] in, "y0", "y1", ... out."""
    layers = expert_layers(model)
    inputs, outputs, nodes, initializers = [], [], [], []
    for number, index in enumerate(indices):
        layer = layers[index]
        x = ir.val(f"x{number}", dtype=ir.DataType.FLOAT, shape=("batch", "tokens", layer.sizes[0]))
        weights = [_copy(value) for value in layer.weights]
        node = ir.Node(
            layer.node.domain, layer.node.op_type, [x, *weights], layer.node.attributes.values(), name=layer.node.name
        )
        output = ir.node("Identity", node.outputs)  # rewrites never replace a graph output
        output.outputs[0].name = f"y{number}"
        output.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        inputs.append(x)
        outputs.append(output.outputs[0])
        nodes += [node, output]
        initializers += weights
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=model.opset_imports, name="layers"
    )
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _copy(value: ir.Value) -> ir.Value:
    """The same weight for another graph."""
    copy = ir.val(str(value.name), const_value=value.const_value)
    copy.metadata_props.update(value.metadata_props)
    return copy
