"""Makes a folder for sherpa-onnx from a bundle, and compares the new graphs with the bundle's.

The comparison calls the graphs as sherpa-onnx's C++ code does.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.export.comparison import ParityReport, compared, parity_features
from u2moe.export.encoders.network import ATT_CACHE
from u2moe.export.sherpa_graphs import OFFLINE, ONLINE, SherpaOptions, offline_graph, online_graph, supported_graphs
from u2moe.runtime.bundle.contract import Graph
from u2moe.runtime.bundle.manifest import TOKENS_FILE, Manifest
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.declarations import plain
from u2moe.runtime.errors import ParityError
from u2moe.runtime.graph.file import save_graph
from u2moe.runtime.model.encoder import required_cache_size
from u2moe.runtime.model.settings import SessionSettings

ONE_FILE_LIMIT = 256_000_000
"""A graph with up to this many bytes of weights is a single file, like the models that sherpa-onnx publishes."""
Pairs = list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
"""Log-probabilities from the bundle and from a written graph."""


@dataclass(frozen=True, kw_only=True)
class SherpaExport:
    """The result of an export.

    Attributes:
        path: folder of the written files.
        graphs: `ONLINE`, `OFFLINE` or both.
        options: chunk settings of the online graph.
        manifest: manifest of the source bundle.
        report: comparison of the graphs with those of the bundle.
    """

    path: Path
    graphs: tuple[Graph, ...]
    options: SherpaOptions
    manifest: Manifest
    report: ParityReport

    def usage(self) -> str:
        """Return Python code that loads the graphs, with notes for users of the client."""
        features = self.manifest.features
        rate, hz, bins = self.manifest.model.subsampling_rate, features.sample_rate, features.num_mel_bins
        shared = f"tokens={str(self.path / TOKENS_FILE)!r}, sample_rate={hz}, feature_dim={bins}"
        lines = []
        if ONLINE in self.graphs:
            lines.append(
                f"sherpa_onnx.OnlineRecognizer.from_wenet_ctc(model={str(self.path / ONLINE.file)!r}, {shared}, "
                f"chunk_size={self.options.chunk_size}, num_left_chunks={self.options.num_left_chunks})"
            )
            if rate != 4:
                lines.append(f"# the client assumes frames of 40 ms: multiply its timestamps by {rate / 4:g}")
        if OFFLINE in self.graphs:
            model = repr(str(self.path / OFFLINE.file))
            lines.append(f"sherpa_onnx.OfflineRecognizer.from_wenet_ctc(model={model}, {shared})")
        if ONLINE in self.graphs:
            lines.append(
                "# before input_finished, add 0.66 s of silence: the client drops an incomplete last chunk\n"
                f"stream.accept_waveform({hz}, numpy.zeros({hz} * 66 // 100, numpy.float32))"
            )
        if chosen := plain(self.manifest.decoding):
            lines.append(f"# settings of the bundle that the client's search does not use: {', '.join(chosen)}")
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

    If only one of sherpa-onnx's clients (online, offline) can run the network, only that client's graph is written.

    Args:
        source: a bundle, quantized or not.
        out: folder to write; left unchanged on failure.
        options: chunk settings of the online graph; None: the defaults.
        overwrite: replace `out` if it is a folder that contains tokens.txt.
        progress: called with a line for each step.

    Raises:
        UnsupportedError: sherpa-onnx does not support the network, its features or its vocabulary.
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
        path, manifest = staging.publish(), bundle.manifest
        return SherpaExport(path=path, graphs=graphs, options=options, manifest=manifest, report=report)


class OnlineClient:
    """Runs an online graph on one stream as sherpa-onnx's C++ code does. Caches have fixed sizes and begin as zeros."""

    def __init__(self, session: onnxruntime.InferenceSession, options: SherpaOptions) -> None:
        self.session, self.options = session, options
        read = session.get_modelmeta().custom_metadata_map
        self.required = required_cache_size(options.chunk_size, options.num_left_chunks)
        head, blocks, size = int(read["head"]), int(read["num_blocks"]), int(read["output_size"])
        self._att_shape = (blocks, head, self.required, size // head * 2)
        self._cnn_shape = (blocks, 1, size, int(read["cnn_module_kernel"]) - 1)
        rate = int(read["subsampling_factor"])
        self.length = (options.chunk_size - 1) * rate + int(read["right_context"]) + 1
        self.stride = options.chunk_size * rate
        self.start()

    def start(self, offset: int = 0) -> None:
        """Begin a stream at position `offset`."""
        self.offset = np.full(1, self.required + offset, np.int64)
        self.att, self.cnn = (np.zeros(shape, np.float32) for shape in (self._att_shape, self._cnn_shape))

    def step(self, window: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return log-probabilities [time, vocab] for one window [length, mel]."""
        options = self.options
        mask = np.ones((1, 1, self.required + options.chunk_size), np.bool_)
        num_chunks = int(self.offset[0]) // options.chunk_size - options.num_left_chunks
        mask[..., : max(self.required - num_chunks * options.chunk_size, 0)] = False
        values = (window[np.newaxis], self.offset, np.array([self.required]), self.att, self.cnn, mask)
        names = (node.name for node in self.session.get_inputs())
        log_probs, self.att, self.cnn = self.session.run(None, dict(zip(names, values, strict=True)))
        self.offset = self.offset + log_probs.shape[1]
        return cast("npt.NDArray[np.float32]", log_probs[0])

    def run(self, features: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        """Return the log-probabilities [time, vocab] of each complete window of features [frames, mel], in order."""
        starts = range(0, len(features) - self.length + 1, self.stride)
        return [self.step(features[start : start + self.length]) for start in starts]


class SherpaParity:
    """Compares the graphs in `folder` with those that the runtime runs. Error messages begin with `subject`."""

    def __init__(self, bundle: Bundle, folder: Path, options: SherpaOptions, *, subject: Path) -> None:
        self.subject, self.folder, self.options, self.config = subject, folder, options, bundle.manifest.model
        self.settings = SessionSettings(kernels="onnxruntime")  # sherpa-onnx has no other kernels
        self.model = bundle.load(self.settings)
        chunk_s = options.chunk_size * bundle.manifest.frame_s
        self.features = parity_features(bundle.manifest, 1 + chunk_s * (2 * options.num_left_chunks + 3))
        self.report = ParityReport(sides="the bundle and the graphs for sherpa-onnx")

    def run(self, graphs: Collection[Graph], progress: Callable[[str], None] = lambda _: None) -> ParityReport:
        """Compare the written graphs with the bundle. ParityError names the case, tensor, difference and limit."""
        cases: dict[str, Callable[[], Pairs]] = {}
        if ONLINE in graphs:
            client, chunk = OnlineClient(self._session(ONLINE), self.options), self.options.chunk_size
            late = (self.config.max_position // chunk - 3) * chunk  # positions are moved back after three chunks
            cases["online, from the start"] = lambda: self._stream(client, 0)
            cases["online, where positions wrap around"] = lambda: self._stream(client, late)
        if OFFLINE in graphs:
            cases["offline, padded batch"] = self._offline
        for case, pairs in cases.items():
            progress(case)
            sides = "the graph for sherpa-onnx and the bundle"
            self.report.add(compared(case, "log_probs", pairs()), self.subject, sides)
        return self.report

    def _session(self, graph: Graph) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(self.folder / graph.file, self.settings.session_options())

    def _stream(self, client: OnlineClient, offset: int) -> Pairs:
        """Compare the client with the bundle on a stream that begins at position `offset`.

        The bundle's caches start as long as the client's, with masked frames, because sums over other shapes round
        differently. In a quantized graph, such a difference can change a value by a whole step.
        """
        client.start(offset)
        pairs: Pairs = []
        caches = self.model.encoder.start()
        *axes, _, width = caches.tensors[ATT_CACHE].shape
        tensors = caches.tensors | {ATT_CACHE: np.zeros((*axes, client.required, width), np.float32)}
        caches = replace(caches, offset=np.array([offset]), tensors=tensors)
        for start in range(0, len(self.features) - client.length + 1, client.stride):
            window = self.features[start : start + client.length]
            output, caches = self.model.encoder.step(window[np.newaxis], caches, required_cache_size=client.required)
            pairs.append((self.model.ctc(output[0]), client.step(window)))
        return pairs

    def _offline(self) -> Pairs:
        config = self.config
        lens = np.array([len(self.features), len(self.features) // 2 + 1])
        x = np.stack((self.features, self.features))
        log_probs, log_probs_lens = self._session(OFFLINE).run(None, {"x": x, "x_lens": lens})
        pairs: Pairs = []
        for row, length in enumerate(lens.tolist()):
            time = (length - config.window) // config.subsampling_rate + 1
            expected = self.model.ctc(self.model.encode(self.features[:length]))
            if log_probs_lens[row] != time:
                raise ParityError(f"{self.subject}: log_probs_lens is {log_probs_lens[row]}, expected {time}")
            pairs.append((expected, log_probs[row, :time]))
        return pairs
