"""Quantizers of onnxruntime, Olive and Neural Compressor, and graphs of plain operators, which they read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import onnx
import onnxruntime
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from u2moe.runtime import Bundle
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import DEFAULT_PROVIDER

GRAPHS = ("encoder", "ctc")


class Feeds(quantization.CalibrationDataReader):  # type: ignore[misc]
    """What a graph is fed in recordings, one after the other."""

    def __init__(self, feeds: Sequence[Mapping[str, Any]]) -> None:
        self._all = feeds
        self.rewind()

    def get_next(self) -> Mapping[str, Any] | None:
        """The next, or None."""
        return next(self._feeds, None)

    def rewind(self) -> None:
        """Begin again."""
        self._feeds = iter(self._all)


Make = Callable[[Path, Path, Feeds], object]
"""Reads a plain graph, and writes a quantized one; with what the graph is fed in recordings."""


def _static(method: quantization.CalibrationMethod) -> Make:
    return lambda source, target, reader: quantization.quantize_static(
        source, target, reader, op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True, weight_type=quantization.QuantType.QInt8, calibrate_method=method,
    )  # fmt: skip


def _blocks(bits: int) -> Make:
    def make(source: Path, target: Path, _: Feeds) -> None:
        tool = MatMulNBitsQuantizer(onnx.load(source), bits=bits, block_size=32, is_symmetric=True, accuracy_level=4)
        tool.process()
        tool.model.save_model_to_file(str(target), use_external_data_format=False)

    return make


def _olive(module: str, kind: str) -> Make:
    def make(source: Path, target: Path, _: Feeds) -> None:
        own = getattr(importlib.import_module(f"olive.passes.onnx.{module}_quantization"), kind)
        passes, models = map(importlib.import_module, ("olive.passes.olive_pass", "olive.model"))
        chosen = passes.create_pass_from_dict(own, {"block_size": 32}, disable_search=True)
        made = chosen.run(models.ONNXModelHandler(str(source)), str(target.with_suffix("")))
        Path(made.model_path).replace(target)

    return make


def _compensated(source: Path, target: Path, reader: Feeds) -> None:
    own = importlib.import_module("onnx_neural_compressor.quantization.algorithm_entry")
    own.data_reader.CalibrationDataReader.register(Feeds)
    onnx.save(own.gptq_quantize_entry(str(source), own.config.GPTQConfig(), reader), target)


PEERS: Mapping[str, Make] = {
    "quantize_dynamic": lambda source, target, _: quantization.quantize_dynamic(source, target, per_channel=True),
    "quantize_static, MinMax": _static(quantization.CalibrationMethod.MinMax),
    "quantize_static, Percentile": _static(quantization.CalibrationMethod.Percentile),
    "quantize_static, Entropy": _static(quantization.CalibrationMethod.Entropy),
    "MatMulNBits, 8 bits": _blocks(8),
    "MatMulNBits, 4 bits": _blocks(4),
    "Olive, RTN, 4 bits": _olive("rtn", "OnnxBlockWiseRtnQuantization"),
    "Olive, k-quant, 4 bits": _olive("kquant", "OnnxKQuantQuantization"),
    "Neural Compressor, GPTQ, 4 bits": _compensated,
}


class _Plain:
    """A graph of plain operators as a session, which keeps what it is fed."""

    def __init__(self, file: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._session = onnxruntime.InferenceSession(file, options, providers=[DEFAULT_PROVIDER])
        self._names = [output.name for output in self._session.get_outputs()]
        self.feeds: list[Mapping[str, Any]] = []

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.feeds.append(dict(feeds))
        return dict(zip(self._names, self._session.run(self._names, dict(feeds)), strict=True))


def plain_model(bundle: Bundle, files: Sequence[Path]) -> tuple[Model, list[_Plain]]:
    """Encoder and CTC head in files of plain operators as a model, and their sessions, which keep their `feeds`."""
    sessions = [_Plain(file) for file in files]
    encoder, ctc = (cast("Session", session) for session in sessions)
    return Model(bundle.manifest, encoder, ctc, None), sessions
