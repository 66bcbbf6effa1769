"""Which kernel is fastest for the experts of a bundle, here? Layers of the bundle itself, timed in turn.

Layers of a graph have the same sizes and differ in nothing that decides between kernels: a choice is of all of them.
One graph with two kernels, chosen by the tokens of a call, would hold all weights twice, on disk and in memory, since
each kernel has an order of its own for them: so a graph has one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import relative_error
from u2moe.quantize.config import KERNELS, Recipe, Tune
from u2moe.quantize.qmoe import BITS, expert_layers, to_qmoe
from u2moe.quantize.rewrites import Change, rewrite
from u2moe.runtime.bundle import Bundle
from u2moe.runtime.errors import BundleError
from u2moe.runtime.measurement import Spread, interleaved, mean_seconds
from u2moe.runtime.session import DEFAULT_PROVIDER, ONNXRUNTIME_ERRORS, SessionSettings
from u2moe.runtime.tuning import TunedExperts, Tuning

Array = npt.NDArray[Any]
Timer = Callable[[str, int, Callable[[], object]], float]
"""Seconds of a call, for a format and a number of tokens."""
LAYER_BYTES = 160_000_000
"""Of the int8 weights of the layers that take turns: beyond the last cache of most processors."""
CALL_S = 0.03
"""Seconds that one measurement lasts at least."""
ERROR_LIMIT = 1.5
"""A kernel that loses so many times what our dispatch of as many bits loses is no other way to compute the same."""
MARGIN, LOSSY_MARGIN = 0.98, 0.9
"""Another kernel must take less than this part of the time, for less could be noise; one with fewer bits than that."""
ERROR_TOKENS = 64
"""Tokens whose results are compared with those of float32."""


def timed(_kind: str, _tokens: int, call: Callable[[], object]) -> float:
    """Seconds of a call, as the clock says."""
    return mean_seconds(call, CALL_S)


def quantize_graph(model: ir.Model, recipe: Recipe) -> dict[str, Change]:
    """Quantize a graph in place, the experts by the kernel of their format; see `rewrite`.

    Returns:
        What was replaced, by the name of the new integer weight.

    Raises:
        BundleError: the graph holds a node that is not as the exporter writes it, or that the kernel cannot compute.
    """
    changes = rewrite(model, recipe)  # leaves experts in formats that are not its own
    bits = BITS.get(recipe.quantized.get("experts", ""))
    return changes | to_qmoe(model, bits) if bits else changes


def tuned(
    source: Bundle, recipe: Recipe, *, progress: Callable[[str], None] = lambda _: None
) -> tuple[Recipe, Tuning | None]:
    """The recipe with the fastest kernels for the experts of each graph, and what was measured; None without `tune`.

    The decoder gets all hypotheses of an utterance in one call: it counts at the largest number of tokens alone.

    Args:
        source: a float32 bundle.
        recipe: formats, and how to choose.
        progress: called with a line for each step.

    Raises:
        BundleError: no graph has experts.
    """
    if recipe.tune is None:
        return recipe, None
    found = {}
    for graph in source.manifest.model.graphs():
        model = ir.load(source.path / graph.file)
        if not expert_layers(model):
            continue
        tune = recipe.tune
        if graph.name != "encoder":
            shares = dict.fromkeys(tune.shares, 0.0) | {max(tune.shares): 1.0}
            tune = dataclasses.replace(tune, shares=shares)
        found[graph.name] = tune_experts(model, recipe, tune, title=f"experts of {graph.name}", progress=progress)
        progress(f"experts of {graph.name}: {found[graph.name].chosen}")
    if not found:
        raise BundleError(f"{source.path}: tune chooses kernels for experts, but no graph has any")
    experts_of = {name: experts.chosen for name, experts in found.items()}
    return dataclasses.replace(recipe, experts_of=experts_of), Tuning.here(found, recipe.tune.num_threads)


def tune_experts(
    model: ir.Model,
    recipe: Recipe,
    tune: Tune,
    *,
    timer: Timer | None = None,
    title: str = "experts",
    progress: Callable[[str], None] = lambda _: None,
) -> TunedExperts:
    """Time the kernels that the experts of a graph may get, and choose one.

    Random tokens come to the routers of the layers, which is near uniform: the worst case.

    Args:
        model: a float32 graph with experts; it is left as it is.
        recipe: the experts' format, which must be in `KERNELS`, and what else decides how they are computed.
        tune: what counts.
        timer: how calls are timed; None: `timed`.
        title: of the lines of progress.
        progress: called with a line for each step.

    Raises:
        BundleError: onnxruntime cannot run the recipe's own kernel.
    """
    own = recipe.quantized["experts"]
    layers = _Layers(model, recipe, tune.num_threads)
    sessions, errors, refused = _sessions(layers, own, lossy=tune.lossy, progress=lambda line: progress(title + line))
    inputs = {count: layers.tokens(count) for count in tune.shares}
    cases = {
        (kind, count): partial(timer or timed, kind, count, partial(session.run, None, {"x": x}))
        for count, x in inputs.items()
        for kind, session in sessions.items()
    }
    seconds = interleaved(cases, tune.repetitions, title=title, progress=progress)
    in_ms = 1e3 / layers.count
    total = sum(tune.shares.values())
    found = TunedExperts(
        chosen=own,
        num_layers=layers.count,
        shares={str(count): share / total for count, share in tune.shares.items()},
        times_ms={
            kind: {str(count): Spread.of([in_ms * value for value in seconds[kind, count]]) for count in inputs}
            for kind in sessions
        },
        errors=errors,
        refused=refused,
    )
    return dataclasses.replace(found, chosen=_choice(found))


def _sessions(
    layers: _Layers, own: str, *, lossy: bool, progress: Callable[[str], None]
) -> tuple[dict[str, onnxruntime.InferenceSession], dict[str, float], dict[str, str]]:
    """By format: what runs the layers, what it loses, and why it is left out.

    Raises:
        BundleError: the recipe's own kernel is left out.
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
            refused[kind] = _shortened(str(failure).strip().splitlines()[0])
        else:
            sessions[kind], errors[kind] = session, error
    if own in refused:
        raise BundleError(f"experts in {own}: {refused[own]}")
    return sessions, errors, refused


