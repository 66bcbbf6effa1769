"""The kernels that onnxruntime runs for a bundle, each with its time, part of the model, and number of multiply-adds.

Multiply-adds are counted from the shapes in onnxruntime's profile. Experts without tokens, and products that a graph
rewrite removed, therefore count as 0.
"""

import gc
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from u2moe.runtime import Bundle, Kernels, Model, SessionSettings
from u2moe.runtime.model.session import Session

PARTS = ("subsampling", "feed_forward", "attention", "convolution", "ctc", "decoder", "other")
"""Parts of a model. `feed_forward` includes experts and routers, `other` caches and operators between the blocks."""

_SCOPES = (
    ("subsampling", ("encoder/embed", "encoder/global_cmvn")),
    ("feed_forward", ("MixtureOfExperts", "feed_forward", "norm_ff")),
    ("attention", ("self_attn", "norm_mha", "position", "encoder/frames", "norm1")),
    ("convolution", ("conv_module", "norm_conv")),
)
"""Parts of the encoder, each with substrings of the names of its nodes. The first match decides."""

_INTEGER = {"MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulNBits"}
_FLOAT = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
_CONVOLUTIONS = {"Conv", "FusedConv"}
PRODUCTS = _INTEGER | _FLOAT | _CONVOLUTIONS  # operators whose multiply-adds are counted
UNCOUNTED = {"Attention", "ConvInteger", "ConvTranspose", "Einsum", "GroupQueryAttention", "MoE", "MultiHeadAttention"}
UNCOUNTED |= {"QGemm", "QLinearConv", "QLinearMatMul", "QMoE"}  # operators that multiply but cannot be counted
_ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}
_INT4_BLOCK = 32
_FEWEST_TERMS = 4  # least inner dimension of a product; smaller ones only add up values, as of experts

Shape = tuple[int, ...]
Site = tuple[str, str]  # operator of a node, and the name of the node, or of its function call, in the main graph
Run = Callable[[Model], object]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One run of one node."""

    name: str  # of the node in onnxruntime
    scope: str  # name of the node, or of the function call that contains it, in the main graph
    op_type: str
    part: str  # one of `PARTS`
    seconds: float  # from onnxruntime's profiler, including the profiler's overhead. Use it only as a share.
    multiply_adds: int = 0  # of a matrix product or convolution; otherwise 0
    num_bytes: int = 0  # of the right-hand matrix (weights, or keys or values in attention); 0 without multiply-adds
    integer: bool = False  # whether the factors are integers
    parameter_bytes: int = 0  # of the constants that the node reads, except those that onnxruntime packed earlier


def profile(
    bundle: Bundle, run: Run, kernels: Mapping[str, Kernels], *, num_threads: int = 1, repetitions: int = 3
) -> list[list[Kernel]]:
    """Profile several runs after a warm-up run. Return the `Kernel` records, one list per run.

    `run` must do the same work every time. Graphs without native `kernels`, by name, use only onnxruntime.
    Multiply-adds inside native kernels cannot be counted. `num_threads` are threads within one operator.
    """
    settings = SessionSettings(num_threads=num_threads, kernels="onnxruntime")
    found = profiled_events(bundle, settings, lambda model: [run(model) for _ in range(repetitions + 1)], kernels)
    rounds: list[list[Kernel]] = [[] for _ in range(repetitions)]
    encoder = bundle.manifest.model.graphs()[0]
    native = kernels.get(encoder.name)
    sites = call_sites(bundle.path / encoder.file, native.replaces if native else lambda _: False)
    for events in found.values():
        every = list(read_events(events, sites))
        size = len(every) // (repetitions + 1)
        for number, own in enumerate(rounds, start=1):
            own.extend(every[number * size : (number + 1) * size])
    return rounds


def profiled_events(
    bundle: Bundle, settings: SessionSettings, run: Run, kernels: Mapping[str, Kernels]
) -> dict[str, list[dict[str, Any]]]:
    """Call `run` with a model whose sessions are profiled. Return the events of each graph's kernels, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        sessions, found = [], {}
        for number, graph in enumerate(bundle.manifest.model.graphs()):
            options = settings.session_options(kernels.get(graph.name))
            options.enable_profiling = True
            # onnxruntime adds the time in milliseconds, which may be the same for several small graphs.
            options.profile_file_prefix = f"{folder}/{number}_{graph.name}"
            own = replace(settings, sess_options=options, num_threads=None, kernels=None)
            sessions.append(Session(bundle.path / graph.file, graph, bundle.manifest, own))
        run(Model(bundle.manifest, sessions[0], sessions[1], sessions[2] if len(sessions) > 2 else None))
        del sessions
        gc.collect()  # a session writes its profile when it is destroyed
        for file in sorted(Path(folder).iterdir()):
            with file.open(
                encoding="utf-8"
            ) as lines:  # one by one, because a profile may be too large to parse at once
                events = [json.loads(line.strip().strip(",[]")) for line in lines if '"Node"' in line]
            found[file.name.split("_")[1]] = events
    return found


