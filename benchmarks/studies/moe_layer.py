"""How close does one mixture of experts come to the machine's limit, by recipe and tokens per call?

    python -m u2moe.benchmarks.studies.moe_layer [--narrow]

docs/results/speed.md explains the method. Random weights spread tokens evenly, which is the worst case.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch

from u2moe.benchmarks.bench.terminal import spread
from u2moe.benchmarks.instruments.rates import best_rate, measure_rates, read_rate, session_of
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, mean_seconds
from u2moe.benchmarks.results.files import machine_key, measured, measured_here, publish, read_json, tables_by_machine
from u2moe.benchmarks.results.markdown import Target, table
from u2moe.benchmarks.studies.shared.script import script, study_parser
from u2moe.export.architecture import FeedForward
from u2moe.export.layers import feed_forward
from u2moe.export.moe import MixtureOfExperts
from u2moe.quantize.passes import quantize_graph
from u2moe.quantize.recipes import recipe
from u2moe.runtime.bundle import contract
from u2moe.runtime.graph.builder import GraphBuilder, build_model
from u2moe.runtime.graph.file import group_of
from u2moe.runtime.model.native import CPU, choose_kernels

Array = npt.NDArray[Any]
FLOAT, INT8, INT4 = "fp32", "int8", "int4-experts"
BITS = {FLOAT: 32, INT8: 8, INT4: 4}  # bits per expert weight, by recipe
DIM = 576
TOKENS = (1, 4, 16, 64, 250)  # 16 are a chunk of the encoder, and 250 are ten seconds of audio
NUM_BYTES = 160_000_000  # of all weights together; exceeds most last-level caches
CALL_S = 0.03  # minimum seconds of a measurement
CHUNK = 16
BOUNDS = {CHUNK: "read_s", 250: "arithmetic_s"}  # key of the bound of an int8 layer, by number of tokens
LIMITS = {CHUNK: 0.7, 250: 1.03}  # maximum ratio of the native times of int4 and int8, by number of tokens
RATE = 0.9  # minimum rate at which native kernels read narrow experts for a chunk / the paper's experts


class Shape(NamedTuple):
    """Number of experts in a layer, number of experts that process a token, and hidden units of an expert."""

    experts: int
    top_k: int
    hidden: int


PAPER, NARROW = Shape(8, 2, 1920), (Shape(16, 2, 960), Shape(32, 4, 480))


class Layers:
    """Expert layers that run in turn, with random weights of at least `num_bytes`, in the format of a recipe."""

    def __init__(self, name: str, num_bytes: int, shape: Shape) -> None:
        model = moe_graph(max(1, -(-num_bytes * 8 // (2 * shape.experts * DIM * shape.hidden * BITS[name]))), shape)
        if name != FLOAT:
            quantize_graph(model, recipe(name))
        self.recipe, self.shape = name, shape
        weights = [(group_of(value), value.const_value) for value in model.graph.initializers.values()]
        self.gates = [tensor.numpy() for group, tensor in weights if group == "routers" and tensor is not None]
        experts = sum(tensor.nbytes for group, tensor in weights if group == "experts" and tensor is not None)
        self.bytes_per_expert = experts / (len(self.gates) * shape.experts)
        content = ir.to_proto(model).SerializeToString()
        self._sessions = {"seconds": session_of(content, "onnxruntime")}
        if choose_kernels("auto", [CPU]).native and name != FLOAT:
            self._sessions["native_s"] = session_of(content, "native")

    def cases(self, x: Array) -> dict[str, Callable[[], float]]:
        """Return functions by result name. Each measures how many seconds one layer takes for `x` [tokens, dim]."""
        return {name: partial(self._seconds, session, x) for name, session in self._sessions.items()}

    def _seconds(self, session: onnxruntime.InferenceSession, x: Array) -> float:
        return mean_seconds(lambda: session.run(None, {"x": x}), CALL_S) / len(self.gates)

    def touched(self, x: Array) -> float:
        """Return the number of experts that get at least one token, averaged over the layers."""
        top_k = self.shape.top_k
        chosen = [np.argpartition(-(x @ gate), top_k - 1, axis=1)[:, :top_k] for gate in self.gates]
        return statistics.fmean(len(np.unique(experts)) for experts in chosen)

    def bound(self, x: Array, rates: Mapping[str, Any]) -> dict[str, Any]:
        """Return two lower bounds on a layer's time for `x` [tokens, dim], and the larger of them, in seconds."""
        touched, rate = self.touched(x), best_rate(rates, "float" if self.recipe == FLOAT else "integer")
        read_s = touched * self.bytes_per_expert / read_rate(rates, NUM_BYTES)
        arithmetic_s = len(x) * self.shape.top_k * 2 * DIM * self.shape.hidden / rate
        about = {"recipe": self.recipe, "shape": self.shape, "tokens": len(x), "experts": touched}
        return {**about, "read_s": read_s, "arithmetic_s": arithmetic_s, "least_s": max(read_s, arithmetic_s)}