def _candidates(own: str, *, lossy: bool) -> Iterator[tuple[str, str]]:
    """The formats that may be chosen, our dispatch of as many bits before each; the recipe's own first."""
    bits = [own, *(first for first in KERNELS if lossy and list(KERNELS).index(first) > list(KERNELS).index(own))]
    for first in bits:
        for kind in KERNELS[first]:
            yield first, kind


def _shortened(message: str, begin: int = 60, end: int = 140) -> str:
    """Onnxruntime lists all inputs of a node before it says what is wrong with it."""
    return message if len(message) <= begin + end + 5 else f"{message[:begin]} ... {message[-end:]}"


def _choice(found: TunedExperts) -> str:
    """Of the formats in their order, each takes the place of the one before it if it is faster by the margin."""
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
    """Expert layers of a graph, in every format; as many as together no cache holds, or all.

    Attributes:
        count: how many take turns.
    """

    def __init__(self, model: ir.Model, recipe: Recipe, num_threads: int) -> None:
        layers = expert_layers(model)
        self.model = model
        self.recipe = recipe
        self.num_threads = num_threads
        if len({layer.sizes for layer in layers}) > 1:
            raise BundleError(f"expert layers have sizes {[layer.sizes for layer in layers]}, expected the same")
        self.dim, hidden = layers[0].sizes
        per_layer = 2 * self.dim * hidden * len(layers[0].w1)
        self.count = min(len(layers), -(-LAYER_BYTES // per_layer))
        self.compared = self.tokens(ERROR_TOKENS)
        self.expected = self._run(layers_alone(model, 1)).run(None, {"x": self.compared})[0]

    def tokens(self, count: int) -> Array:
        """Random tokens [1, count, dim], the same for the same count."""
        return np.random.default_rng(count).standard_normal((1, count, self.dim), np.float32)

    def session(self, kind: str) -> onnxruntime.InferenceSession:
        """The layers in a format, on the input "x" [batch, tokens, dim], with an output each.

        Raises:
            BundleError: the format's kernel cannot compute them.
        """
        alone = layers_alone(self.model, self.count)
        skip_below = self.recipe.skip_expert_below
        if kind in BITS and skip_below:
            raise BundleError(f"QMoE cannot skip experts (skip_expert_below {skip_below})")
        experts = Recipe(
            name=kind, groups={"experts": kind}, block_size=self.recipe.block_size, skip_expert_below=skip_below
        )
        quantize_graph(alone, experts)
        return self._run(alone)

    def error(self, session: onnxruntime.InferenceSession) -> float:
        """Relative error of the first layer against float32."""
        return relative_error(self.expected, session.run(None, {"x": self.compared})[0])

    def _run(self, model: ir.Model) -> onnxruntime.InferenceSession:
        options = SessionSettings(num_threads=self.num_threads).session_options()
        ir.external_data.load_to_model(model)  # what stays as it is may lie beside the graph it came from
        content = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=[DEFAULT_PROVIDER])


def layers_alone(model: ir.Model, count: int) -> ir.Model:
    """A graph of the first `count` expert layers of a graph, on one input "x" [batch, tokens, dim], an output each."""
    layers = expert_layers(model)[:count]
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=("batch", "tokens", layers[0].sizes[0]))
    nodes, initializers = [], []
    for index, layer in enumerate(layers):
        weights = [ir.val(str(value.name), const_value=value.const_value) for value in layer.weights]
        node = ir.Node(layer.node.domain, layer.node.op_type, [x, *weights], name=layer.node.name)
        output = ir.node("Identity", node.outputs)  # rewrites replace no output of a graph
        output.outputs[0].name = f"y{index}"
        output.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes += [node, output]
        initializers += weights
    graph = ir.Graph(
        [x],
        [node.outputs[0] for node in nodes[1::2]],
        nodes=nodes,
        initializers=initializers,
        opset_imports=model.opset_imports,
        name="layers",
    )
    functions = {function.identifier(): function for function in model.functions.values()}
    return ir.Model(graph, ir_version=model.ir_version, functions=list(functions.values()))
