"""How near is one mixture of experts to the bound of the machine, by tokens per call and recipe?

    python -m u2moe.benchmarks.studies.moe_layer

The layers are those of the preset moe-1b with seeded random weights, so that routing is nearly uniform, the worst case.
Several layers with separate weights take turns on one thread, so that no cache holds them, as in a network. The bound
is the larger of the time to read the weights of the experts with tokens and the time of their products, at the rates
that onnxruntime's kernels reach in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch

from u2moe.benchmarks.instruments.rates import best_rate, measure_rates, read_rate, session_of
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, mean_seconds, spread_of
from u2moe.benchmarks.results.files import machine_key, measured, publish
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.script import run_script, study_parser
from u2moe.export.architecture import FeedForward
from u2moe.export.layers import feed_forward
from u2moe.export.moe import MixtureOfExperts
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.recipes import recipe
from u2moe.runtime.bundle import contract
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.model.native import CPU, choose_kernels

Array = npt.NDArray[Any]
FLOAT, INT8, INT4 = "fp32", "int8", "int4-experts"
BITS = {FLOAT: 32, INT8: 8, INT4: 4}  # of an expert's weight, by recipe
DIM, HIDDEN, NUM_EXPERTS, TOP_K = 576, 1920, 8, 2
TOKENS = (1, 4, 16, 64, 250)
"""16 tokens are a chunk of the encoder, 250 are ten seconds of audio."""
NUM_BYTES = 160_000_000  # of all weights that take turns: more than most last-level caches
CALL_S = 0.03  # at least, of one measurement
BOUNDS = {16: "read_s", 250: "arithmetic_s"}
"""The bound of a layer in int8, by tokens."""
LIMITS = {16: 0.7, 250: 1.05}
"""Most that a layer with experts in int4 may take beside one in int8, with native kernels, by tokens."""


class Layers:
    """`num_bytes` of mixtures of experts with random weights in the recipe `name`, run in turn on the same tokens."""

    def __init__(self, name: str, num_bytes: int) -> None:
        model = moe_graph(max(1, -(-num_bytes * 8 // (2 * NUM_EXPERTS * DIM * HIDDEN * BITS[name]))))
        if name != FLOAT:
            quantize_graph(model, recipe(name))
        self.recipe = name
        weights = [(group_of(value), value.const_value) for value in model.graph.initializers.values()]
        self.gates = [tensor.numpy() for group, tensor in weights if group == "routers" and tensor is not None]
        experts = sum(tensor.nbytes for group, tensor in weights if group == "experts" and tensor is not None)
        self.bytes_per_expert = experts / (len(self.gates) * NUM_EXPERTS)
        content = ir.to_proto(model).SerializeToString()
        self._sessions = {"seconds": session_of(content, "onnxruntime")}
        if choose_kernels("auto", [CPU]).native and name != FLOAT:
            self._sessions["native_s"] = session_of(content, "native")

    def cases(self, x: Array) -> dict[str, Callable[[], float]]:
        """Functions that time one layer on tokens [tokens, dim], in seconds, by name in the results."""
        return {name: partial(self._seconds, session, x) for name, session in self._sessions.items()}

    def _seconds(self, session: onnxruntime.InferenceSession, x: Array) -> float:
        return mean_seconds(lambda: session.run(None, {"x": x}), CALL_S) / len(self.gates)

    def touched(self, x: Array) -> float:
        """Return the number of experts with at least one token, averaged over the layers."""
        chosen = [np.argpartition(-(x @ gate), TOP_K - 1, axis=1)[:, :TOP_K] for gate in self.gates]
        return statistics.fmean(len(np.unique(experts)) for experts in chosen)

    def bound(self, x: Array, rates: Mapping[str, Any]) -> dict[str, Any]:
        """Return the bound for these tokens, and its components."""
        read_s = self.touched(x) * self.bytes_per_expert / read_rate(dict(rates), NUM_BYTES)
        rate = best_rate(dict(rates), "float" if self.recipe == FLOAT else "integer")
        arithmetic_s = len(x) * TOP_K * 2 * DIM * HIDDEN / rate
        return {
            "recipe": self.recipe, "tokens": len(x), "experts": self.touched(x), "read_s": read_s,
            "arithmetic_s": arithmetic_s, "least_s": max(read_s, arithmetic_s),
        }  # fmt: skip


def moe_graph(num_layers: int) -> ir.Model:
    """Return a graph of `num_layers` layers with the same input "x" [tokens, dim], each with its own output."""
    config = FeedForward(
        kind="moe", hidden=HIDDEN, activation="swish", bias=True, num_experts=NUM_EXPERTS, num_experts_per_token=TOP_K
    )
    names = [f"y{index}" for index in range(num_layers)]
    x, *outputs = (contract.Tensor(name=name, dtype="float32", axes=("tokens", "dim")) for name in ("x", *names))
    graph = contract.Graph(name="layers", inputs=(x,), outputs=tuple(outputs))

    def axis(name: str | int) -> int | None:
        return DIM if name == "dim" else None

    g = GraphBuilder(graph.name)
    inputs, results = {"x": g.input(x, axis)}, {}
    for index, name in enumerate(names):
        torch.manual_seed(index)
        with g.scope(f"encoders.{index}"):
            layer = MixtureOfExperts(DIM, config)
            results[name] = feed_forward(g, inputs["x"], layer, config.activation, "feed_forward")
    return g.model(graph, inputs, results, axis, {})


def measure(tokens: Sequence[int] = TOKENS, num_bytes: int = NUM_BYTES, repetitions: int = 7) -> dict[str, Any]:
    """Rates of the machine; for each recipe and number of tokens the bound, and spreads of times, by `Layers.cases`."""
    layers = {name: Layers(name, num_bytes) for name in BITS}
    random = np.random.default_rng(0)
    inputs = {count: random.standard_normal((count, DIM), np.float32) for count in tokens}
    rates = measure_rates([num_bytes], 1, repetitions=repetitions)
    cases = {
        (name, count, key): call
        for count, x in inputs.items()
        for name, own in layers.items()
        for key, call in own.cases(x).items()
    }
    found = interleaved(cases, repetitions, title="layers")
    entries = {(name, count): own.bound(x, rates) for name, own in layers.items() for count, x in inputs.items()}
    for (name, count, key), seconds in found.items():
        entries[name, count][key] = Spread.of(seconds).data()
    return {"kernels": choose_kernels("auto", [CPU]).data(), "rates": rates, "layers": list(entries.values())}


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Native layers with experts in int4 beside those in int8, on each machine."""
    for where, content in results["machines"].items():
        native = {(item["recipe"], item["tokens"]): item.get("native_s") for item in content["layers"]}
        for count, limit in LIMITS.items():
            one, other = native.get((INT4, count)), native.get((INT8, count))
            if one and other:
                name, found = f"native layer of experts, int4 / int8, {count} tokens", one["median"] / other["median"]
                yield Target(name=name, where=where, found=found, limit=limit, at_most=True)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Values for the pages: a table for each machine, and int8 over its bound on the machine measured last."""
    machines = list(results["machines"].values())
    found = {"tables": "\n\n".join(line for content in reversed(machines) for line in _page(content))}
    for item in machines[-1]["layers"]:
        if item["recipe"] == INT8 and item["tokens"] in BOUNDS:
            least_s, count = item[BOUNDS[item["tokens"]]], item["tokens"]
            for name, key in (("ratio", "seconds"), ("native", "native_s")):
                if key in item:
                    found[f"{name}_at_{count}"] = f"{item[key]['median'] / least_s:.2f}"
    return found


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    rates = dict(content["rates"])
    integer, floats = (f"{best_rate(rates, kind) / 1e9:.0f}" for kind in ("integer", "float"))
    yield f"### {machine_key(content)}"
    yield (
        f"{measured(content)} {read_rate(rates, NUM_BYTES) / 1e9:.1f} GB/s, {integer} · 10^9 (integers) or "
        f"{floats} · 10^9 (float32) multiply-adds per second."
    )
    rows = []
    for item in content["layers"]:
        keys = ("seconds", "native_s")
        times = [quartiles(spread_of(item[key], 1e3)) if key in item else "" for key in keys]
        least = [f"{1e3 * item[key]:.2f}" for key in ("read_s", "arithmetic_s")]
        shares = [f"{item[key]['median'] / item['least_s']:.2f}" if key in item else "" for key in keys]
        rows.append([item["recipe"], item["tokens"], f"{item['experts']:.1f}", *times, *least, *shares])
    header = (
        "experts", "tokens", "with tokens", "onnxruntime, ms", "native, ms", "reading alone", "products alone",
        "onnxruntime / bound", "native / bound",
    )  # fmt: skip
    yield table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = study_parser("moe_layer", __doc__).parse_args(arguments)
    publish(args.results, measure(), values, per_machine=True)


if __name__ == "__main__":
    run_script(main)