def moe_graph(num_layers: int, shape: Shape) -> ir.Model:
    """Return a graph of layers that share the input "x" [tokens, dim]. Each layer has its own output."""
    experts = {"num_experts": shape.experts, "num_experts_per_token": shape.top_k}
    config = FeedForward(kind="moe", hidden=shape.hidden, activation="swish", bias=True, **experts)
    names = [f"y{index}" for index in range(num_layers)]
    x, *outputs = (contract.Tensor(name=name, dtype="float32", axes=("tokens", "dim")) for name in ("x", *names))
    graph = contract.Graph(name="layers", inputs=(x,), outputs=tuple(outputs))

    def axis(name: str | int) -> int | None:
        return DIM if name == "dim" else None

    def layers(g: GraphBuilder, inputs: dict[str, ir.Value]) -> dict[str, ir.Value]:
        results = {}
        for index, name in enumerate(names):
            torch.manual_seed(index)
            with g.scope(f"encoders.{index}"):
                layer = MixtureOfExperts(DIM, config)
                results[name] = feed_forward(g, inputs["x"], layer, config.activation, "feed_forward")
        return results

    return build_model(graph, axis, {}, layers)


def measure(
    tokens: Sequence[int] = TOKENS,
    num_bytes: int = NUM_BYTES,
    repetitions: int = 7,
    *,
    shapes: Sequence[Shape] = (PAPER,),
    recipes: Sequence[str] = tuple(BITS),
) -> dict[str, Any]:
    """Measure the machine's rates and each layer's time for each number of tokens. Compute bounds on the times."""
    random = np.random.default_rng(0)
    inputs = [random.standard_normal((count, DIM), np.float32) for count in tokens]
    layers = [Layers(name, num_bytes, shape) for name in recipes for shape in shapes]
    pairs = [(own, x) for own in layers for x in inputs]
    rates = measure_rates([num_bytes], 1, repetitions=repetitions)
    entries = [own.bound(x, rates) for own, x in pairs]
    cases = {(number, key): call for number, pair in enumerate(pairs) for key, call in pair[0].cases(pair[1]).items()}
    for (number, key), seconds in interleaved(cases, repetitions, title="layers").items():
        entries[number][key] = Spread.of(seconds).data()
    return {"kernels": choose_kernels("auto", [CPU]).data(), "rates": rates, "layers": entries}


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Yield each machine's limits: the time of int4 experts relative to int8, and the read rate of narrow experts."""
    for where, content in results["machines"].items():
        native = {(item["recipe"], item["tokens"]): item.get("native_s") for item in content["layers"]}
        for count, limit in LIMITS.items():
            one, other = native.get((INT4, count)), native.get((INT8, count))
            if one and other:
                name, found = f"time of native experts, int4 / int8, {count} tokens", one["median"] / other["median"]
                yield Target(name=name, where=where, found=found, limit=limit, at_most=True)
        for item, wide in _narrow(content):
            name = f"bytes per second of native {item['recipe']}, {_title(item)} / {_title(wide)}, {CHUNK} tokens"
            yield Target(name=name, where=where, found=_rate(item, wide, "read_s"), limit=RATE, at_most=False)


