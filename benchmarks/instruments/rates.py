"""Rates at which this machine multiplies numbers and reads memory, measured with small generated models in onnxruntime.

If native kernels are installed, reading is also measured with them, because they use huge pages and prefetching.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime import InferenceSession

from u2moe.benchmarks.instruments.host import memory_bytes
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, mean_seconds
from u2moe.runtime.bundle import contract
from u2moe.runtime.model.native import CPU, choose_kernels
from u2moe.runtime.model.settings import SessionSettings

Array = npt.NDArray[Any]

KERNELS = {"integer": "MatMulIntegerToFloat", "float": "MatMul"}
"""Operators to measure, with uint8 tokens and int8 weights that have a scale per column, and with float32 numbers."""
NATIVE = "Int8Linear"
PRODUCTS = ((64, 512, 512), (256, 256, 256), (256, 512, 512), (512, 1024, 1024))  # [rows, in, out], fit into the cache
BEYOND_CACHE = 640_000_000  # bytes of weights that no cache can hold
_WIDTH, _MATRIX = 1024, 4 * 1024 * 1024  # rows of a weight matrix, and its bytes
_WEIGHTS_PER_SESSION = 16
_CALL_S = 0.05  # minimum duration of one measurement in seconds


def measure_rates(footprints: Sequence[int], num_threads: int, *, repetitions: int = 5) -> dict[str, Any]:
    """Measure the rates of the machine on one or more threads. Every round measures all cases in turn.

    `footprints` are the bytes of weights that each bundle reads repeatedly, limited by `readable`. For reads, weights
    are multiplied by a single row (a token), so that reading limits the speed. The higher of two rates counts: float32
    weights with onnxruntime, and int8 weights with native kernels. docs/bench.md explains the result.
    """
    random = np.random.default_rng(0)
    cases: dict[tuple[str, Any], Callable[[], float]] = {}
    for kind, op_type in KERNELS.items():
        types = ("int8", "uint8") if kind == "integer" else ("float32", "float32")
        for rows, inner, columns in PRODUCTS:
            model = product_model(op_type, [_drawn(random, types[0], inner, columns)])
            session = session_of(model, "onnxruntime", num_threads)
            x = _drawn(random, types[1], rows, inner)
            cases[kind, (rows, inner, columns)] = partial(_rate, [session], x, rows * inner * columns)
    for size in sorted({readable(footprint) for footprint in footprints}):
        for kernels in ("onnxruntime", *(["native"] if choose_kernels("auto", [CPU]).native else [])):
            sessions = _stream(random, size, num_threads, kernels)
            cases[kernels, size] = partial(_rate, sessions, _drawn(random, "float32", 1, _WIDTH), size)
    measured = interleaved(cases, repetitions, title=f"rates, threads: {num_threads}")
    result: dict[str, Any] = {"threads": num_threads, "multiply_adds_per_s": {}, "read_bytes_per_s": {}}
    for kind, op_type in KERNELS.items():
        sizes = {" x ".join(map(str, size)): Spread.of(measured[kind, size]).data() for size in PRODUCTS}
        best = max(sizes, key=lambda size: sizes[size]["median"])
        result["multiply_adds_per_s"][kind] = {"operator": op_type, "sizes": sizes, "best": best}
    for (kind, size), values in measured.items():
        if kind not in KERNELS:
            own, best = Spread.of(values).data(), result["read_bytes_per_s"].get(str(size))
            result["read_bytes_per_s"][str(size)] = max(own, best or own, key=lambda spread: spread["median"])
    return result


def readable(footprint: int) -> int:
    """Return `footprint`, limited to `BEYOND_CACHE` and a quarter of free memory, in whole weight matrices."""
    limit = min(BEYOND_CACHE, (memory_bytes("MemAvailable") or 4 * BEYOND_CACHE) // 4)
    return max(min(footprint, limit) // _MATRIX, 1) * _MATRIX


def best_rate(rates: Mapping[str, Any], kind: str) -> float:
    """Return the multiply-adds per second of "integer" or "float" products, for the fastest size."""
    found = rates["multiply_adds_per_s"][kind]
    return float(found["sizes"][found["best"]]["median"])


def read_rate(rates: Mapping[str, Any], footprint: int) -> float:
    """Return the bytes of weights read per second, for the measured size nearest to `footprint`."""
    found = rates["read_bytes_per_s"]
    nearest = min(found, key=lambda size: abs(int(size) - footprint))
    return float(found[nearest]["median"])


def _stream(random: np.random.Generator, size: int, num_threads: int, kernels: str) -> list[InferenceSession]:
    """Return sessions whose weights total `size` bytes. `size` must be a result of `readable`."""
    dtype, op_type, columns = ("int8", NATIVE, 4 * _WIDTH) if kernels == "native" else ("float32", "MatMul", _WIDTH)
    weight, numbers = _drawn(random, dtype, _WIDTH, columns), range(size // _MATRIX)
    sessions = []
    for start in numbers[::_WEIGHTS_PER_SESSION]:
        # Weights must differ, because onnxruntime might share identical ones.
        weights = [np.roll(weight, index, axis=0) for index in numbers[start : start + _WEIGHTS_PER_SESSION]]
        sessions.append(session_of(product_model(op_type, weights), kernels, num_threads))
    return sessions


def _drawn(random: np.random.Generator, dtype: str, rows: int, columns: int) -> Array:
    """Return random numbers [rows, columns] of a type. int8 excludes -128."""
    if dtype == "float32":
        return random.standard_normal((rows, columns), np.float32)
    least, limit = (0, 256) if dtype == "uint8" else (-127, 128)
    return random.integers(least, limit, (rows, columns), dtype)


def session_of(content: bytes, kernels: str, num_threads: int = 1) -> InferenceSession:
    """Return a session for the content of an ONNX file."""
    options = SessionSettings(num_threads=num_threads, kernels=kernels).session_options()
    return InferenceSession(content, options, providers=[CPU])


def _rate(sessions: Sequence[InferenceSession], x: Array, amount: int) -> float:
    """Return the work per second. `amount` is the work of one round, which runs every session once."""
    return amount / mean_seconds(lambda: [session.run(None, {"x": x}) for session in sessions], _CALL_S)


def product_model(op_type: str, weights: Sequence[Array]) -> bytes:
    """Return an ONNX model as bytes. "y" [rows, out] is the sum of the products of "x" [rows, in] and each weight.

    `op_type` is "MatMul" for float32 weights [in, out]. For int8 weights with a scale per column, as in quantized
    bundles, it is "MatMulIntegerToFloat", which takes uint8 x with zero point 128, or the native operator `NATIVE`.
    """
    import onnx_ir as ir  # noqa: PLC0415 - needs the extra tools

    from u2moe.runtime.graph.builder import CONTRIB, GraphBuilder, build_model  # noqa: PLC0415

    inner, columns = weights[0].shape
    is_integer = op_type == KERNELS["integer"]
    x = contract.Tensor(name="x", dtype="uint8" if is_integer else "float32", axes=("rows", inner))
    y = contract.Tensor(name="y", dtype="float32", axes=("rows", columns))
    graph = contract.Graph(name="product", inputs=(x,), outputs=(y,))
    scale = np.full(columns, 1e-4, np.float32)

    def product(g: GraphBuilder, tokens: ir.Value, weight: Array) -> ir.Value:
        if is_integer:
            more = (np.array(1 / 127, np.float32), scale, np.array(128, np.uint8))
            return g.op(op_type, tokens, weight, *more, domain=CONTRIB)
        if op_type == NATIVE:
            return g.op(op_type, tokens, weight, scale, domain=contract.MOE_DOMAIN, activation="")
        return g.op(op_type, tokens, weight)

    def total(g: GraphBuilder, inputs: dict[str, ir.Value]) -> dict[str, ir.Value]:
        return {"y": g.op("Sum", *(product(g, inputs["x"], weight) for weight in weights))}

    content = build_model(graph, lambda axis: axis if isinstance(axis, int) else None, {}, total)
    return bytes(ir.to_proto(content).SerializeToString())
