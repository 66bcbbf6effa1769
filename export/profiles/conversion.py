"""Converts a bundle to the graphs of a profile, optionally in ORT format, and compares them with the bundle.

ORT format is onnxruntime's own. It loads faster, and builds of onnxruntime without optimizers can read it.
"""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from u2moe.export.comparison import Array, ParityReport, compared, parity_samples
from u2moe.export.profiles.graphs import PROFILES, Profile, profile_graph
from u2moe.export.profiles.parity import ProfileParity, encoded, session_of
from u2moe.runtime.bundle.manifest import TOKENS_FILE
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter, write_manifest
from u2moe.runtime.declarations import plain
from u2moe.runtime.errors import ParityError, UnsupportedError
from u2moe.runtime.graph.features import features_graph
from u2moe.runtime.graph.file import save_graph

Feeds = dict[str, Array]
ONE_FILE_LIMIT = 1_500_000_000
"""A graph with up to this many bytes of weights is a single file, as programs that use these profiles expect."""
OPERATORS_FILE = "required_operators.config"
"""The file that lists the operators of the graphs, for `--include_ops_by_config` of onnxruntime's build."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        path: the folder that was written.
        profile: the profile.
        files: names of the files in the folder.
        report: comparison of the written graphs with the bundle.
    """

    path: Path
    profile: Profile | Literal["static"]
    files: tuple[str, ...]
    report: ParityReport