def _narrow(content: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield each narrow layer measured on native kernels, paired with the paper's layer of the same run and recipe."""
    items = [item for item in content.get("narrow", {"layers": []})["layers"] if "native_s" in item]
    wide = {item["recipe"]: item for item in items if tuple(item["shape"]) == PAPER}
    yield from ((item, wide[item["recipe"]]) for item in items if item not in wide.values())


def _rate(item: Mapping[str, Any], wide: Mapping[str, Any], work: str) -> float:
    """Return the native kernels' rate of `work` ("read_s" or "arithmetic_s") for `item`, divided by that for `wide`."""
    one, other = (each[work] / each["native_s"]["median"] for each in (item, wide))
    return float(one / other)


def _title(item: Mapping[str, Any]) -> str:
    return "{}x{}x{}".format(*item["shape"])


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: a table per machine, and the ratios of int8 times to bounds on the first machine."""
    found = {"tables": tables_by_machine(results, _page)}
    for item in next(iter(results["machines"].values()))["layers"]:
        if item["recipe"] == INT8 and item["tokens"] in BOUNDS:
            least_s, count = item[BOUNDS[item["tokens"]]], item["tokens"]
            for name, key in (("ratio", "seconds"), ("native", "native_s")):
                if key in item:
                    found[f"{name}_at_{count}"] = f"{item[key]['median'] / least_s:.2f}"
    return found


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    rates = content["rates"]
    integer, floats = (f"{best_rate(rates, kind) / 1e9:.0f} · 10^9" for kind in ("integer", "float"))
    products = f"{integer} (integers) or {floats} (float32) multiply-adds per second."
    yield f"{measured(content)} {read_rate(rates, NUM_BYTES) / 1e9:.1f} GB/s, {products}"
    rows = []
    for item in content["layers"]:
        keys = ("seconds", "native_s")
        shown = [spread(item[key], 1e3, 2) if key in item else "" for key in keys]
        shown += [f"{1e3 * item[key]:.2f}" for key in ("read_s", "arithmetic_s")]
        shown += [f"{item[key]['median'] / item['least_s']:.2f}" if key in item else "" for key in keys]
        rows.append([item["recipe"], item["tokens"], f"{item['experts']:.1f}", *shown])
    times = ("onnxruntime, ms", "native, ms", "reading, ms", "products, ms", "onnxruntime / bound", "native / bound")
    yield table(("recipe", "tokens", "experts used", *times), rows)
    if "narrow" not in content:
        return
    yield f"Narrow experts compared with the paper's. {measured(content['narrow'])}"
    rows = []
    for item, wide in _narrow(content):
        allowed = item["arithmetic_s"] / item["least_s"] / (wide["arithmetic_s"] / wide["least_s"])
        ratios = [_rate(item, wide, "read_s"), _rate(item, wide, "arithmetic_s"), allowed]
        cells = [1e3 * each["native_s"]["median"] for each in (item, wide)] + ratios
        rows.append([item["recipe"], _title(item), f"{item['experts']:.1f}", *(f"{each:.2f}" for each in cells)])
    header = (f"native kernels, {CHUNK} tokens", "layer", "experts used", "ms", f"{_title({'shape': PAPER})}, ms")
    of_rates = ("ratio of bytes/s", "ratio of products/s", "ratio of products/s at the bounds")
    yield table((*header, *of_rates), rows)


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("moe_layer", __doc__)
    about = "compare with layers of more but narrower experts, for one chunk per call"
    parser.add_argument("--narrow", action="store_true", help=about)
    args = parser.parse_args(arguments)
    own = measured_here()
    own |= measure((CHUNK,), shapes=(PAPER, *NARROW), recipes=(INT8, INT4)) if args.narrow else measure()
    kept = read_json(args.results).get("machines", {}).get(machine_key(own), {})
    found = {**own, "layers": [], **kept, "narrow": own} if args.narrow else {**kept, **own}
    publish(args.results, found, values, per_machine=True)
