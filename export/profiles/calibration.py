"""Calibration for NPU compilers: chunks of recordings, a graph quantized with them, and its loss of accuracy."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.export.profiles.conversion import ONE_FILE_LIMIT, Run, session_of
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.errors import AudioError
from u2moe.runtime.graph.file import array_of, save_graph
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.text.word_errors import edit_distance

Samples = list[Mapping[str, npt.NDArray[np.float32]]]  # the inputs of each chunk, by name
FEED_FORWARD = ("feed_forward", "ffn")  # nodes whose names contain one of these are quantized
LEAST_FACTOR, TINY = 1e-3, 1e-9
"""Smallest factor of a column. `TINY` is added to the largest magnitude of each column, because that may be zero."""
MARGIN = 1.5  # factor by which the recorded ranges of activations are widened, because other recordings may exceed them
FIXED_SCALES = (np.float32(1 / 65536), np.float32(1 / 32768))  # QNN requires them for sigmoid, softmax and tanh
MOST_SAMPLES = 100  # largest number of chunks to keep, evenly spaced over all recordings


class Recorder:
    """A runner that keeps the inputs of every chunk."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.samples: Samples = []

    def run(self, inputs: dict[str, npt.NDArray[np.float32]], /) -> dict[str, npt.NDArray[Any]]:
        """See `Runner`."""
        self.samples.append(inputs)
        return self._run(inputs)


def recognised(bundle: Bundle, graph: Path, files: Sequence[str | os.PathLike[str]]) -> tuple[list[str], Samples]:
    """Recognise recordings with the first pass; return texts and some chunks' inputs. AudioError if there are none."""
    recorder = Recorder(session_of(graph))
    model = bundle.load(SessionSettings(kernels="onnxruntime"), runner=recorder)
    recognizer = Recognizer(bundle, model, DecodingOptions(search="ctc_greedy"))
    texts = [recognizer.transcribe(os.fspath(file)).text for file in files]
    if not recorder.samples:
        raise AudioError("the recordings are too short for a single chunk")
    places = np.unique(np.linspace(0, len(recorder.samples) - 1, MOST_SAMPLES).astype(int))
    return texts, [recorder.samples[place] for place in places.tolist()]


def write_samples(samples: Samples, folder: Path) -> None:
    """Write each input as one array of all chunks (for onnx2tf) and as one file per chunk (listed in dataset.txt)."""
    folder.mkdir()
    lines = []
    for number, sample in enumerate(samples):
        for name, array in sample.items():
            np.save(folder / f"{number}_{name}.npy", array)
        lines.append(" ".join(f"{number}_{name}.npy" for name in sample) + "\n")
    (folder / "dataset.txt").write_text("".join(lines), encoding="utf-8")
    for name in samples[0]:
        np.save(folder / f"{name}.npy", np.concatenate([sample[name] for sample in samples]))


def write_qdq(graph: Path, target: Path, samples: Samples, float_nodes: list[str]) -> None:
    """Quantize a graph's feed-forward layers for QNN, except the nodes in `float_nodes`. Write the graph to `target`.

    Weights get 8 bits, after their columns are scaled to the same maximum. Activations get 16 bits. QNN computes the
    other nodes in float16, because its attention and convolutions are less accurate in 16-bit integers.
    """
    from onnxruntime import quantization  # noqa: PLC0415 - loads slowly
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config  # noqa: PLC0415

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            return next(map(dict, self._rest), None)

    kinds, model = quantization.QuantType, ir.load(graph)
    narrow = _even_columns(model, float_nodes)
    kept = [*float_nodes, *(str(node.name) for node in model.graph if not _is_feed_forward(node))]
    wide = {
        name: [{"quant_type": kinds.QInt16, "symmetric": True}]
        for name, value in model.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT and name not in narrow and len(value.shape or ()) > 1
    }
    types, source = {"activation_type": kinds.QUInt16, "weight_type": kinds.QUInt8}, ir.to_proto(model)
    logging.disable(logging.WARNING)  # onnxruntime gives advice that does not apply to QNN
    try:
        config = get_qnn_qdq_config(source, Reader(), **types, init_overrides=wide, nodes_to_exclude=kept)
        quantization.quantize(source, str(target), config)
    finally:
        logging.disable(logging.NOTSET)
    model = ir.load(target)
    for scale in {node.inputs[1] for node in model.graph if node.op_type == "QuantizeLinear"}:
        if scale is not None and (size := array_of(scale)) not in FIXED_SCALES:
            scale.const_value = ir.tensor(size * np.float32(MARGIN), name=scale.name)
    save_graph(model, target, limit=ONE_FILE_LIMIT)


def _is_feed_forward(node: ir.Node) -> bool:
    return any(part in str(node.name) for part in FEED_FORWARD)


def _even_columns(model: ir.Model, float_nodes: list[str]) -> set[str]:
    """Scale the columns of each feed-forward weight to the same maximum, and scale the products back.

    A weight has one scale for all its 8-bit values, so columns of small values would otherwise use few of the 256
    steps. Returns the names of the scaled weights.
    """
    found = set()
    for node in list(model.graph):
        if node.op_type != "MatMul" or not _is_feed_forward(node):
            continue
        source, weight = node.inputs
        own = {str(node.name), str(getattr(source and source.producer(), "name", ""))}
        if weight is None or weight.const_value is None or own & set(float_nodes):
            continue  # products of a router, or of its outputs, are small, so they stay precise
        sizes = np.abs(columns := array_of(weight)).max(axis=0) + TINY
        factors = np.maximum(sizes / sizes.max(), LEAST_FACTOR)
        weight.const_value = ir.tensor(columns / factors, name=weight.name)
        factor = ir.Value(name=f"{weight.name}_factors", const_value=ir.tensor(factors))
        model.graph.register_initializer(factor)
        product = node.outputs[0]
        scaled = ir.node("Mul", [product, factor], name=f"{node.name}_scaled", outputs=[ir.Value(name=product.name)])
        product.name = f"{product.name}_unscaled"
        product.replace_all_uses_with(scaled.outputs[0])
        scaled.replace_input_with(0, product)
        model.graph.insert_after(node, scaled)
        found.add(str(weight.name))
    return found


def alike(expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> tuple[float, float]:
    """Return the cosine similarity of log-probabilities [1, time, vocab], and the share of equal best tokens."""
    one, other = expected.astype(np.float64), found.astype(np.float64)
    cosine = (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())
    return float(cosine), float((one.argmax(-1) == other.argmax(-1)).mean())


def damage(graph: Path, quantized: Path, samples: Samples, texts: list[str], others: list[str]) -> dict[str, float]:
    """Compare a float graph with its quantized version, by log-probabilities and by recognised texts.

    Both graphs read each chunk with the caches of the float graph. Returns the least and the mean cosine
    similarity of log-probabilities, the share of frames with the same best token, and the share of words that differ.
    """
    runs = session_of(graph), session_of(quantized)
    pairs = [alike(*(run(sample)["log_probs"] for run in runs)) for sample in samples]
    cosines, same = zip(*pairs, strict=True)
    edits = sum(edit_distance(one.split(), other.split()) for one, other in zip(texts, others, strict=True))
    return {
        "least_cosine": min(cosines),
        "mean_cosine": float(np.mean(cosines)),
        "same_best_tokens": float(np.mean(same)),
        "different_words": edits / max(sum(len(text.split()) for text in texts), 1),
    }
