"""Converts the encoder and the CTC head of a bundle to one graph of fixed shape for NPUs."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from u2moe.export.comparison import Array, ParityReport, compared, parity_features
from u2moe.export.profiles.calibration import damage, recognised, write_qdq, write_samples
from u2moe.export.profiles.conversion import ONE_FILE_LIMIT, Conversion, open_source, session_of
from u2moe.export.profiles.folding import OPSET, check_fixed
from u2moe.export.profiles.static_graph import StaticGraph, decoder_graph
from u2moe.runtime.bundle.contract import Tensor
from u2moe.runtime.bundle.files import FileDigest
from u2moe.runtime.bundle.manifest import MASKED, TOKENS_FILE, Manifest, StaticForm
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.errors import UnsupportedError
from u2moe.runtime.graph.features import features_graph
from u2moe.runtime.graph.file import save_graph
from u2moe.runtime.model.encoder import Windows, check_chunks, required_cache_size
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.settings import SessionSettings

DECODER_FILE = "decoder_fixed.onnx"
DECODER_SIZES = {"batch": 1, "nbest": 10, "length": 32, "time": 256}  # axes of the decoder with fixed shapes
LAYOUTS = {
    "frames": "batch, time, channels", "mask": "batch, 1, 1, keys", "positions": "batch, keys, channels",
    "keys": "batch, blocks * heads, frames with the newest last, keys and values",
    "history": "batch, blocks * frames, channels",
}  # fmt: skip
EXPERIMENTAL = 100_000_000  # no graph with more weights than this has been tried on a device
SETTINGS = SessionSettings(kernels="onnxruntime")


def convert_static(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    chunk_size: int | None = None,
    num_left_chunks: int = 4,
    recordings: Sequence[str | os.PathLike[str]] = (),
    qdq: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Conversion:
    """Write a bundle of fixed shape into `out` after comparing it with its source; write nothing if they differ.

    `Recognizer` opens it like any other bundle. The folder also contains `decoder_fixed.onnx`, the caches before the
    first chunk, and `static.json`, which describes the graph to other programs.

    Args:
        bundle: folder of a float32 bundle whose encoder streams.
        out: folder to write; left unchanged on failure.
        chunk_size: encoder frames of a chunk; None: the chunk size in training, or 16 if it varied.
        num_left_chunks: chunks of left context, at least 1.
        recordings: audio files whose chunks are written to `calibration`, for compilers that quantize.
        qdq: also write `static_qdq.onnx` for QNN, quantized with these chunks, and record its loss of accuracy in
            `static.json`.
        overwrite: replace an existing bundle.
        progress: called with a line for each step.

    Raises:
        UnsupportedError: the bundle is quantized or of fixed shape, or its encoder cannot have a fixed shape. The
            message states why.
        ParityError: the graph of fixed shape differs from the bundle.
        BundleError: the bundle cannot be read, or `out` cannot be written.
        AudioError: a recording cannot be read.
        ValueError: the encoder does not support these chunk settings, or `qdq` is set without recordings.
    """
    if qdq and not recordings:
        raise ValueError("qdq requires recordings")
    opened = open_source(bundle)
    if Path(out).resolve() == opened.path.resolve():
        raise UnsupportedError(f"{opened.path}: cannot convert a bundle in place: choose another folder")
    config = opened.manifest.model
    form = _form(opened, config.stream_chunk_size if chunk_size is None else chunk_size, num_left_chunks)
    model = opened.load(SETTINGS)
    with BundleWriter(out, overwrite=overwrite) as staging:
        progress("building static.onnx")
        source = StaticGraph(opened, replace(form, first_position=_first_position(model, form)))
        own = replace(config, static=source.form, static_chunk_size=form.chunk_size)
        manifest = replace(opened.manifest, model=own, external={})
        graph = source.model(manifest.metadata())
        check_fixed(graph, opened.path)
        save_graph(graph, staging.path / "static.onnx", limit=ONE_FILE_LIMIT)
        num_weights = sum(value.const_value.size for value in graph.graph.initializers.values() if value.const_value)
        if num_weights > EXPERIMENTAL:
            progress(f"experimental: {num_weights / 1e6:.0f} million weights; not tried on any device")
        for history in source.form.histories:
            np.save(staging.path / history.start, source.starts[history.cache])
        _copy(opened, staging, manifest)
        about = _about(manifest, source.form, graph, staging.path) | {"experimental": num_weights > EXPERIMENTAL}
        staged = staging.seal(manifest)
        parity = StaticParity(model, staged.load(SETTINGS), subject=opened.path)
        report = parity.run(progress)
        if own.decoder != "none":
            parity.decoders(staging.path)
        if recordings:
            about |= _calibrate(staged, recordings, about["float"], qdq=qdq, progress=progress)
        staging.add("static.json", json.dumps(about, indent=1, allow_nan=False) + "\n")
        written = staging.finish(staged.manifest)
        files = tuple(sorted(written.manifest.files))
        return Conversion(path=written.path, profile="static", files=files, report=report)


def _form(bundle: Bundle, chunk_size: int, num_left_chunks: int) -> StaticForm:
    """Run all checks that need no graph; return a `StaticForm` without the fields that the graph determines."""
    config, where = bundle.manifest.model, f"{bundle.path}: model"
    if bundle.manifest.quantization:
        formats = bundle.manifest.quantization.get("groups")
        raise UnsupportedError(
            f"{bundle.path}: quantization: weights are {formats}, but a graph of fixed shape needs a float32 bundle; "
            "the device's compiler quantizes the graph"
        )
    if not config.streaming:
        raise UnsupportedError(f"{where}.streaming: this encoder was trained for full context, not for chunks")
    check_chunks(config, chunk_size, num_left_chunks)
    return StaticForm(chunk_size=chunk_size, num_left_chunks=num_left_chunks)


def _first_position(model: Model, form: StaticForm) -> int:
    """Return the position at which the dynamic graph continues after `max_position`. Runs the graph to find it."""
    config, left = model.config, form.chunk_size * form.num_left_chunks
    chunk = np.zeros((1, config.num_features(form.chunk_size), config.feature_size), np.float32)
    caches = model.encoder.start()
    for cache in config.caches:
        if (axis := cache.time_axis) is not None:
            shape = list(caches.tensors[cache.name].shape)
            shape[axis] = cache.num_frames(left)
            caches.tensors[cache.name] = np.zeros(shape, np.float32)
    caches.offset[:] = config.max_position
    _, following = model.encoder.step(chunk, caches, required_cache_size=left)
    return int(following.offset[0]) - form.chunk_size


def _copy(bundle: Bundle, staging: BundleWriter, manifest: Manifest) -> None:
    """Copy all files but the encoder; add graphs of features and a fixed decoder. All have the same metadata."""
    staging.add(TOKENS_FILE, bundle.path / TOKENS_FILE)
    save_graph(features_graph(manifest), staging.path / "features.onnx")  # for programs in other languages
    if (language_model := manifest.decoding.language_model) is not None:
        staging.add(language_model.file, bundle.path / language_model.file)
    for graph in manifest.model.graphs()[1:]:
        model = ir.load(bundle.path / graph.file)
        model.metadata_props.update(manifest.metadata())
        save_graph(model, staging.path / graph.file, limit=ONE_FILE_LIMIT)
    if manifest.model.decoder != "none":
        decoder = decoder_graph(bundle, DECODER_SIZES, manifest.metadata())
        save_graph(decoder, staging.path / DECODER_FILE, limit=ONE_FILE_LIMIT)


def _calibrate(
    bundle: Bundle, recordings: Sequence[Any], float_nodes: list[str], *, qdq: bool, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Write the chunks of recordings and optionally a quantized graph; return the fields for `static.json`."""
    graph, quantized = bundle.path / "static.onnx", bundle.path / "static_qdq.onnx"
    progress(f"recognising {len(recordings)} recordings")
    texts, samples = recognised(bundle, graph, recordings)
    write_samples(samples, bundle.path / "calibration")
    if not qdq:
        return {"calibration": len(samples)}
    progress(f"writing {quantized.name}")
    write_qdq(graph, quantized, samples, float_nodes)
    found = damage(graph, quantized, samples, texts, recognised(bundle, quantized, recordings)[0])
    progress(f"quantization changes {found}")
    return {"calibration": len(samples), "damage": found}


