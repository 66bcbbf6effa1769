"""GPTQ (Frantar et al. 2022) for any weight format: rounding that minimises layers' output errors on recordings.

The rows of a weight are rounded one after the other, and later rows compensate for the errors so far. The second
product of a layer is fitted to the hidden activations that the rounded first product computes. The biases stay in
float32 and absorb the mean error. The inputs of layers are kept in temporary files.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from u2moe.quantize.arithmetic import NOTHING, Array, Float
from u2moe.quantize.formats.conversion import Parts, WeightConversion
from u2moe.quantize.layers import ExpertLayer, Weights, calls, layer_of
from u2moe.quantize.observed import SwitchedGraph, Values, observed_model, routed_layer, trim_memory
from u2moe.quantize.progress import shares
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.decoding.ctc import ctc_greedy_search
from u2moe.runtime.errors import AudioError, QuantizationError
from u2moe.runtime.graph.activation import activation
from u2moe.runtime.graph.builder import IR_VERSION, GraphBuilder
from u2moe.runtime.graph.file import array_of, group_of, shape_of
from u2moe.runtime.model.settings import DEFAULT_PROVIDER

PRODUCTS = ("Linear", "FeedForward", "GatedFeedForward", "MixtureOfExperts", "Subsampling")
PIECE_FRAMES = 3000  # maximum feature frames per encoder call: attention over a long recording needs much memory
PIECE_ROWS = 8192  # maximum rows in memory at a time
DAMPING = 0.05  # regularisation: this fraction of the inputs' mean second moment is added to each second moment
Double = npt.NDArray[np.float64]
Pairs = Callable[[slice], tuple[Float, Float]]  # rows of the inputs of a float32 product, and of the rounded one


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows [n, channels] of a value, read on demand from a file of float32 numbers."""

    file: Path
    channels: int
    exponents: Array | None = None  # of the powers of two by which channels are divided; None: not divided
    chosen: Array | None = None  # indices of the chosen rows in the file; None: all

    def __len__(self) -> int:
        return self.file.stat().st_size // (4 * self.channels) if self.chosen is None else len(self.chosen)

    def __getitem__(self, which: slice | Array) -> Float:
        mapped = np.memmap(self.file, np.float32, "r").reshape(-1, self.channels)
        rows = np.array(mapped[which if self.chosen is None else self.chosen[which]])
        return rows if self.exponents is None else np.ldexp(rows, -self.exponents)


class Activations:
    """Recorded activations (rows [n, channels] by name), and the weights whose rounding was fitted to them.

    Both are kept in files in a folder. `products` counts the weights fitted to recorded rows (`compensated_products`),
    and those with too few rows for fitting (`plain_products`). `done` is called after each layer or expert with the
    number of its weights that were rounded.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._sizes, self._exponents = folder, dict[str, int](), dict[str, Array]()
        self._rounded: dict[Any, list[tuple[Path, Float | None]]] = {}
        self.products: Counter[str] = Counter()
        self.done: Callable[[int], None] = lambda _: None

    def add(self, name: str, rows: Array) -> None:
        """Append rows [..., channels] to the recorded rows of the value `name`."""
        self._sizes.setdefault(name, rows.shape[-1])
        with self._file(name).open("ab") as file:
            file.write(np.ascontiguousarray(rows, np.float32).data)

    def divide(self, name: str, exponents: Array) -> None:
        """Divide the channels of a value by powers of two, as `smoothing.scale` does in a graph."""
        self._exponents[name] = exponents

    def rows(self, name: str | None) -> Rows | None:
        """Return all rows of a value; None if nothing was recorded."""
        if name not in self._sizes:
            return None
        found = Rows(file=self._file(name), channels=self._sizes[name], exponents=self._exponents.get(name))
        return found if len(found) else None

    def rounded(self, key: Any, fit: Callable[[], Iterable[RoundedWeight]]) -> Sequence[tuple[Path, Float | None]]:
        """Return a file with the parts, and any bias, of each result of `fit`, which is called only once for a key."""
        if key not in self._rounded:
            stored = []
            for number, product in enumerate(fit()):
                file = self._folder / f"rounded-{len(self._rounded)}-{number}.npz"
                np.savez(file, *product.parts)
                stored.append((file, product.bias))
            self._rounded[key] = stored
        return self._rounded[key]

    def _file(self, name: str) -> Path:
        # not by name: file systems differ in the names they allow
        return self._folder / str(list(self._sizes).index(name))


def recorded(
    bundle: Bundle, features: Sequence[Array], folder: Path, progress: Callable[[str], None] = lambda _: None
) -> Activations:
    """Run a float32 bundle on features [frames, mel]; return its activations, kept in a new subfolder of `folder`.

    Raises AudioError if the model finds no speech, and QuantizationError if a layer receives NaN or infinity.
    """
    activations, names = Activations(Path(tempfile.mkdtemp(prefix="activations-", dir=folder))), set[str]()
    graphs = bundle.manifest.model.graphs()
    recorders = {graph.name: _Recorder(ir.load(bundle.path / graph.file), activations, names) for graph in graphs}
    model = observed_model(bundle.manifest, recorders)
    num_tokens, done, show = 0, 0, shares(progress, "recognising recordings")
    for frames in features:
        for begin in range(0, len(frames), PIECE_FRAMES):
            output = model.encode(frames[begin : begin + PIECE_FRAMES])
            if len(output):
                tokens = ctc_greedy_search(model.ctc(output)).tokens
                num_tokens += len(tokens)
                if model.has_decoder:
                    model.token_scores(output, [tokens])
        done += len(frames)
        show(done / sum(map(len, features)))
    if not num_tokens:
        raise AudioError("calibration: the model finds no speech in the recordings")
    del model, recorders
    trim_memory()
    return activations


class _Recorder:
    """A session that adds the inputs of a graph's products to `activations`, except the `others` of other recorders."""

    def __init__(self, model: ir.Model, activations: Activations, others: set[str]) -> None:
        self._activations = activations
        read = [(str(x.name), layer_of(node)) for node in calls(model, *PRODUCTS) if (x := node.inputs[0]) is not None]
        # errors name the first layer that reads a value
        self._layers = {name: layer for name, layer in reversed(read) if name not in others}
        others.update(self._layers)
        self._graph = SwitchedGraph(model, observed=self._layers)

    def run(self, feeds: Values) -> Values:
        """Run as `Session.run` does."""
        found = self._graph.run(feeds)
        for name, rows in self._graph.seen.items():
            if not np.isfinite(rows).all():
                layer = self._layers[name]
                raise QuantizationError(f"calibration: on the recordings, {layer} receives NaN or infinity")
            self._activations.add(name, rows)
        return found


