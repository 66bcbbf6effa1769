"""How close is one mixture of experts to the limit of the machine, by tokens per call? Compares our recipes.

    python -m u2moe.benchmarks.full_size.moe_layer [--results moe_layer.json] [--tokens 1 16 250] [--recipes int8]

The layers are those of the preset moe-1b with seeded random weights, so that routing is nearly uniform, the worst case.
Several layers with separate weights take turns, so that no cache holds them, as in a network. The bound is the larger
of the time to read the weights of the experts with tokens and the time of their products, at the rates that
onnxruntime's kernels reach in the same run (`rates`). No kernel reaches both at once, so the products of a layer are
also measured separately, with the same number of rows per expert and nothing else. Where u2moe-kernels is installed, so
is the layer in its operator.

The results file holds one entry for each kind of machine. A run replaces what it has measured, and keeps other machines
and, for layers of the same sizes, other recipes and numbers of tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch

from u2moe.benchmarks.full_size.moe_layer_page import BITS, FLOAT, INT4, INT8, LAYER_BYTES, merged, values
from u2moe.benchmarks.instruments.rates import best_rate, measure_rates, read_rate
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, mean_seconds
from u2moe.benchmarks.results.files import read_json, write_json
from u2moe.benchmarks.results.provenance import measured_here
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.export.architecture import FeedForward
from u2moe.export.layers import feed_forward
from u2moe.export.moe import MixtureOfExperts
from u2moe.quantize.config import RECIPES
from u2moe.quantize.passes import quantize_graph
from u2moe.runtime.bundle import contract
from u2moe.runtime.graph.builder import CONTRIB, OPSET, GraphBuilder
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.model.native import CPU, choose_kernels
from u2moe.runtime.model.settings import SessionSettings

Array = npt.NDArray[Any]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 250, 500)
"""16 tokens are a chunk of the encoder, 250 are ten seconds of audio."""
CALL_S = 0.03
"""Minimum seconds of one measurement."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Sizes of a mixture of experts; by default those of the preset moe-1b."""

    dim: int = 576
    hidden: int = 1920
    num_experts: int = 8
    top_k: int = 2

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of both products of one expert for one token."""
        return 2 * self.dim * self.hidden


class Layers:
    """Mixtures of experts with random weights in one recipe, too many for any cache, run in turn on the same tokens.

    Attributes:
        bytes_per_expert: bytes of an expert's weights, scales and biases.
    """

    def __init__(self, sizes: Layer, recipe: str, num_bytes: int, *, num_threads: int = 1) -> None:
        per_layer = sizes.num_experts * sizes.multiply_adds * BITS[recipe] // 8
        self.sizes = sizes
        self.recipe = recipe
        model = moe_graph(sizes, max(1, -(-num_bytes // per_layer)))
        if recipe != FLOAT:
            quantize_graph(model, RECIPES[recipe])
        weights = [(group_of(value), value.const_value) for value in model.graph.initializers.values()]
        self.gates = [tensor.numpy() for group, tensor in weights if group == "routers" and tensor is not None]
        experts = sum(tensor.nbytes for group, tensor in weights if group == "experts" and tensor is not None)
        self.bytes_per_expert = experts / (len(self.gates) * sizes.num_experts)
        self.layers = layer_session(model, num_threads)
        has_native = choose_kernels("auto", [CPU]).native and recipe != FLOAT
        self.native = layer_session(model, num_threads, "native") if has_native else None
        self.products = layer_session(products_graph(model, sizes, recipe), num_threads)

    def run(self, x: Array) -> list[Array]:
        """The output of each layer for the tokens [tokens, dim]."""
        outputs: list[Array] = self.layers.run(None, {"x": x})
        return outputs

    def seconds(self, x: Array) -> float:
        """Seconds of one layer, averaged over several calls of all."""
        return mean_seconds(lambda: self.layers.run(None, {"x": x}), CALL_S) / len(self.gates)

    def native_seconds(self, x: Array) -> float:
        """The same with native kernels, which must be installed."""
        if self.native is None:
            raise ValueError(f"native kernels are not installed, or do not compute {self.recipe}")
        native = self.native
        return mean_seconds(lambda: native.run(None, {"x": x}), CALL_S) / len(self.gates)

    def products_seconds(self, x: Array) -> float:
        """Seconds of the products in one layer, for the experts with tokens, each with the mean number of rows."""
        experts = self.touched(x)
        rows = round(len(x) * self.sizes.top_k / experts)
        random = np.random.default_rng(0)
        feeds = {
            name: random.integers(0, 256, (rows, size), np.uint8)
            if self.recipe == INT8
            else random.standard_normal((rows, size), np.float32)
            for name, size in (("tokens", self.sizes.dim), ("inner", self.sizes.hidden))
        }
        all_experts = mean_seconds(lambda: self.products.run(None, feeds), CALL_S) / len(self.gates)
        return all_experts * experts / self.sizes.num_experts

    def touched(self, x: Array) -> float:
        """Number of experts with at least one token, averaged over the layers."""
        chosen = [
            np.argpartition(-(x @ gate), self.sizes.top_k - 1, axis=1)[:, : self.sizes.top_k] for gate in self.gates
        ]
        return statistics.fmean(len(np.unique(experts)) for experts in chosen)


def layer_session(model: ir.Model, num_threads: int, kernels: str = "onnxruntime") -> onnxruntime.InferenceSession:
    """A session of a graph of layers, with these kernels."""
    options = SessionSettings(num_threads=num_threads, kernels=kernels).session_options()
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def moe_graph(sizes: Layer, num_layers: int) -> ir.Model:
    """A graph of `num_layers` layers on the same input "x" [tokens, dim], each with its own output."""
    config = FeedForward(
        kind="moe",
        hidden=sizes.hidden,
        activation="swish",
        bias=True,
        num_experts=sizes.num_experts,
        num_experts_per_token=sizes.top_k,
    )
    names = [f"y{index}" for index in range(num_layers)]
    x, *outputs = (contract.Tensor(name=name, dtype="float32", axes=("tokens", "dim")) for name in ("x", *names))
    graph = contract.Graph(name="layers", inputs=(x,), outputs=tuple(outputs))

    def axis(name: str) -> int | None:
        return sizes.dim if name == "dim" else None

    g = GraphBuilder(graph.name)
    inputs, results = {"x": g.input(x, axis)}, {}
    for index, name in enumerate(names):
        torch.manual_seed(index)
        with g.scope(f"encoders.{index}"):
            layer = MixtureOfExperts(sizes.dim, config)
            results[name] = feed_forward(g, inputs["x"], layer, config.activation, "feed_forward")
    return g.model(graph, inputs, results, axis, {})


def products_graph(model: ir.Model, sizes: Layer, recipe: str) -> ir.Model:
    """Only the products of all experts of a graph of layers, with the operator of the recipe.

    Inputs are "tokens" [rows, dim] for the first products and "inner" [rows, hidden] for the second, bytes in int8;
    every product is an output.
    """
    dtype = ir.DataType.UINT8 if recipe == INT8 else ir.DataType.FLOAT
    tokens = ir.val("tokens", dtype=dtype, shape=("rows", sizes.dim))
    inner = ir.val("inner", dtype=dtype, shape=("rows", sizes.hidden))
    initializers = [ir.val(name, const_value=ir.tensor(value, name=name)) for name, value in _CONSTANTS.items()]
    one, middle = initializers
    nodes = []
    for weight, scale in _expert_weights(model):
        own = [_copy(value) for value in (weight, scale) if value is not None]
        initializers += own
        first = ".w_1." in (weight.name or "")
        x, size = (tokens, (sizes.dim, sizes.hidden)) if first else (inner, (sizes.hidden, sizes.dim))
        if recipe == INT4:
            block_size = RECIPES[recipe].block_size
            attributes = {"K": size[0], "N": size[1], "bits": 4, "block_size": block_size, "accuracy_level": 4}
            node = ir.node("MatMulNBits", [x, *own], attributes, domain=CONTRIB)
        elif recipe == INT8:
            node = ir.node("MatMulIntegerToFloat", [x, own[0], one, own[1], middle], domain=CONTRIB)
        else:
            node = ir.node("MatMul", [x, *own])
        node.outputs[0].name = f"{weight.name}.product"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
    outputs = [node.outputs[0] for node in nodes]
    opsets = {"": OPSET, CONTRIB: 1}
    used = [value for value in initializers if value.uses()]
    graph = ir.Graph([tokens, inner], outputs, nodes=nodes, initializers=used, opset_imports=opsets, name="products")
    return ir.Model(graph, ir_version=model.ir_version)


_CONSTANTS: Mapping[str, Array] = {"one": np.array(1, np.float32), "middle": np.array(128, np.uint8)}


def _expert_weights(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value | None]]:
    """Weights of experts and their scales, in the order of the graph."""
    initializers = model.graph.initializers
    for name, value in initializers.items():
        stem, _, kind = name.rpartition(".")
        if group_of(value) == "experts" and kind in ("int8", "int4"):
            yield value, initializers[f"{stem}.scale"]
        elif group_of(value) == "experts" and kind == "weight":
            yield value, None


def _copy(value: ir.Value) -> ir.Value:
    """A copy of the constant for another graph."""
    return ir.val(str(value.name), const_value=value.const_value)


def measure(
    sizes: Layer,
    recipes: Sequence[str],
    tokens: Sequence[int],
    *,
    num_bytes: int = LAYER_BYTES,
    num_threads: int = 1,
    repetitions: int = 7,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times of one layer and their bounds, all recipes in turn, after the rates of the machine.

    Args:
        sizes: sizes of the layer.
        recipes: names in `BITS`.
        tokens: numbers of tokens per call.
        num_bytes: bytes of the weights that take turns.
        num_threads: threads within one operator.
        repetitions: number of measurements.
        progress: called with a line for each step.

    Returns:
        rates: rates of the machine.
        layers: an entry for each recipe and number of tokens: `seconds` (a spread), `products_s` (a spread, of the
            products alone), `experts` that have tokens, `read_s` and `arithmetic_s`, `least_s` (the larger), and
            `ratio`, of the median to it; with native kernels `native_s` (a spread).
        kernels: see `Kernels.data`.
    """
    layers = {}
    for recipe in recipes:
        progress(f"making layers: {recipe}")
        layers[recipe] = Layers(sizes, recipe, num_bytes, num_threads=num_threads)
    inputs = random_tokens(sizes, tokens)
    rates = measure_rates([num_bytes], num_threads, repetitions=repetitions, progress=progress)
    cases: dict[tuple[str, int, str], Callable[[], float]] = {}
    for count, x in inputs.items():
        for recipe, own in layers.items():
            cases[recipe, count, "seconds"] = partial(own.seconds, x)
            cases[recipe, count, "products_s"] = partial(own.products_seconds, x)
            if own.native is not None:
                cases[recipe, count, "native_s"] = partial(own.native_seconds, x)
    found = interleaved(cases, repetitions, title="layers", progress=progress)
    entries = []
    for count, x in inputs.items():
        for recipe, own in layers.items():
            keys = ("seconds", "products_s", *(["native_s"] if own.native is not None else []))
            spreads = {key: Spread.of(found[recipe, count, key]) for key in keys}
            entries.append({**bound(own, x, rates), **{key: value.data() for key, value in spreads.items()}})
            entries[-1]["ratio"] = spreads["seconds"].median / entries[-1]["least_s"]
    kernels = choose_kernels("auto", [CPU]).data()
    return {"sizes": asdict(sizes), "threads": num_threads, "kernels": kernels, "rates": rates, "layers": entries}


