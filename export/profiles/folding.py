"""Folds graphs of fixed shape: computes constants, removes nodes without effect, and checks the result."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass

from u2moe.export.comparison import Array
from u2moe.export.joining import inlined
from u2moe.export.profiles.conversion import ONE_FILE_LIMIT
from u2moe.runtime.errors import UnsupportedError
from u2moe.runtime.graph.file import save_graph

OPSET = 17  # the newest opset that all NPU compilers read
LARGEST = 65_504.0  # the largest finite float16 number
MOST_AXES = 4
OPERATORS = frozenset({
    "Add", "Sub", "Mul", "Div", "MatMul", "Conv", "Sqrt", "Max", "Min", "ReduceMean", "ReduceSum", "ReduceMin",
    "Relu", "Sigmoid", "Tanh", "Erf", "Clip", "Selu", "Softmax", "LogSoftmax", "LayerNormalization",
    "Concat", "Split", "Slice", "Reshape", "Transpose", "Unsqueeze", "Squeeze",
})  # fmt: skip
"""Operators that NPU compilers are known to support. Others, such as If, Loop, Range, TopK, Gather, Where, Cast and
Pad, are refused."""
_SHARED = 1 << 24  # equal constants of up to this many elements are shared
_COPIES = ("Identity", "Slice", "Pad", "Expand", "Reshape", "Concat")  # they change nothing if the shape stays the same
_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}


def folded(model: ir.Model) -> ir.Model:
    """Fold the model: inline functions, turn values that depend on no input into constants, and declare opset `OPSET`.

    The shapes of the inputs must be fixed. onnxruntime computes each value once, without optimisations. For values that
    depend on an input, only the shapes are recorded.
    """
    graph = inlined(model).graph
    arrays = _computed(model)
    variable = set(graph.inputs)
    for node in list(graph):
        if node.op_type not in ("Shape", "Size") and variable & set(node.inputs):
            for value in node.outputs:
                variable.add(value)
                value.shape = ir.Shape(arrays[str(value.name)].shape)
                value.dtype = ir.DataType.from_numpy(arrays[str(value.name)].dtype)
    for node in list(graph):
        if node.outputs[0] in variable:
            for index, found in enumerate(node.inputs):
                if found is not None and found not in variable and found.const_value is None:
                    node.replace_input_with(index, _constant(graph, f"{found.name}/constant", arrays[str(found.name)]))
            _simplify(graph, node)
    for output in list(graph.outputs):  # a node that only copies a value to an output gives its name to the value
        copy = output.producer()
        source = copy.inputs[0] if copy is not None and copy.op_type == "Identity" else None
        if copy is not None and source is not None and source.producer() is not None and source not in graph.outputs:
            name = output.name
            output.replace_all_uses_with(source, replace_graph_outputs=True)
            graph.remove(copy, safe=True)
            source.name = name
    model.functions.clear()
    RemoveUnusedNodesPass()(model)
    DeduplicateInitializersPass(size_limit=_SHARED)(model)
    _name_nodes(graph)
    graph.opset_imports.clear()
    graph.opset_imports[""] = OPSET
    return model


def _computed(model: ir.Model) -> dict[str, Array]:
    """Return every value that a node of the graph computes if all inputs are zeros."""
    graph = model.graph
    outputs = list(graph.outputs)
    graph.outputs[:] = [value for node in graph for value in node.outputs if value.name]
    try:
        with tempfile.TemporaryDirectory(prefix="u2moe") as folder:
            file = Path(folder) / "all.onnx"
            save_graph(model, file, limit=ONE_FILE_LIMIT)
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            names = [value.name for value in session.get_outputs()]
            types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
            zeros = {value.name: np.zeros(value.shape, types[value.type]) for value in session.get_inputs()}
            return dict(zip(names, session.run(names, zeros), strict=True))
    finally:
        graph.outputs[:] = outputs


def _constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _simplify(graph: ir.Graph, node: ir.Node) -> None:
    """Bypass the node if it changes nothing. Otherwise, write its shape or axes in the form that compilers expect."""
    output = node.outputs[0]
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:  # it may take all rows, in order
        table, rows = node.inputs
        indices = rows.const_value.numpy().ravel() if rows is not None and rows.const_value is not None else np.zeros(0)
        size = table.shape[0] if table is not None and table.shape is not None else None
        if size == indices.size and (indices == np.arange(indices.size)).all():
            node.op_type = "Reshape"
            node.attributes.clear()
    if (same := _passed_on(node)) is not None and output not in graph.outputs:
        ir.convenience.replace_all_uses_with(output, same)
    elif node.op_type == "Reshape":
        sizes = tuple(output.shape.numpy()) if output.shape is not None else ()
        name = f"shape_{'_'.join(map(str, sizes))}"
        node.replace_input_with(1, _constant(graph, name, np.array(sizes, np.int64)))
    elif node.op_type in ("ReduceMean", "ReduceMin", "ReduceMax") and len(node.inputs) == 2:  # attributes in `OPSET`
        axes = node.inputs[1].const_value if node.inputs[1] is not None else None
        if axes is not None:
            node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
            node.resize_inputs(1)


def _passed_on(node: ir.Node) -> ir.Value | None:
    """Return the input that a node passes on unchanged, if any."""
    found = [value for value in node.inputs[:1] if node.op_type in _COPIES]
    if node.op_type in _NEUTRAL:
        pairs = [tuple(node.inputs), tuple(node.inputs[::-1])] if node.op_type in ("Mul", "Add") else [node.inputs]
        for value, other in pairs:
            tensor = None if other is None else other.const_value
            if tensor is not None and (tensor.numpy() == _NEUTRAL[node.op_type]).all():
                found.append(value)
    same = (value for value in found if value is not None and value.const_value is None)
    return next((value for value in same if value.shape == node.outputs[0].shape), None)


def _name_nodes(graph: ir.Graph) -> None:
    """Name each node and its outputs after its layer, since nodes from inlined functions lack the layer's path."""
    paths: dict[ir.Node, str] = {}
    for node in reversed(graph):
        path = next((str(value.name).rpartition("/")[0] for value in node.outputs if "/" in str(value.name)), "")
        readers = [use.node for value in node.outputs for use in value.uses()]
        paths[node] = path.removeprefix("static/") or (paths[readers[0]] if readers else "")
    counts: Counter[str] = Counter()
    for node in graph:
        name = f"{paths[node]}/{node.op_type}".lstrip("/")
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"
        for index, value in enumerate(node.outputs):
            if value not in graph.outputs:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"


def check_fixed(model: ir.Model, where: object) -> None:
    """Refuse operators, numbers and shapes that NPU compilers cannot read. The UnsupportedError names the node."""
    for node in model.graph:
        told = f"{where}: node {node.name} ({node.op_type}):"
        if node.domain or node.op_type not in OPERATORS:
            raise UnsupportedError(f"{told} NPU compilers do not support this operator")
        for value in (*node.inputs, *node.outputs):
            if value is None:
                continue
            if value.shape is None or not value.shape.is_static() or len(value.shape) > MOST_AXES:
                expected = f"expected at most {MOST_AXES} axes, all fixed"
                raise UnsupportedError(f"{told} {value.name} has shape {value.shape}, {expected}")
            tensor = value.const_value
            if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
                largest = float(np.abs(tensor.numpy()).max(initial=0))
                if not largest <= LARGEST:
                    exceeded = f"which exceeds the float16 limit ({LARGEST:g})"
                    raise UnsupportedError(f"{told} {value.name} has the value {largest:g}, {exceeded}")