def _about(manifest: Manifest, form: StaticForm, graph: ir.Model, folder: Path) -> dict[str, Any]:
    """Return the content of `static.json`."""
    config, contract = manifest.model, form.graph(manifest.model)
    layouts = {cache.name: LAYOUTS["history" if cache.time_axis is None else "keys"] for cache in config.caches}
    layouts |= {f"r_{name}": layout for name, layout in layouts.items()}
    for rate in form.rates:
        layouts |= {rate.mask: LAYOUTS["mask"], rate.positions: LAYOUTS["positions"]}
    starts = {history.cache: history.start for history in form.histories}
    nodes = [(str(node.name), node.op_type) for node in graph.graph]

    def listed(each: Tensor) -> dict[str, Any]:
        shape, layout = [config.axis(axis) for axis in each.axes], layouts.get(each.name, LAYOUTS["frames"])
        return {"name": each.name, "shape": shape, "dtype": each.dtype, "layout": layout}

    positions = {rate.positions: rate.step for rate in form.rates if rate.positions}
    return {
        "graph": "static.onnx", "opset": OPSET,
        "inputs": list(map(listed, contract.inputs)), "outputs": list(map(listed, contract.outputs)),
        "chunk_size": form.chunk_size, "num_left_chunks": form.num_left_chunks,
        "left_frames": form.chunk_size * form.num_left_chunks, "window": config.num_features(form.chunk_size),
        "hop": form.chunk_size * config.subsampling_rate, "sample_rate": manifest.features.sample_rate,
        "mask": {"exists": 0.0, "masked": MASKED, "steps": {rate.mask: rate.step for rate in form.rates}},
        "positions": {
            "mode": "input" if form.frequencies else "none", "steps": positions, "frequencies": form.frequencies,
            "interleaved": form.interleaved, "most": config.max_position, "then": form.first_position,
        },
        "first_caches": {cache.name: starts.get(cache.name, "zeros") for cache in config.caches},
        # nodes that must not be quantized: routers, whose choice could flip, and the last softmax
        "float": [name for name, op_type in nodes if "/router/" in name or op_type == "LogSoftmax"],
        "decoder": DECODER_FILE if config.decoder != "none" else None,
        "sha256": {file.name: FileDigest.of(file).sha256 for file in sorted(folder.iterdir()) if file.is_file()},
    }  # fmt: skip


