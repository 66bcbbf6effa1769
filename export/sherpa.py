"""A folder for sherpa-onnx, made from a bundle: read, check, build, compare, write."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from u2moe.export.comparison import ParityReport
from u2moe.export.sherpa_graphs import OFFLINE, ONLINE, SherpaOptions, offline_graph, online_graph, supported_graphs
from u2moe.export.sherpa_parity import SherpaParity
from u2moe.runtime.bundle.contract import Graph
from u2moe.runtime.bundle.manifest import TOKENS_FILE, Manifest
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.graph.file import save_graph

ONE_FILE_LIMIT = 256_000_000
"""Bytes of weights up to which a graph is a single file, like the models that sherpa-onnx publishes."""


@dataclass(frozen=True, kw_only=True)
class SherpaExport:
    """The files written.

    Attributes:
        path: the folder.
        graphs: those of `ONLINE` and `OFFLINE` that it holds.
        options: the chunks of the online graph.
        manifest: the manifest of the bundle that the graphs were made from.
        report: how close the graphs are to the bundle's own, as the runtime runs them.
    """

    path: Path
    graphs: tuple[Graph, ...]
    options: SherpaOptions
    manifest: Manifest
    report: ParityReport

    def usage(self) -> str:
        """How to load the graphs, and what a user of the client should know."""
        features, rate = self.manifest.features, self.manifest.model.subsampling_rate
        tokens, shared = self.path / TOKENS_FILE, (features.sample_rate, features.num_mel_bins)
        lines = []
        if ONLINE in self.graphs:
            lines.append(
                f"sherpa_onnx.OnlineRecognizer.from_wenet_ctc(model={str(self.path / ONLINE.file)!r}, "
                f"tokens={str(tokens)!r}, sample_rate={shared[0]}, feature_dim={shared[1]}, "
                f"chunk_size={self.options.chunk_size}, num_left_chunks={self.options.num_left_chunks})"
            )
            if rate != 4:
                lines.append(f"# it assumes frames of 40 ms: multiply its timestamps by {rate / 4:g}")
        if OFFLINE in self.graphs:
            lines.append(
                f"sherpa_onnx.OfflineRecognizer.from_wenet_ctc(model={str(self.path / OFFLINE.file)!r}, "
                f"tokens={str(tokens)!r}, sample_rate={shared[0]}, feature_dim={shared[1]})"
            )
        if ONLINE in self.graphs:
            lines.append(
                "# before input_finished, 0.66 s of silence: the client drops what the last chunk lacks\n"
                f"stream.accept_waveform({shared[0]}, numpy.zeros({shared[0]} * 66 // 100, numpy.float32))"
            )
        if chosen := self.manifest.decoding.chosen:
            lines.append(
                f"# left out of what the bundle has, since the client has a search of its own: {', '.join(chosen)}"
            )
        return "\n".join(lines)


def export_sherpa(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: SherpaOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> SherpaExport:
    """Write model-streaming.onnx, model.onnx and tokens.txt for sherpa-onnx into `out`.

    A network that only one of its clients can run gets only that graph.

    Args:
        source: a bundle, quantized or not.
        out: folder to write; left as it was if anything fails.
        options: the chunks of the online graph.
        overwrite: replace a folder of this kind that is already there.
        progress: called with a line for each step.

    Raises:
        UnsupportedError: the client cannot run the network, its features or its vocabulary.
        ParityError: a written graph differs from the bundle.
        BundleError: the bundle in `source` cannot be read, or `out` cannot be written.
    """
    options = options or SherpaOptions()
    with BundleWriter(out, overwrite=overwrite, marker=TOKENS_FILE) as staging:
        bundle = Bundle.open(source)
        graphs = supported_graphs(bundle.path, bundle.manifest, bundle.tokens, options, progress)
        for graph in graphs:
            progress(f"writing {graph.file}")
            model = online_graph(bundle, options) if graph is ONLINE else offline_graph(bundle)
            save_graph(model, staging.path / graph.file, limit=ONE_FILE_LIMIT)
        staging.add(TOKENS_FILE, "".join(f"{token} {index}\n" for index, token in enumerate(bundle.tokens)))
        report = SherpaParity(bundle, staging.path, options, subject=Path(source)).run(graphs, progress)
        return SherpaExport(
            path=staging.publish(), graphs=graphs, options=options, manifest=bundle.manifest, report=report
        )