@dataclass(frozen=True)
class RoundedWeight:
    """The stored parts of a product's weight, the weight [in, out] that they represent, and any bias [out]."""

    parts: Parts
    weight: Float
    bias: Float | None

    def __call__(self, inputs: Float) -> Float:
        """Compute outputs [n, out] from inputs [n, in], in float32."""
        y: Float = inputs @ self.weight
        return y if self.bias is None else y + self.bias


def fitted_layer(
    products: Sequence[tuple[Float, Float | None]],
    activation: Callable[[Float], Float],
    tokens: Rows | Float,
    shares: Float,
    conversion: WeightConversion,
) -> list[RoundedWeight]:
    """Round the weights of all products of an expert or a feed-forward layer, or of a single product.

    A product has a weight [in, out] and perhaps a bias [out]; in a gated layer, the gate comes first. `activation` is
    that of the hidden units [n, hidden], or of the gate. `shares` contains, for each of the `tokens` [n, dim], the
    factor applied to the layer's output, such as the routing weight.
    """

    def hidden(values: Sequence[Float]) -> Float:
        active = activation(values[0])
        return active if len(values) == 1 else active * values[1]

    def both(rows: slice) -> tuple[Float, Float]:
        expected = hidden([RoundedWeight((), *product)(tokens[rows]) for product in first])
        return expected, hidden([product(tokens[rows]) for product in rounded])

    first = products[: max(len(products) - 1, 1)]
    # the same array twice, because the first products receive the inputs of the float32 products
    rounded = [fitted(lambda rows: (tokens[rows],) * 2, shares, *product, conversion) for product in first]
    rounded += [fitted(both, shares, *product, conversion) for product in products[len(first) :]]
    return rounded


def fitted(
    inputs: Pairs, shares: Float, weight: Float, bias: Float | None, conversion: WeightConversion
) -> RoundedWeight:
    """Return the rounded product that best reproduces `weight` and `bias`.

    `inputs(rows)` returns these rows of two arrays [n, in]: the inputs of the float32 product, and the inputs that the
    rounded product receives. Errors of rows are weighted by `shares` [n]. A bias absorbs the mean error.
    """
    pieces = [slice(begin, begin + PIECE_ROWS) for begin in range(0, len(shares), PIECE_ROWS)]
    read = lru_cache(1)(lambda number: inputs(pieces[number]))
    squares = np.square(shares) / max(float(np.square(shares).sum()), NOTHING)
    means = np.zeros((2, len(weight)), np.float32)
    for number, rows in enumerate(pieces if bias is not None else ()):
        means += [squares[rows] @ part for part in read(number)]
    moments: Double = np.zeros((len(weight), len(weight)))
    products, differ = np.zeros(weight.shape, np.float32), False
    for number, rows in enumerate(pieces):
        expected, found = read(number)
        differ = expected is not found
        found = (found - means[1]) * shares[rows, np.newaxis]
        moments += found.T @ found
        if differ:
            products += found.T @ (((expected - means[0]) * shares[rows, np.newaxis]) @ weight)
    damping = DAMPING * float(np.trace(moments)) / len(moments) or 1.0
    moments[np.diag_indices_from(moments)] += damping
    target: Array = np.linalg.solve(moments, products + damping * weight) if differ else weight
    parts = compensated(target, moments, conversion)
    restored = conversion.restored(parts, len(weight))
    if bias is not None:
        bias = (bias + means[0] @ weight - means[1] @ restored).astype(np.float32)
    return RoundedWeight(parts, restored, bias)


