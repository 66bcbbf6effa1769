"""Graphs as sessions of which values inside are seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.native import Kernels
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import DEFAULT_PROVIDER

Array = npt.NDArray[Any]


class ObservedGraph:
    """A graph as a session; it is loaded on its first run.

    Attributes:
        observed: names of the values that can be seen.
        names: those that the next run shows, all of them at first.
        seen: what the last run showed, by name.
    """

    def __init__(
        self,
        model: ir.Model,
        values: Sequence[ir.Value],
        options: onnxruntime.SessionOptions | None = None,
        kernels: Kernels | None = None,
        dtype: ir.DataType = ir.DataType.FLOAT,
    ) -> None:
        """Make values of this type outputs; `options` and `kernels` are those of the session."""
        self._model, self._options, self._kernels = model, options, kernels
        self._outputs = [str(value.name) for value in model.graph.outputs]
        self.observed = self.names = list(dict.fromkeys(str(value.name) for value in values))
        self.seen: dict[str, Array] = {}
        for value in values:
            if value.producer() is not None and not value.is_graph_output():
                value.type = ir.TensorType(dtype)
                model.graph.outputs.append(value)

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        options = self._options
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
        if self._kernels is not None:
            self._kernels.register(options)
        # passed as values: a hard link beside the changed graph would make onnx-ir refuse the file in other processes
        weights = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value.const_value.numpy())
            for name, value in self._model.graph.initializers.items()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        options.add_external_initializers(list(weights), list(weights.values()))
        content = ir.to_proto(self._model).SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=[DEFAULT_PROVIDER])

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`."""
        names = list(dict.fromkeys([*self._outputs, *(name for name in self.names if name not in feeds)]))
        found = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        self.seen = {name: feeds[name] if name in feeds else found[name] for name in self.names}
        return {name: found[name] for name in self._outputs}


def observed_model(manifest: Manifest, graphs: Mapping[str, ObservedGraph]) -> Model:
    """The model of a bundle whose graphs are these, by the names of the contract."""
    sessions = (cast("Session", graphs.get(name)) for name in ("encoder", "ctc", "decoder"))  # all that it needs is run
    return Model(manifest, *sessions)