def random_tokens(sizes: Layer, tokens: Sequence[int]) -> dict[int, Array]:
    """Inputs [tokens, dim] of a layer by number of tokens."""
    random = np.random.default_rng(0)
    return {count: random.standard_normal((count, sizes.dim), np.float32) for count in tokens}


def bound(own: Layers, x: Array, rates: Mapping[str, Any]) -> dict[str, Any]:
    """The bound of one recipe for these tokens, and its components."""
    experts = own.touched(x)
    read_s = experts * own.bytes_per_expert / read_rate(dict(rates), LAYER_BYTES)
    kind = "float" if own.recipe == FLOAT else "integer"
    arithmetic_s = len(x) * own.sizes.top_k * own.sizes.multiply_adds / best_rate(dict(rates), kind)
    return {
        "recipe": own.recipe,
        "tokens": len(x),
        "experts": experts,
        "read_s": read_s,
        "arithmetic_s": arithmetic_s,
        "least_s": max(read_s, arithmetic_s),
    }


def layer_parser(name: str, documentation: str | None, tokens: Sequence[int]) -> argparse.ArgumentParser:
    """The options of a script that measures layers; `tokens` are the default numbers of them."""
    parser = script_parser(name, documentation)
    parser.add_argument("--results", type=Path, metavar="JSON", help="file for the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(tokens))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--bytes", type=int, default=LAYER_BYTES, help="bytes of the weights that take turns")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = layer_parser("full_size.moe_layer", __doc__, TOKENS)
    parser.add_argument("--recipes", nargs="+", choices=tuple(BITS), default=list(BITS))
    for name, size in asdict(Layer()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    options = parser.parse_args(arguments)
    sizes = Layer(**{name: getattr(options, name) for name in asdict(Layer())})
    content = measure(
        sizes,
        options.recipes,
        options.tokens,
        num_bytes=options.bytes,
        num_threads=options.threads,
        repetitions=options.repetitions,
        progress=report,
    )
    content = {**measured_here(), **content}
    print(values({"machines": {"": content}})["tables"])
    if options.results:
        write_json(options.results, merged(read_json(options.results), content))


if __name__ == "__main__":
    run_script(main)
