"""Builds one ONNX graph node by node, with names that follow the network. Knows no layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from u2moe.runtime import contract

OPSET = 18
IR_VERSION = 8
"""The first version with model-local functions; onnxruntime 1.17 is the oldest release that is tested with it."""

Operand = ir.Value | npt.NDArray[Any] | Sequence[int] | int | float
"""An input of a node: a value, or a constant (integers become int64, floats float32)."""


class GraphBuilder:
    """Collects nodes, constants, weights and functions, and closes them into a model.

    Node and value names are the path of the open scopes, the operator and a number, so that they stay the same from
    one export to the next and tell a reader where they belong.
    """

    def __init__(self, name: str, *, constants_as_nodes: bool = False) -> None:
        self.name = name
        self.functions: dict[str, ir.Function] = {}
        self._constants_as_nodes = constants_as_nodes
        self._tape = ir.tape.Tape()
        self._scopes: list[str] = []
        self._counts: Counter[str] = Counter()
        self._initializers: dict[str, ir.Value] = {}

    @contextmanager
    def scope(self, *names: str) -> Iterator[None]:
        """Prefix the names of what is built inside."""
        self._scopes.extend(names)
        yield
        del self._scopes[len(self._scopes) - len(names) :]

    def path(self, name: str) -> str:
        """`name` behind the open scopes, dotted as in a state dict."""
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
        self._counts[name] += 1
        if self._counts[name] > 1:
            name = f"{name}_{self._counts[name]}"
        outputs = self._tape.op_multi_out(
            op_type, values, attributes or None, num_outputs=num_outputs, domain=domain, name=name
        )
        for index, output in enumerate(outputs):
            output.name = name if num_outputs == 1 else f"{name}:{index}"
        return tuple(outputs)

    def constant(self, value: npt.NDArray[Any] | Sequence[int] | float) -> ir.Value:
        """A small constant; equal ones are shared."""
        if not isinstance(value, np.ndarray):
            is_float = isinstance(value, float)
            value = np.asarray(value, dtype=np.float32 if is_float else np.int64)
        if self._constants_as_nodes:
            return self.op("Constant", value=ir.tensor(value))
        flat = "_".join(f"{number:g}" for number in value.ravel()[:8].tolist())
        name = f"const_{value.dtype.name}{list(value.shape) or ''}_{flat}".replace(" ", "")
        if value.size > 8:
            name = f"const_{self.path(str(len(self._initializers)))}"
        if name not in self._initializers:
            self._initializers[name] = self._tape.initializer(ir.tensor(value, name=name))
        return self._initializers[name]

    def weight(
        self, name: str, shape: Sequence[int], read: Callable[[], torch.Tensor], dtype: ir.DataType = ir.DataType.FLOAT
    ) -> ir.Value:
        """A weight named by its path in the state dict, read when the graph is saved and not kept in memory."""
        path = self.path(name)
        if path not in self._initializers:

            def load() -> ir.TensorProtocol:
                return ir.tensor(np.ascontiguousarray(read().detach().to(torch.float32).numpy()), name=path)

            tensor = ir.LazyTensor(load, dtype, ir.Shape(shape), name=path)
            self._initializers[path] = self._tape.initializer(tensor)
        return self._initializers[path]

    def function(
        self, name: str, inputs: Sequence[str], body: Callable[[GraphBuilder, list[ir.Value]], ir.Value]
    ) -> str:
        """Define a model-local function with one output, once; returns its name."""
        if name not in self.functions:
            inner = GraphBuilder(name, constants_as_nodes=True)
            parameters = [ir.Value(name=parameter) for parameter in inputs]
            output = body(inner, parameters)
            graph = ir.Graph(
                parameters,
                [output],
                nodes=inner._tape.nodes,
                opset_imports={"": OPSET},
                name=name,
            )
            self.functions[name] = ir.Function(contract.MOE_DOMAIN, name, graph=graph, attributes=[])
        return name

    def input(self, tensor: contract.Tensor, axes: Callable[[str], int | None]) -> ir.Value:
        """The graph input that the contract describes; `axes` gives the size of a fixed axis."""
        return ir.val(tensor.name, dtype=ir.DataType[_TYPES[tensor.dtype]], shape=_shape(tensor, axes))

    def model(
        self,
        graph: contract.Graph,
        inputs: dict[str, ir.Value],
        outputs: dict[str, ir.Value],
        axes: Callable[[str], int | None],
        metadata: dict[str, str],
    ) -> ir.Model:
        """Close the graph with the outputs that the contract names, in its order."""
        results = []
        for tensor in graph.outputs:
            with self.scope("outputs"):
                value = self.op("Identity", outputs[tensor.name])
            value.name = tensor.name
            value.type = ir.TensorType(ir.DataType[_TYPES[tensor.dtype]])
            value.shape = _shape(tensor, axes)
            results.append(value)
        body = ir.Graph(
            [inputs[tensor.name] for tensor in graph.inputs],
            results,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET, **({contract.MOE_DOMAIN: 1} if self.functions else {})},
            name=self.name,
        )
        return ir.Model(
            body,
            ir_version=IR_VERSION,
            producer_name="u2moe",
            functions=list(self.functions.values()),
            metadata_props=dict(sorted(metadata.items())),
        )


_TYPES = {"float32": "FLOAT", "int64": "INT64", "bool": "BOOL"}


def _shape(tensor: contract.Tensor, axes: Callable[[str], int | None]) -> ir.Shape:
    return ir.Shape([axes(axis) or axis for axis in tensor.axes])
