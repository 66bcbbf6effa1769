"""How near is one mixture of experts to the bound of the machine, by tokens per call and recipe?

    python -m u2moe.benchmarks.studies.moe_layer [--results FILE] [--tokens 1 16 250]

The layers are those of the preset moe-1b with seeded random weights, so that routing is nearly uniform, the worst case.
Several layers with separate weights take turns on one thread, so that no cache holds them, as in a network. The bound
is the larger of the time to read the weights of the experts with tokens and the time of their products, at the rates
that onnxruntime's kernels reach in the same run. No kernel reaches both at once, so the products of a layer are also
measured alone. The results file holds an entry for each kind of machine; a run replaces that of this machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch

from u2moe.benchmarks.instruments.rates import best_rate, measure_rates, read_rate
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, mean_seconds, spread_of
from u2moe.benchmarks.results.files import read_json, results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import machine_key, measured, measured_here
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.export.architecture import FeedForward
from u2moe.export.layers import feed_forward
from u2moe.export.moe import MixtureOfExperts
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.recipes import recipe
from u2moe.runtime.bundle import contract
from u2moe.runtime.graph.builder import CONTRIB, OPSET, GraphBuilder
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.model.native import CPU, choose_kernels
from u2moe.runtime.model.settings import SessionSettings

Array = npt.NDArray[Any]
FLOAT, INT8, INT4 = "fp32", "int8", "int4-experts"
BITS = {FLOAT: 32, INT8: 8, INT4: 4}  # of an expert's weight, by recipe
DIM, HIDDEN, NUM_EXPERTS, TOP_K = 576, 1920, 8, 2
TOKENS = (1, 4, 16, 64, 250)
"""16 tokens are a chunk of the encoder, 250 are ten seconds of audio."""
NUM_BYTES = 160_000_000  # of all weights that take turns: more than most last-level caches
CALL_S = 0.03  # at least, of one measurement
LIMITS = {
    16: ("read_s", "its memory-read bound", "reading its weights", 1.25),
    250: ("arithmetic_s", "its arithmetic bound", "its products", 1.0),
}
"""Of a layer in int8, by tokens: its bound, and the limit of native kernels over something else."""


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
        self._sessions = {"seconds": _session(model), "products_s": _session(products_graph(model, name))}
        if choose_kernels("auto", [CPU]).native and name != FLOAT:
            self._sessions["native_s"] = _session(model, "native")

    def cases(self, x: Array) -> dict[str, Callable[[], float]]:
        """What measures seconds of one layer for the tokens [tokens, dim], by name in the results."""
        rows = round(len(x) * TOP_K / self.touched(x))
        random = np.random.default_rng(0)
        products = {
            name: random.integers(0, 256, (rows, size), np.uint8)
            if self.recipe == INT8
            else random.standard_normal((rows, size), np.float32)
            for name, size in (("tokens", DIM), ("inner", HIDDEN))
        }
        shares = {"products_s": self.touched(x) / NUM_EXPERTS}  # of experts without tokens there are none
        return {
            name: partial(self._seconds, session, products if name in shares else {"x": x}, shares.get(name, 1.0))
            for name, session in self._sessions.items()
        }

    def _seconds(self, session: onnxruntime.InferenceSession, feeds: Mapping[str, Array], share: float) -> float:
        return share * mean_seconds(lambda: session.run(None, feeds), CALL_S) / len(self.gates)

    def touched(self, x: Array) -> float:
        """Number of experts with at least one token, averaged over the layers."""
        chosen = [np.argpartition(-(x @ gate), TOP_K - 1, axis=1)[:, :TOP_K] for gate in self.gates]
        return statistics.fmean(len(np.unique(experts)) for experts in chosen)

    def bound(self, x: Array, rates: Mapping[str, Any]) -> dict[str, Any]:
        """The bound for these tokens, and its components."""
        read_s = self.touched(x) * self.bytes_per_expert / read_rate(dict(rates), NUM_BYTES)
        rate = best_rate(dict(rates), "float" if self.recipe == FLOAT else "integer")
        arithmetic_s = len(x) * TOP_K * 2 * DIM * HIDDEN / rate
        return {
            "recipe": self.recipe, "tokens": len(x), "experts": self.touched(x), "read_s": read_s,
            "arithmetic_s": arithmetic_s, "least_s": max(read_s, arithmetic_s),
        }  # fmt: skip


def _session(model: ir.Model, kernels: str = "onnxruntime") -> onnxruntime.InferenceSession:
    options = SessionSettings(kernels=kernels).session_options()
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def moe_graph(num_layers: int) -> ir.Model:
    """A graph of `num_layers` layers on the same input "x" [tokens, dim], each with its own output."""
    config = FeedForward(
        kind="moe", hidden=HIDDEN, activation="swish", bias=True, num_experts=NUM_EXPERTS, num_experts_per_token=TOP_K
    )
    names = [f"y{index}" for index in range(num_layers)]
    x, *outputs = (contract.Tensor(name=name, dtype="float32", axes=("tokens", "dim")) for name in ("x", *names))
    graph = contract.Graph(name="layers", inputs=(x,), outputs=tuple(outputs))

    def axis(name: str) -> int | None:
        return DIM if name == "dim" else None

    g = GraphBuilder(graph.name)
    inputs, results = {"x": g.input(x, axis)}, {}
    for index, name in enumerate(names):
        torch.manual_seed(index)
        with g.scope(f"encoders.{index}"):
            layer = MixtureOfExperts(DIM, config)
            results[name] = feed_forward(g, inputs["x"], layer, config.activation, "feed_forward")
    return g.model(graph, inputs, results, axis, {})


def products_graph(model: ir.Model, name: str) -> ir.Model:
    """Only the products of all experts, of "tokens" [rows, dim] and "inner" [rows, hidden]; each is an output."""
    dtype = ir.DataType.UINT8 if name == INT8 else ir.DataType.FLOAT
    tokens, inner = ir.val("tokens", dtype, ("rows", DIM)), ir.val("inner", dtype, ("rows", HIDDEN))
    constants: dict[str, Array] = {"one": np.array(1, np.float32), "middle": np.array(128, np.uint8)}
    one, middle = (ir.val(key, const_value=ir.tensor(value, name=key)) for key, value in constants.items())
    initializers, nodes = [one, middle], []
    for key, value in model.graph.initializers.items():
        stem, _, kind = key.rpartition(".")
        if group_of(value) != "experts" or kind not in ("int8", "int4", "weight"):
            continue
        found = [value] if kind == "weight" else [value, model.graph.initializers[f"{stem}.scale"]]
        own = [ir.val(str(each.name), const_value=each.const_value) for each in found]
        initializers += own
        x, size = (tokens, (DIM, HIDDEN)) if ".w_1." in key else (inner, (HIDDEN, DIM))
        if name == INT4:
            block = recipe(name).block_size
            attributes = {"K": size[0], "N": size[1], "bits": 4, "block_size": block, "accuracy_level": 4}
            node = ir.node("MatMulNBits", [x, *own], attributes, domain=CONTRIB)
        elif name == INT8:
            node = ir.node("MatMulIntegerToFloat", [x, own[0], one, own[1], middle], domain=CONTRIB)
        else:
            node = ir.node("MatMul", [x, *own])
        node.outputs[0].name, node.outputs[0].type = f"{key}.product", ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
    used = [value for value in initializers if value.uses()]
    opsets, outputs = {"": OPSET, CONTRIB: 1}, [node.outputs[0] for node in nodes]
    graph = ir.Graph([tokens, inner], outputs, nodes=nodes, initializers=used, opset_imports=opsets, name="products")
    return ir.Model(graph, ir_version=model.ir_version)


def measure(tokens: Sequence[int], num_bytes: int = NUM_BYTES, repetitions: int = 7) -> dict[str, Any]:
    """Rates of the machine; for each recipe and number of tokens the bound, and spreads of times, by `Layers.cases`."""
    layers = {name: Layers(name, num_bytes) for name in BITS}
    random = np.random.default_rng(0)
    inputs = {count: random.standard_normal((count, DIM), np.float32) for count in tokens}
    rates = measure_rates([num_bytes], 1, repetitions=repetitions, progress=report)
    cases = {
        (name, count, key): call
        for count, x in inputs.items()
        for name, own in layers.items()
        for key, call in own.cases(x).items()
    }
    found = interleaved(cases, repetitions, title="layers", progress=report)
    entries = {(name, count): own.bound(x, rates) for name, own in layers.items() for count, x in inputs.items()}
    for (name, count, key), seconds in found.items():
        entries[name, count][key] = Spread.of(seconds).data()
    return {"kernels": choose_kernels("auto", [CPU]).data(), "rates": rates, "layers": list(entries.values())}


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """A layer in int8 against its bounds, on each machine: on onnxruntime, and with native kernels."""
    for where, content in results["machines"].items():
        for item in content["layers"]:
            if item["recipe"] == INT8 and item["tokens"] in LIMITS:
                count = item["tokens"]
                key, bound, other, limit = LIMITS[count]
                name = f"{where}: MoE layer at {count} tokens / {bound}"
                yield Target(name=name, found=spread_of(item["seconds"], 1 / item[key]), limit=1.15, at_most=True)
                unit = item["products_s"]["median"] if count == 250 else item[key]
                limit = 0.6 if content["kernels"]["isa"] == "amx" and count == 250 else limit
                name = f"{where}: native MoE layer at {count} tokens / {other}"
                if "native_s" in item:
                    yield Target(name=name, found=spread_of(item["native_s"], 1 / unit), limit=limit, at_most=True)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a table for each machine, and the layers of the targets on the machine measured last."""
    *_, last = results["machines"].values()
    found = {"tables": "\n\n".join(line for content in results["machines"].values() for line in _page(content))}
    for item in last["layers"]:
        if item["recipe"] == INT8 and item["tokens"] in LIMITS:
            least_s, count = item[LIMITS[item["tokens"]][0]], item["tokens"]
            found[f"ratio_at_{count}"] = f"{item['seconds']['median'] / least_s:.2f}"
            found[f"products_at_{count}"] = f"{item['products_s']['median'] / least_s:.2f}"
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
        keys = ("seconds", "products_s", "native_s")
        times = [quartiles(spread_of(item[key], 1e3)) if key in item else "" for key in keys]
        least = [f"{1e3 * item[key]:.2f}" for key in ("read_s", "arithmetic_s")]
        shares = [f"{item[key]['median'] / item['least_s']:.2f}" if key in item else "" for key in keys[::2]]
        rows.append([item["recipe"], item["tokens"], f"{item['experts']:.1f}", *times, *least, *shares])
    header = ("experts", "tokens", "with tokens", "layer, ms", "products", "native", "read", "arithmetic",
              "layer / bound", "native / bound")  # fmt: skip
    yield table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.moe_layer", __doc__)
    parser.add_argument("--results", type=Path, metavar="JSON", help="file for the results")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    args = parser.parse_args(arguments)
    content = {**measured_here(), **measure(args.tokens)}
    file = args.results or results_file("moe_layer")
    machines = {**read_json(file).get("machines", {}), machine_key(content): content}
    write_json(file, {**measured_here(), "machines": machines})
    print("\n\n".join(_page(content)))


if __name__ == "__main__":
    run_script(main)