def call_sites(file: Path, replaces: Callable[[str], bool]) -> list[Site]:
    """Return a `Site` for each node, in the order of onnxruntime's node indices.

    Nodes of the main graph come first. onnxruntime inlines function calls: it appends the nodes of the functions in the
    order of the calls, level by level, and gives them meaningless names. Constants become initializers, which have no
    index. Functions that native kernels compute (`replaces`) are not inlined.
    """
    import onnx_ir as ir  # noqa: PLC0415 - needs the extra tools

    model = ir.load(file)
    nodes = [(node, str(node.name)) for node in model.graph if node.op_type != "Constant"]
    for node, name in nodes:  # the list grows during the loop
        function = None if replaces(node.op_type) else model.functions.get(node.op_identifier())
        nodes += [(inner, name) for inner in function or () if inner.op_type != "Constant"]
    return [(node.op_type, name) for node, name in nodes]


def read_events(events: Sequence[Mapping[str, Any]], sites: Sequence[Site] = ()) -> Iterator[Kernel]:
    """Yield the kernels of one graph from the node events of onnxruntime's profile, in order of execution.

    Nodes without a meaningful name are looked up in `sites`, the result of `call_sites` for the encoder. A node that
    onnxruntime created during optimisation belongs to the same part of the encoder as the preceding node.
    """
    names = [str(event["name"]).removesuffix("_kernel_time") for event in events]
    graph = next((graph for graph in ("ctc", "decoder") if any(name.startswith(f"{graph}/") for name in names)), None)
    part = graph or "other"
    for name, event in zip(names, events, strict=True):
        arguments = event["args"]
        op_type, inputs = str(arguments["op_name"]), _shapes(arguments.get("input_type_shape", []))
        index, scope = int(arguments.get("node_index", len(sites))), name
        if part_of(name) is None and index < len(sites) and sites[index][0] == op_type:
            scope = sites[index][1]
        part = graph or part_of(scope) or part
        counts = _product(op_type, inputs, _shapes(arguments.get("output_type_shape", [])))
        counts["parameter_bytes"] = int(arguments.get("parameter_size", 0))
        yield Kernel(name=name, scope=scope, op_type=op_type, part=part, seconds=event["dur"] / 1e6, **counts)


def part_of(name: str) -> str | None:
    """Return the part of the encoder that contains the node `name`; None if unknown."""
    for part, words in _SCOPES:
        if any(word in name for word in words):
            return part
    return "other" if name.startswith(("encoder/", "outputs/")) else None


def _shapes(entries: Sequence[Mapping[str, Sequence[int]]]) -> list[tuple[str, Shape]]:
    return [(kind, tuple(shape)) for entry in entries for kind, shape in entry.items()]


def _product(op_type: str, inputs: list[tuple[str, Shape]], outputs: list[tuple[str, Shape]]) -> dict[str, Any]:
    """Count the work of a matrix product [..., m, k] x [..., k, n] -> [..., m, n], or of a convolution."""
    # The kernel may transpose either matrix. The inputs lack the right-hand matrix if onnxruntime packed it.
    if op_type in _CONVOLUTIONS:
        (kind, weight), out = inputs[1], outputs[0][1]
        return _counts(math.prod(out) * math.prod(weight[1:]), math.prod(weight) * _ELEMENT_BYTES.get(kind, 4))
    if op_type not in _INTEGER | _FLOAT:
        return {}
    (kind, left), out = inputs[0], outputs[0][1]
    rows, columns = math.prod(out[-2:-1]), out[-1]
    inner = math.prod(left[-2:]) // rows if rows else left[-1]
    if inner < _FEWEST_TERMS:
        return {}
    size = inner * columns
    right = next((shape for _, shape in inputs[1:] if len(shape) > 1 and shape[-2] * shape[-1] == size), ())
    num_bytes: float = max(math.prod(right), size) * _ELEMENT_BYTES.get(kind, 4)
    if op_type == "MatMulNBits":  # weights [n, blocks, bytes] if listed, otherwise 4 bits each; and scales
        packed = next((math.prod(shape) for kind, shape in inputs[1:] if kind == "uint8" and len(shape) == 3), size / 2)
        num_bytes = packed + 4 * size / _INT4_BLOCK
    elif op_type in _INTEGER:
        num_bytes = size
    return _counts(math.prod(out) * inner, round(num_bytes), integer=op_type in _INTEGER)


def _counts(multiply_adds: int, num_bytes: int, *, integer: bool = False) -> dict[str, Any]:
    return {"multiply_adds": multiply_adds, "num_bytes": num_bytes if multiply_adds else 0, "integer": integer}