class StaticParity:
    """Compares a bundle of fixed shape with its source, over whole streams. Error messages name `subject`."""

    def __init__(self, dynamic: Model, static: Model, *, subject: Path) -> None:
        self.dynamic, self.static, self.subject, self.config = dynamic, static, subject, static.config
        self.form = cast("StaticForm", static.config.static)
        self.report = ParityReport(sides="the bundle and its graph of fixed shape")

    def run(self, progress: Callable[[str], None] = lambda _: None) -> ParityReport:
        """Compare streams from several positions, some moved back, with various last chunks. Raises ParityError."""
        size, multiple, num_chunks = self.form.chunk_size, self.config.chunk_multiple, self.form.num_left_chunks + 4
        late = self.config.max_position - (num_chunks - 2) * size  # caches are full when positions are moved back
        middle, ends = self.config.max_position // 2, (1, size, size // 2 + 1, size - 1, 2)
        for begin, end in zip((0, 7 * multiple, middle, late, late - size // 2), ends, strict=True):
            offset, last = max(begin - begin % multiple, 0), min(max(end, 1), size)
            case = f"stream from position {offset}, last chunk of {last}"
            progress(case)
            self._stream(case, offset, (num_chunks - 1) * size + last)
        return self.report

    def decoders(self, folder: Path) -> None:
        """Compare the decoders in `folder` on hypotheses of up to the maximum length. Raises ParityError."""
        random, (batch, nbest, length, time) = np.random.default_rng(0), DECODER_SIZES.values()
        feeds: dict[str, Array] = {
            "hyps": random.integers(0, self.config.vocab_size, (batch, nbest, length)),
            "hyps_lens": np.linspace(0, length, nbest).astype(np.int64)[np.newaxis],
            "encoder_out": random.standard_normal((batch, time, self.config.output_size)).astype(np.float32),
            "encoder_lens": np.array([time - 9]),
        }
        expected, found = (session_of(folder / file)(feeds) for file in ("decoder.onnx", DECODER_FILE))
        for name, value in expected.items():
            self.report.add(compared(DECODER_FILE, name, [(value, found[name])]), self.subject, "it and the original")

    def _stream(self, case: str, offset: int, num_frames: int) -> None:
        config, form = self.config, self.form
        features = np.tile(parity_features(self.dynamic.manifest, 6.0), (1 + config.num_features(num_frames) // 550, 1))
        windows = Windows(config, form.chunk_size)
        windows.accept(features[: config.num_features(num_frames)])
        windows.finish()
        required = required_cache_size(form.chunk_size, form.num_left_chunks)
        caches = [model.encoder.start() for model in (self.dynamic, self.static)]
        for each in caches:
            each.offset[:] = offset
        pairs: dict[str, list[tuple[Array, Array]]] = {}
        while (window := windows.take()) is not None:
            chunk = window[np.newaxis]
            expected, caches[0] = self.dynamic.encoder.step(chunk, caches[0], required_cache_size=required)
            found, caches[1] = self.static.encoder.step(chunk, caches[1], required_cache_size=required)
            num, log_probs = expected.shape[1], cast("Array", caches[1].log_probs)
            values: dict[str, tuple[Array, Array]] = {
                "output": (np.asarray(expected), np.asarray(found[:, :num])),
                "log_probs": (self.dynamic.ctc(expected[0]), log_probs[0, :num]),
                "next_offset": (caches[0].offset, caches[1].offset),
            }
            if num == form.chunk_size:
                for cache in config.caches:
                    one, other = (np.asarray(each.tensors[cache.name]) for each in caches)
                    kept = slice(other.shape[-2] - one.shape[-2] if cache.time_axis else 0, None)
                    values[f"r_{cache.name}"] = (one, other[..., kept, :])
            for name, pair in values.items():
                pairs.setdefault(name, []).append(pair)
        for name, found_pairs in pairs.items():
            self.report.add(compared(case, name, found_pairs), self.subject, "the graph of fixed shape and the bundle")