def compensated(weight: Array, moments: Double, conversion: WeightConversion) -> Parts:
    """Round a weight [in, out] so that outputs have the least error; `moments` [in, in]: sums of inputs' products."""
    # row i of `factors` divided by its diagonal element contains the corrections of later rows for an error of 1
    factors = np.linalg.cholesky(np.linalg.inv(moments)).T
    sizes = factors.diagonal()
    left, rounding = weight.astype(np.float64), conversion.rounding(weight.astype(np.float32))
    for begin in range(0, len(weight), rounding.num_rows):
        rows = slice(begin, min(begin + rounding.num_rows, len(weight)))
        block, errors = left[rows], np.zeros(left[rows].shape)
        rounding.begin(block.astype(np.float32))
        for index in range(len(block)):
            row = begin + index
            errors[index] = (block[index] - rounding.restored(row, block[index].astype(np.float32))) / sizes[row]
            block[index + 1 :] -= np.outer(factors[row, row + 1 : rows.stop], errors[index])
        left[rows.stop :] -= factors[rows, rows.stop :].T @ errors
    return rounding.parts()


def rounded_products(
    weights: Weights,
    products: Sequence[tuple[ir.Value, ir.Value | None]],
    conversion: WeightConversion,
    kind: str,
    rows: tuple[Rows, Float] | None,
    activations: Activations | None,
) -> list[ir.Value]:
    """Return new inputs for a layer's products: each weight's integers and other parts, and any bias.

    `rows` contains the layer's inputs [n, in] and, for each row, its share of the output [n]; see `fitted_layer`. If
    there are fewer rows than channels, each weight is simply rounded to the nearest value.
    """

    def fit() -> list[RoundedWeight]:
        floats = [(array_of(weight), None if bias is None else array_of(bias)) for weight, bias in products]
        return fitted_layer(floats, _activation(kind), *rows, conversion) if rows else []

    made: Sequence[tuple[Path | None, Float | None]] = [(None, None)] * len(products)
    if activations is not None:
        enough = rows is not None and len(rows[0]) >= shape_of(products[0][0])[0]
        activations.products["compensated_products" if enough else "plain_products"] += len(products)
        if enough:
            made = activations.rounded((conversion, *(weight.name for weight, _ in products)), fit)
        activations.done(sum(math.prod(shape_of(weight)) for weight, _ in products))
    inputs: list[ir.Value] = []
    for (weight, bias), (file, fitted_bias) in zip(products, made, strict=True):
        inputs += weights.converted(weight, conversion, made=None if file is None else partial(_parts_in, file))
        if bias is not None and fitted_bias is not None:
            name, read = f"{bias.name}.calibrated", partial(np.asarray, fitted_bias)
            inputs.append(weights.add(name, ir.DataType.FLOAT, fitted_bias.shape, read, group_of(bias)))
        elif bias is not None:
            inputs.append(bias)
    return inputs


def _parts_in(file: Path) -> Parts:
    with np.load(file) as arrays:
        return [arrays[name] for name in arrays.files]


def rounded_experts(
    layer: ExpertLayer, weights: Weights, conversion: WeightConversion, activations: Activations | None
) -> list[list[ir.Value]]:
    """Round each expert with `rounded_products`. Calibration uses the tokens that the expert received."""
    tokens, router = None if activations is None else activations.rows(layer.x.name), routed_layer(layer.node)
    if tokens is not None and router is not None:  # a mixture has a router
        begins = range(0, len(tokens), PIECE_ROWS)
        shares = np.concatenate([router.shares(tokens[begin : begin + PIECE_ROWS]) for begin in begins])
    experts = []
    for index, own in enumerate(layer.experts):
        biases: Sequence[ir.Value | None] = own[1::2] if layer.mixture.bias else [None, None]
        products = list(zip(own[:: len(own) // 2], biases, strict=True))
        rows = None
        if tokens is not None:
            (chosen,) = np.nonzero(shares[:, index])
            rows = replace(tokens, chosen=chosen), shares[chosen, index]
        experts.append(rounded_products(weights, products, conversion, layer.mixture.activation, rows, activations))
    return experts


@cache
def _activation(kind: str) -> Callable[[Float], Float]:
    """Return an activation as a function of arrays, computed as in graphs; for "", return the identity."""
    if not kind:
        return lambda values: values
    g, x = GraphBuilder("activation"), ir.val("x", dtype=ir.DataType.FLOAT, shape=("rows", "columns"))
    y = activation(g, x, kind)
    y.type = x.type
    nodes, constants = g.tape.nodes, g.tape.initializers
    graph = ir.Graph([x], [y], nodes=nodes, initializers=constants, opset_imports=g.opset_imports, name=g.name)
    content = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=[DEFAULT_PROVIDER])
    return lambda values: np.asarray(session.run(None, {"x": values})[0])
