"""From a bundle to the folder of a profile: read, build, compare, write."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from u2moe.export.comparison import ParityReport
from u2moe.export.profiles.graphs import PROFILES, Profile, profile_graph
from u2moe.export.profiles.ort_files import (
    OPERATORS_FILE,
    compare_with_ort,
    write_bundle_as_ort,
    write_operators,
    write_ort,
)
from u2moe.export.profiles.parity import ProfileParity, session_of
from u2moe.runtime.bundle.manifest import TOKENS_FILE
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter, write_manifest
from u2moe.runtime.errors import UnsupportedError
from u2moe.runtime.graph.file import save_graph

ONE_FILE_LIMIT = 1_500_000_000
"""Bytes of weights up to which a graph is a single file: one file is what these profiles are for."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The files written.

    Attributes:
        path: the folder.
        profile: the profile.
        files: names of its files.
        report: how close the graphs are to those of the bundle.
    """

    path: Path
    profile: Profile
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
    """Write the graphs of a profile into `out`, each compared with the bundle first.

    Args:
        bundle: folder of a bundle, quantized or not.
        out: folder to write; left as it was if anything fails.
        profile: `streaming`, `offline` and `clip` write one graph and tokens.txt, `streaming` also the decoder's for
            the second pass; `ort` writes every graph of the bundle in ORT format, with tokens.txt and a manifest.
        ort: also write the graphs in ORT format, and the operators that they use.
        overwrite: replace a folder of this kind that is already there.
        progress: called with a line for each step.

    Raises:
        UnsupportedError: the bundle's encoder cannot run that way.
        ParityError: a written graph differs from the bundle.
        BundleError: the bundle cannot be read, or `out` cannot be written.
        ModuleNotFoundError: `clip` needs onnxruntime-extensions, and it is not installed.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    opened = Bundle.open(bundle)
    if Path(out).resolve() == opened.path.resolve():
        raise UnsupportedError(f"{opened.path}: a bundle is not converted in place; name another folder")
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
    """Write the graph of a profile, and compare it in each format."""
    file, needs_extensions = folder / f"{profile}.onnx", profile == "clip"
    has_padding = profile in ("offline", "clip")
    if chosen := [name for name in bundle.manifest.decoding.chosen if name != "padding_s" or not has_padding]:
        progress(f"left to the program, for graphs have none of it: {', '.join(chosen)}")
    progress(f"writing {file.name}")
    save_graph(profile_graph(bundle, profile), file, limit=ONE_FILE_LIMIT)
    if profile == "streaming" and bundle.manifest.model.decoder != "none":
        save_graph(ir.load(bundle.path / "decoder.onnx"), folder / "decoder.onnx", limit=ONE_FILE_LIMIT)
    run = session_of(file, extensions=needs_extensions)
    report = ProfileParity(bundle, run, subject=bundle.path).compare(profile, progress)
    if not ort:
        return report
    graphs = sorted(folder.glob("*.onnx"))
    for graph in graphs:
        progress(f"writing {graph.stem}.ort")
        write_ort(graph, graph.with_suffix(".ort"), extensions=needs_extensions)
        compare_with_ort(report, graph, bundle)
    write_operators([graph.with_suffix(".ort") for graph in graphs], folder / OPERATORS_FILE)
    return report
