"""Records what the layers of a float32 bundle read for recordings, in temporary files."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.quantize.names import layer_of
from u2moe.quantize.routing import load_graph
from u2moe.runtime.bundle.contract import MOE_DOMAIN
from u2moe.runtime.bundle.functions import plain_name
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.decoding.ctc import ctc_greedy_search
from u2moe.runtime.errors import AudioError, QuantizationError
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.session import Session

Array = npt.NDArray[Any]
PRODUCTS = ("Linear", "FeedForward", "GatedFeedForward", "MixtureOfExperts")
PIECE_FRAMES = 3000
"""Feature frames per encoder call: attention over a whole long recording would need too much memory."""


class Activations:
    """Rows [n, channels] of values, by name.

    Attributes:
        products: numbers of products: those rounded for their rows, `compensated_products`, and those that had too
            few, `plain_products`.
    """

    def __init__(self, folder: Path) -> None:
        """Keeps rows in files in `folder`."""
        self._folder = folder
        self._sizes: dict[str, int] = {}
        self._exponents: dict[str, Array] = {}
        self.products: Counter[str] = Counter()

    def add(self, name: str, rows: Array) -> None:
        """Add rows [..., channels] of a value."""
        self._sizes.setdefault(name, rows.shape[-1])
        with self._file(name).open("ab") as file:
            file.write(np.ascontiguousarray(rows, np.float32).data)

    def divide(self, name: str, exponents: Array) -> None:
        """Divide the channels of a value by powers of two, as `smoothing.scale` does in a graph."""
        self._exponents[name] = exponents

    def rows(self, name: str | None) -> Array | None:
        """All rows of a value; None: nothing was recorded."""
        if name not in self._sizes:
            return None
        rows = np.fromfile(self._file(name), np.float32).reshape(-1, self._sizes[name])
        return np.ldexp(rows, -self._exponents[name]) if name in self._exponents else rows

    def _file(self, name: str) -> Path:
        return self._folder / str(list(self._sizes).index(name))  # systems differ in which names they allow


@contextmanager
def recorded(
    bundle: Bundle, features: Sequence[Array], beside: Path, progress: Callable[[str], None]
) -> Iterator[Activations]:
    """Run a float32 bundle over features [frames, mel] of recordings, with full context, and the decoders on its texts.

    The temporary folder is created in `beside`, because the system's is often in memory.

    Raises:
        AudioError: the model finds no speech.
        QuantizationError: a layer reads numbers that are not finite.
    """
    with tempfile.TemporaryDirectory(prefix="activations-", dir=beside, ignore_cleanup_errors=True) as name:
        activations = Activations(Path(name))
        names: set[str] = set()
        sessions = {
            graph.name: _Recorder(ir.load(bundle.path / graph.file), activations, names)
            for graph in bundle.manifest.model.graphs()
        }
        model = Model(bundle.manifest, *(cast("Session", sessions.get(name)) for name in ("encoder", "ctc", "decoder")))
        num_tokens = 0
        for number, frames in enumerate(features):
            progress(f"activations: recording {number + 1} of {len(features)}")
            for begin in range(0, len(frames), PIECE_FRAMES):
                output = model.encode(frames[begin : begin + PIECE_FRAMES])
                if len(output):
                    tokens = ctc_greedy_search(model.ctc(output)).tokens
                    num_tokens += len(tokens)
                    if model.has_decoder:
                        model.token_scores(output, [tokens])
        if not num_tokens:
            raise AudioError("calibration: the model finds no speech in the recordings")
        del model, sessions  # their weights are not needed any more
        yield activations


class _Recorder:
    """A graph as a session that adds what its products read to `activations`, but for what `others` record."""

    def __init__(self, model: ir.Model, activations: Activations, others: set[str]) -> None:
        self._activations = activations
        self._layers: dict[str, str] = {}
        self._outputs = [str(value.name) for value in model.graph.outputs]
        for node in model.graph:
            x = node.inputs[0] if node.domain == MOE_DOMAIN and plain_name(node.op_type) in PRODUCTS else None
            if x is None or str(x.name) in others:
                continue
            others.add(str(x.name))
            self._layers[str(x.name)] = layer_of(node)
            if x.producer() is not None and not x.is_graph_output():
                x.type = ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(x)
        self._session = load_graph(model)
        self._model = model  # its weights are mapped

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`."""
        names = [name for name in self._layers if name not in feeds and name not in self._outputs]
        found = dict(
            zip([*self._outputs, *names], self._session.run([*self._outputs, *names], dict(feeds)), strict=True)
        )
        for name, layer in self._layers.items():
            rows = feeds[name] if name in feeds else found[name]
            if not np.isfinite(rows).all():
                raise QuantizationError(f"calibration: {layer} reads numbers that are not finite for the recordings")
            self._activations.add(name, rows)
        return {name: found[name] for name in self._outputs}
