"""Records what the layers of a float32 bundle read for recordings, in temporary files."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from u2moe.quantize.layers import calls, layer_of
from u2moe.quantize.observed import Array, ObservedGraph, observed_model
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.decoding.ctc import ctc_greedy_search
from u2moe.runtime.errors import AudioError, QuantizationError

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


def recorded(
    bundle: Bundle, features: Sequence[Array], folder: Path, progress: Callable[[str], None] = lambda _: None
) -> Activations:
    """Run a float32 bundle over features [frames, mel] of recordings, with full context, and the decoders on its texts.

    Activations are kept in a new folder in `folder`.

    Raises:
        AudioError: the model finds no speech.
        QuantizationError: a layer reads numbers that are not finite.
    """
    activations = Activations(Path(tempfile.mkdtemp(prefix="activations-", dir=folder)))
    names: set[str] = set()
    graphs = bundle.manifest.model.graphs()
    recorders = {graph.name: _Recorder(ir.load(bundle.path / graph.file), activations, names) for graph in graphs}
    model = observed_model(bundle.manifest, recorders)
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
    return activations


class _Recorder(ObservedGraph):
    """Adds what its products read to `activations`, but for what `others` record."""

    def __init__(self, model: ir.Model, activations: Activations, others: set[str]) -> None:
        self._activations = activations
        read = [(x, layer_of(node)) for node in calls(model, *PRODUCTS) if (x := node.inputs[0]) is not None]
        read = [(x, layer) for x, layer in reversed(read) if str(x.name) not in others]  # of two, the first counts
        self._layers = {str(x.name): layer for x, layer in read}
        others.update(self._layers)
        super().__init__(model, [x for x, _ in read])

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`."""
        found = super().run(feeds)
        for name, rows in self.seen.items():
            if not np.isfinite(rows).all():
                layer = self._layers[name]
                raise QuantizationError(f"calibration: {layer} reads numbers that are not finite for the recordings")
            self._activations.add(name, rows)
        return found
