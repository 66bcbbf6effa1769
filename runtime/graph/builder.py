"""Build ONNX graphs and functions node by node, with names that follow the structure of the network."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.functions import FUNCTIONS

OPSET = 18
IR_VERSION = 8
"""First version of the ONNX format with model-local functions. The oldest tested release is onnxruntime 1.17."""

CONTRIB = "com.microsoft"  # domain of operators that every onnxruntime build has, without a custom operator library

Array = npt.NDArray[Any]
Operand = ir.Value | npt.NDArray[Any] | Sequence[int] | int | float
"""Input of a node: a value or a constant. Integers become int64, floats become float32."""


class GraphBuilder:
    """Builder of a model. Names (open scopes, operator, number) show where a node belongs, the same in all exports."""

    def __init__(self, name: str, *, constants_as_nodes: bool = False) -> None:
        self.name, self.tape, self._constants_as_nodes = name, ir.tape.Tape(), constants_as_nodes
        self.functions = dict[ir.OperatorIdentifier, ir.Function]()
        self._scopes, self._groups, self._domains, self._counts = list[str](), list[str](), {""}, Counter[str]()
        self._initializers, self._constants = dict[str, ir.Value](), dict[str, ir.Value]()

    @contextmanager
    def scope(self, *names: str, group: str | None = None) -> Iterator[None]:
        """Prefix node names in the block, and set the group of its weights; None: that of the enclosing scope."""
        self._scopes.extend(names)
        self._groups.extend([group] if group else [])
        yield
        del self._scopes[len(self._scopes) - len(names) :]
        del self._groups[len(self._groups) - bool(group) :]

    def path(self, name: str) -> str:
        """Return `name` prefixed with the open scopes, separated by dots as in a state dict."""
        return ".".join((*self._scopes, name))

    def op(self, op_type: str, *inputs: Operand | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self.ops(op_type, *inputs, num_outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: Operand | None, num_outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Add a node with several outputs."""
        values = [value if value is None or isinstance(value, ir.Value) else self.constant(value) for value in inputs]
        name = "/".join((*self._scopes, op_type))
        self._domains.add(domain)
        self._counts[name] += 1
        if self._counts[name] > 1:
            name = f"{name}_{self._counts[name]}"
        outputs = self.tape.op_multi_out(
            op_type, values, attributes or None, num_outputs=num_outputs, domain=domain, name=name
        )
        for index, output in enumerate(outputs):
            output.name = name if num_outputs == 1 else f"{name}:{index}"
        return tuple(outputs)

    def call(self, function: ir.Function, *inputs: ir.Value) -> tuple[ir.Value, ...]:
        """Add a call to a function built by `build_function`. Returns the outputs of the call."""
        called = define(self.functions, function)
        settings = {"num_outputs": len(called.outputs), "domain": called.domain, **function.meta[ATTRIBUTES]}
        return self.ops(called.name, *inputs, **settings)

    def constant(self, value: npt.NDArray[Any] | Sequence[int] | float) -> ir.Value:
        """Return a small constant. Equal constants are shared."""
        if not isinstance(value, np.ndarray):
            value = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        flat = "_".join(f"{number:g}" for number in value.ravel()[:8].tolist())
        name = f"const_{value.dtype.name}{list(value.shape) or ''}_{flat}".replace(" ", "")
        if value.size > 8:
            name = f"const_{self.path(str(len(self._constants)))}"
        if name not in self._constants:
            if self._constants_as_nodes:
                self._constants[name] = self.op("Constant", value=ir.tensor(value))
            else:
                self._constants[name] = self.tape.initializer(ir.tensor(value, name=name))
        return self._constants[name]

    def constant_strings(self, values: Sequence[str]) -> ir.Value:
        """Return a constant of strings [n]."""
        name = f"const_strings_{self.path(str(len(self._constants)))}"
        tensor = ir.StringTensor([value.encode() for value in values], shape=ir.Shape([len(values)]), name=name)
        self._constants[name] = self.tape.initializer(tensor)
        return self._constants[name]

    def weight(self, name: str, shape: Sequence[int], read: Callable[[], Array]) -> ir.Value:
        """Return a float32 weight named by its path in the state dict, with the scope's group; read when saved."""
        path = self.path(name)
        if path not in self._initializers:
            if not self._groups:
                raise ValueError(f"weight {path}: no enclosing scope has a group")
            value = self.tape.initializer(lazy_tensor(path, ir.DataType.FLOAT, shape, read))
            value.metadata_props[contract.GROUP_METADATA] = self._groups[-1]
            self._initializers[path] = value
        return self._initializers[path]

    @property
    def opset_imports(self) -> dict[str, int]:
        """Version of each operator set used so far, by domain."""
        return {domain: 1 if domain else OPSET for domain in sorted(self._domains)}


