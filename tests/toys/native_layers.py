"""Single layers as graphs, for the native kernels and for onnxruntime alone, and random weights for them."""

import numpy as np
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import int4_blocks, int8_columns

CPU = ["CPUExecutionProvider"]


def layer_model(function, inputs, weights, attributes):
    """One call of a function as an ONNX file; `inputs` are dtypes by name, of any shape."""
    fed = [ir.val(name, dtype=ir.DataType.from_numpy(np.dtype(kind)), shape=None) for name, kind in inputs.items()]
    initial = []
    for name, array in weights.items():
        tensor = ir.tensor(array, name=name)
        initial.append(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor))
    names = [output.name for output in function.outputs]
    outputs = [ir.val(f"y{index}", dtype=ir.DataType.FLOAT, shape=None) for index in range(len(names))]
    if len(outputs) == 2:
        outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    own = ir.node(function.name, [*fed, *initial], attributes, domain=function.domain, num_outputs=len(outputs))
    for made, output in zip(own.outputs, outputs, strict=True):
        made.name, made.type = output.name, output.type
    opsets = {"": 18, "u2moe": 1, "com.microsoft": 1}
    graph = ir.Graph(fed, own.outputs, nodes=[own], initializers=initial, opset_imports=opsets, name="layer")
    return ir.to_proto(ir.Model(graph, ir_version=8, functions=[function])).SerializeToString()


def session_with(model, library=None, num_threads=1):
    """A session of a model, with native kernels if a library is named."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=CPU)


def random_matrix(random, rows, columns):
    return (random.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)


def int8_weights(random, mixture, dim, hidden):
    """Weights of `int8_mixture`, by name in the order of its inputs after x."""
    weights = {"gate": random_matrix(random, dim, mixture.num_experts)}
    if mixture.bias:
        weights["w2_bias"] = 0.2 * random.standard_normal((mixture.num_experts, dim)).astype(np.float32)
    for expert in range(mixture.num_experts):
        for part, shape in (("w1", (dim, hidden)), ("w2", (hidden, dim))):
            name = f"e{expert}_{part}"
            weights[name], weights[f"{name}_scale"] = int8_columns(random_matrix(random, *shape))
            if mixture.bias and part == "w1":
                weights[f"{name}_bias"] = 0.2 * random.standard_normal(hidden).astype(np.float32)
    return weights


def int4_weights(random, mixture, dim, hidden):
    """Weights of `int4_mixture`, by name in the order of its inputs after x."""
    weights = {"gate": random_matrix(random, dim, mixture.num_experts)}
    for expert in range(mixture.num_experts):
        for part, shape in (("w1", (dim, hidden)), ("w2", (hidden, dim))):
            name = f"e{expert}_{part}"
            weights[name], scale = int4_blocks(random_matrix(random, *shape), mixture.block_size)
            weights[f"{name}_scale"] = scale.ravel()
            if mixture.bias:
                weights[f"{name}_bias"] = 0.2 * random.standard_normal(shape[1]).astype(np.float32)
    return weights


def row_errors(expected, found):
    """The error of each row, relative to the mean size of a row."""
    expected, found = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (expected, found))
    size = np.sqrt(np.mean(np.sum(np.square(expected), axis=1))) if expected.size else 1.0
    return np.linalg.norm(expected - found, axis=1) / max(size, 1e-30)