def convert_bundle(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    profile: Profile,
    *,
    ort: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Conversion:
    """Write the graphs of a profile into `out`, after comparing them with the bundle.

    Args:
        bundle: folder of a bundle, quantized or not.
        out: folder to write; left unchanged on failure.
        profile: `streaming`, `offline` and `clip` each write one graph and tokens.txt; `streaming` also writes
            the decoder graph for the second pass. `ort` writes every graph of the bundle in ORT format, with
            tokens.txt, a manifest and the language model, if any.
        ort: also write the graphs in ORT format, and the list of operators that they use.
        overwrite: replace `out` if it is a folder that contains tokens.txt.
        progress: called with a line for each step.

    Raises:
        UnsupportedError: the bundle's encoder does not support the profile.
        ParityError: a written graph differs from the bundle.
        BundleError: the bundle cannot be read, or `out` cannot be written.
        ModuleNotFoundError: `clip` needs onnxruntime-extensions, which is not installed.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    opened = Bundle.open(bundle)
    if Path(out).resolve() == opened.path.resolve():
        raise UnsupportedError(f"{opened.path}: cannot convert a bundle in place: choose another folder")
    with BundleWriter(out, overwrite=overwrite, marker=TOKENS_FILE) as staging:
        staging.add(TOKENS_FILE, opened.path / TOKENS_FILE)
        if profile == "ort":
            report = write_bundle_as_ort(opened, staging.path, progress)
            if opened.manifest.decoding.language_model is not None:
                file = opened.manifest.decoding.language_model.file
                staging.add(file, opened.path / file)
            write_manifest(staging.path, opened.manifest)
        else:
            report = _write_one(opened, staging.path, profile, ort=ort, progress=progress)
        files = tuple(sorted(file.name for file in staging.path.iterdir()))
        return Conversion(path=staging.publish(), profile=profile, files=files, report=report)


def _write_one(
    bundle: Bundle, folder: Path, profile: Profile, *, ort: bool, progress: Callable[[str], None]
) -> ParityReport:
    """Write the graph of a profile and compare it with the bundle; if `ort`, also write and compare ORT files."""
    file, needs_extensions = folder / f"{profile}.onnx", profile == "clip"
    has_padding = profile in ("offline", "clip")
    if chosen := [name for name in plain(bundle.manifest.decoding) if name != "padding_s" or not has_padding]:
        progress(f"settings that the graphs do not include, left to the program: {', '.join(chosen)}")
    progress(f"writing {file.name}")
    save_graph(profile_graph(bundle, profile), file, limit=ONE_FILE_LIMIT)
    if profile == "streaming" and bundle.manifest.model.decoder != "none":
        save_graph(ir.load(bundle.path / "decoder.onnx"), folder / "decoder.onnx", limit=ONE_FILE_LIMIT)
    run = session_of(file, extensions=needs_extensions)
    report = ProfileParity(bundle, run, subject=bundle.path).compare(profile, progress)
    if not ort:
        return report
    for graph in sorted(folder.glob("*.onnx")):
        progress(f"writing {graph.stem}.ort")
        session_of(graph, extensions=needs_extensions, portable=True, target=graph.with_suffix(".ort"))
        compare_with_ort(report, graph, bundle)
    write_operators(sorted(folder.glob("*.ort")), folder / OPERATORS_FILE)
    return report


def write_operators(files: list[Path], target: Path) -> None:
    """Write the list of operators that graphs in ORT format use."""
    from onnxruntime.tools.ort_format_model import create_config_from_models  # noqa: PLC0415 - loads slowly

    with warnings.catch_warnings():
        logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
        warnings.simplefilter("ignore", ResourceWarning)  # onnxruntime leaves files open until garbage collection
        create_config_from_models(files, target, enable_type_reduction=False)
    lines = target.read_text(encoding="utf-8").splitlines(keepends=True)
    target.write_text("".join(line for line in lines if not line.startswith("#")), encoding="utf-8")  # no local paths


def write_bundle_as_ort(bundle: Bundle, folder: Path, progress: Callable[[str], None]) -> ParityReport:
    """Write all graphs of a bundle, a graph for features, and a list of operators; see `compare_with_ort`."""
    report = ParityReport(sides="the bundle and its graphs in ORT format")
    features = folder / "features.onnx"
    save_graph(features_graph(bundle.manifest), features)
    originals = {"features": features}
    originals |= {graph.name: bundle.path / graph.file for graph in bundle.manifest.model.graphs()}
    outputs = None
    for name, file in originals.items():
        progress(f"writing {name}.ort")
        session_of(file, portable=True, target=folder / f"{name}.ort")
        outputs = compare_with_ort(report, file, bundle, folder / f"{name}.ort", outputs)
    features.unlink()
    write_operators([folder / f"{name}.ort" for name in originals], folder / OPERATORS_FILE)
    return report


def compare_with_ort(
    report: ParityReport, file: Path, bundle: Bundle, converted: Path | None = None, before: Feeds | None = None
) -> Feeds:
    """Compare a bundle's graph with its ORT file on the same inputs, and return the graph's outputs.

    `converted` is the ORT file, by default the one beside the graph. `before` contains the outputs of the bundle's
    preceding graph, for graphs that read them. Raises ParityError if a difference exceeds its limit.
    """
    converted = converted or file.with_suffix(".ort")
    feeds = _feeds(file.stem, bundle, before or {})
    extensions = file.stem == "clip"
    expected = session_of(file, extensions=extensions, portable=True)(feeds)
    found = session_of(converted, extensions=extensions)(feeds)
    if "text" in expected and found.pop("text").tolist() != expected.pop("text").tolist():
        raise ParityError(f"{converted.name}: its output text differs from that of {file.name}")
    for name, value in expected.items():
        report.add(compared(converted.name, name, [(value, found[name])]), file.parent, f"it and {file.name}")
    return expected


def _feeds(graph: str, bundle: Bundle, before: Feeds) -> Feeds:
    """Return inputs for a graph: outputs of the preceding graph, samples, or random values, as the graph requires."""
    config, samples = bundle.manifest.model, parity_samples(bundle.manifest, 4.0)
    if graph == "clip":
        return {"audio": encoded(samples, bundle.manifest.features.sample_rate, "FLAC")}
    feeds: Feeds = {"samples": samples[np.newaxis]}
    if graph in ("encoder", "streaming"):
        if graph == "encoder":
            feeds = {"chunk": before["features"], "chunk_lens": np.array([before["features"].shape[1]])}
        if config.streaming:
            feeds |= {"offset": np.zeros(1, np.int64), "required_cache_size": np.array(-1)}
            for cache in config.caches:
                feeds[cache.name] = np.zeros((cache.num_blocks, 1, *cache.shape), np.float32)
    if graph in ("features", "offline", "encoder", "streaming"):
        return feeds
    if graph == "ctc":
        return {"encoder_out": before["output"]}
    random = np.random.default_rng(0)
    return {
        "hyps": random.integers(0, config.vocab_size, (1, 4, 9)),
        "hyps_lens": np.array([[9, 4, 1, 0]]),
        "encoder_out": random.standard_normal((1, 30, config.output_size)).astype(np.float32),
        "encoder_lens": np.array([30]),
    }