def lazy_tensor(name: str, dtype: ir.DataType, shape: Sequence[int], read: Callable[[], Array]) -> ir.LazyTensor:
    """Return a tensor whose values `read` returns when the graph is saved."""

    def load() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(read(), dtype.numpy()), name=name)

    return ir.LazyTensor(load, dtype, ir.Shape(shape), name=name)


def build_model(
    graph: contract.Graph,
    axes: Callable[[str | int], int | None],
    metadata: dict[str, str],
    body: Callable[[GraphBuilder, dict[str, ir.Value]], dict[str, ir.Value]],
) -> ir.Model:
    """Build a contract's graph. `body` maps inputs to outputs; `axes` returns the size of an axis, None if dynamic."""

    def typed(tensor: contract.Tensor, value: ir.Value) -> ir.Value:
        dtype = ir.DataType.STRING if tensor.dtype == "str" else ir.DataType.from_numpy(np.dtype(tensor.dtype))
        value.name, value.type = tensor.name, ir.TensorType(dtype)
        value.shape = ir.Shape([axes(axis) or axis for axis in tensor.axes])
        return value

    g = GraphBuilder(graph.name)
    inputs = {tensor.name: typed(tensor, ir.Value()) for tensor in graph.inputs}
    found, outputs = body(g, inputs), []
    for tensor in graph.outputs:
        with g.scope("outputs"):
            outputs.append(typed(tensor, g.op("Identity", found[tensor.name])))
    made = ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=g.tape.nodes,
        initializers=g.tape.initializers,
        opset_imports=g.opset_imports,
        name=graph.name,
    )
    functions, facts = list(g.functions.values()), dict(sorted(metadata.items()))
    return ir.Model(made, ir_version=IR_VERSION, producer_name="u2moe", functions=functions, metadata_props=facts)


ATTRIBUTES = "attributes"  # key in a function's `meta` that contains the attributes of its calls
Body = Callable[[GraphBuilder, list[ir.Value]], ir.Value | Sequence[ir.Value]]
"""Adds the nodes of a function, given its parameters, and returns its outputs."""


def build_function(
    name: str, parameters: Sequence[str], body: Body, attributes: Mapping[str, Any] | None = None
) -> ir.Function:
    """Build a model-local function in the domain `u2moe`, not yet part of a model. Its name is one of `FUNCTIONS`.

    `parameters` are the names of its inputs. `attributes` are for readers of the graph and for native operators that
    replace the function. The body is built for these values and does not read them. The function keeps them as
    `meta[ATTRIBUTES]` for its calls.
    """
    FUNCTIONS[name].check(parameters, attributes or {})
    g = GraphBuilder(name, constants_as_nodes=True)
    inputs = [ir.Value(name=parameter) for parameter in parameters]
    found = body(g, inputs)
    outputs = [found] if isinstance(found, ir.Value) else list(found)
    graph = ir.Graph(inputs, outputs, nodes=g.tape.nodes, opset_imports=g.opset_imports, name=name)
    declared = [ir.Attr(attribute, ir.AttributeType.UNDEFINED, None) for attribute in attributes or {}]
    function = ir.Function(contract.MOE_DOMAIN, name, graph=graph, attributes=declared)
    function.meta[ATTRIBUTES] = dict(attributes or {})
    return function


def define(functions: MutableMapping[ir.OperatorIdentifier, ir.Function], function: ir.Function) -> ir.Function:
    """Add a function, unless an equal one exists; add a number to a name in use. Returns the function to call."""
    name = function.name
    for number in itertools.count(1):
        function.name = name if number == 1 else f"{name}_{number}"
        there = functions.setdefault(function.identifier(), function)
        if there is function or _content(there) == _content(function):
            return there
    raise AssertionError


def _content(function: ir.Function) -> bytes:
    content: bytes = ir.to_proto(function).SerializeToString(deterministic=True)
    return content
