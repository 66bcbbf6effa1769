"""Makes a folder for sherpa-onnx's WeNet clients: one graph of encoder and CTC head for each, compared with the bundle.

Networks that a client cannot run are refused, because the client would end the whole process when it loads the file.
The comparison calls the graphs as sherpa-onnx's C++ code does.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir
import onnxruntime

from u2moe.export.comparison import Array, ParityReport, compared, parity_features
from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE
from u2moe.export.joining import Body, Joined, inlined, joined, joined_model, tensor, zeros
from u2moe.runtime.bundle.contract import Graph
from u2moe.runtime.bundle.manifest import TOKENS_FILE, FeatureConfig, Manifest, ModelConfig
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.bundle_writer import BundleWriter
from u2moe.runtime.declarations import Checked, option, plain
from u2moe.runtime.errors import ParityError, UnsupportedError
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.graph.file import save_graph
from u2moe.runtime.model.encoder import required_cache_size
from u2moe.runtime.model.settings import SessionSettings

ONE_FILE_LIMIT = 256_000_000  # bytes of weights up to which a graph is one file, like those that sherpa-onnx publishes
Pairs = list[tuple[Array, Array]]  # log-probabilities from the bundle and from a written graph
_CACHE, _HISTORY = ("num_blocks", "num_kv_heads"), ("num_blocks", "one", "conv_dim", "conv_cache")
ONLINE = Graph(
    name="model-streaming",
    inputs=(
        tensor("x", "one", "frames", "feature_size"), tensor("offset", "one", dtype="int64"),
        tensor("required_cache_size", "one", dtype="int64"), tensor("attn_cache", *_CACHE, "cache_time", "kv_dim"),
        tensor("conv_cache", *_HISTORY), tensor("attn_mask", "one", "one", "keys", dtype="bool"),
    ),
    outputs=(
        tensor("log_probs", "one", "time", "vocab_size"),
        tensor("next_att_cache", *_CACHE, "next_cache_time", "kv_dim"), tensor("next_conv_cache", *_HISTORY),
    ),
)  # fmt: skip
"""One chunk of one stream. The client binds tensors by position, not by name. It starts with zero caches. Its first
offset is the size of the attention cache. It marks valid keys in `attn_mask`."""
OFFLINE = Graph(
    name="model",
    inputs=(tensor("x", "batch", "frames", "feature_size"), tensor("x_lens", "batch", dtype="int64")),
    outputs=(tensor("log_probs", "batch", "time", "vocab_size"), tensor("log_probs_lens", "batch", dtype="int64")),
)
"""Whole utterances, padded at the end."""

BLANKS = ("<blk>", "<eps>", "<blank>")  # symbols that the client accepts as the blank; it uses the first that it finds
INSTEAD = "use u2moe convert --profile streaming, whose graph reads samples and has all caches"
"""Advice if a client cannot run the network."""


@dataclass(frozen=True, kw_only=True)
class SherpaOptions(Checked):
    """The chunks of the online graph for sherpa-onnx.

    Attributes:
        chunk_size: encoder frames per chunk. Pass the same number to the client, which does not read the number from
            the graph.
        num_left_chunks: chunks of left context. Pass the same number to the client.
    """

    chunk_size: int = option("integer", 16, least=1)
    num_left_chunks: int = option("integer", 4, least=1)


def supported_graphs(
    source: Path,
    manifest: Manifest,
    tokens: list[str],
    options: SherpaOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Graph, ...]:
    """Return the graphs that sherpa-onnx's clients can run: `ONLINE`, `OFFLINE` or both.

    If a client cannot run its graph, `progress` gets the reason. If `options` or the features, vocabulary or network
    of `source` suit neither, the UnsupportedError says why.
    """
    config, where = manifest.model, f"{source}: sherpa-onnx"
    if config.static is not None:
        raise UnsupportedError(f"{where}: graphs of fixed shape: convert the source bundle")
    features = manifest.features
    computed = FeatureConfig(sample_rate=features.sample_rate, num_mel_bins=features.num_mel_bins)
    for name, value in asdict(computed).items():
        if (found := getattr(features, name)) != value:
            raise UnsupportedError(f"{where}: {name} is {found}, but sherpa-onnx supports only {value}: {INSTEAD}")
    _check_symbols(tokens, config.blank, where)
    reasons = {ONLINE: _why_not_online(config), OFFLINE: None}
    if config.streaming and config.static_chunk_size:
        reasons[OFFLINE] = (
            f"static_chunk_size is {config.static_chunk_size}: the offline client does not use chunks, but the encoder "
            "was trained only with chunks"
        )
    if all(reasons.values()):
        raise UnsupportedError(f"{where}: {'; '.join(filter(None, reasons.values()))}")
    for graph, reason in reasons.items():
        if reason is not None:
            progress(f"no {graph.file}: {reason}")
    static, keys = config.static_chunk_size, (options.num_left_chunks + 1) * options.chunk_size
    if reasons[ONLINE] is None and static not in (0, options.chunk_size):
        raise UnsupportedError(f"{where}: static_chunk_size is {static}, but chunk_size is {options.chunk_size}")
    if reasons[ONLINE] is None and keys > config.max_position:
        told = f"chunk plus left context is {keys} frames; the maximum is {config.max_position}"
        raise UnsupportedError(f"{where}: {told}")
    return tuple(graph for graph, reason in reasons.items() if reason is None)


def _why_not_online(config: ModelConfig) -> str | None:
    if not config.streaming:
        return (
            "causal, use_dynamic_chunk: this encoder looks ahead or was not trained on chunks, so the online client "
            "cannot run it: cut speech with a voice activity detector, then use the offline client"
        )
    unknown = [cache.name for cache in config.caches if cache.name not in (ATT_CACHE, CNN_CACHE)]
    if unknown:
        return f"caches: the encoder keeps {', '.join(unknown)}, which the online client does not support: {INSTEAD}"
    heads, _, width = _sizes(config, ATT_CACHE)
    if heads * width != 2 * config.output_size:
        return (
            f"n_kv_head, head_dim: {heads} key heads of {width // 2} do not match output_size "
            f"{config.output_size}, which the online client uses for its attention cache: {INSTEAD}"
        )
    channels, _ = _sizes(config, CNN_CACHE)
    if channels != config.output_size:
        return (
            f"conv_inner_factor: {channels} channels of the convolution (half of cgmlp_linear_units) do not match "
            f"output_size {config.output_size}, which the online client uses for its convolution cache: {INSTEAD}"
        )
    return None


def _check_symbols(tokens: list[str], blank: int, where: str) -> None:
    found = next((symbol for symbol in BLANKS if symbol in tokens), None)
    if found is None or tokens.index(found) != blank:
        clash = "tokens.txt has none of them" if found is None else f"{found} is token {tokens.index(found)}"
        raise UnsupportedError(
            f"{where}: blank: the client searches tokens.txt for {', '.join(BLANKS)}, in this order, and uses the "
            f"first that it finds as the blank. The blank must be token {blank} ({tokens[blank]!r}), but {clash}"
        )
    broken = next((repr(symbol) for symbol in tokens if set(" \t\n\r\f\v") & set(symbol) and symbol != " "), "")
    if broken:
        told = f"symbol {broken} contains white space, which sherpa-onnx cannot read"
        raise UnsupportedError(f"{where}: tokens.txt: {told}")


def online_graph(bundle: Bundle, options: SherpaOptions) -> ir.Model:
    """Return the streaming graph. No node reads `attn_mask`: `offset` shows which cached frames precede the stream."""

    def body(g: GraphBuilder, inputs: dict[str, ir.Value]) -> Joined:
        required = inputs["required_cache_size"]
        feeds = {
            "chunk": inputs["x"],
            "chunk_lens": g.op("Shape", inputs["x"], start=1, end=2),
            "offset": g.op("Sub", inputs["offset"], required),  # the client's offset starts at its cache's size
            "required_cache_size": g.op("Squeeze", required, [0]),
            ATT_CACHE: g.op("Unsqueeze", inputs["attn_cache"], [1]),
            CNN_CACHE: inputs["conv_cache"],
        }
        results, parts = joined(bundle, feeds)
        return {
            "log_probs": results["log_probs"],
            "next_att_cache": g.op("Squeeze", results["r_att_cache"], [1]),
            "next_conv_cache": results.get("r_cnn_cache", inputs["conv_cache"]),
        }, parts

    config = bundle.manifest.model
    heads, kernel = _sizes(config, ATT_CACHE)[0], _sizes(config, CNN_CACHE)[1] + 1
    values = {"head": heads, "num_blocks": config.num_blocks, "output_size": config.output_size}
    values |= {"cnn_module_kernel": kernel, "right_context": config.right_context}
    values |= {"chunk_size": options.chunk_size, "left_chunks": options.num_left_chunks}
    return _graph(ONLINE, bundle, {name: str(value) for name, value in values.items()}, body)


def offline_graph(bundle: Bundle) -> ir.Model:
    """Return the graph for whole utterances; a streaming encoder starts with empty caches."""
    config = bundle.manifest.model

    def body(g: GraphBuilder, inputs: dict[str, ir.Value]) -> Joined:
        batch = g.op("Shape", inputs["x"], start=0, end=1)
        feeds = {"chunk": inputs["x"], "chunk_lens": inputs["x_lens"]}
        if config.streaming:
            feeds["offset"] = zeros(g, batch, kind=np.int64)
            feeds["required_cache_size"] = g.op("Squeeze", g.constant([0]), [0])
            for cache in config.caches:
                feeds[cache.name] = zeros(g, [cache.num_blocks], batch, list(cache.shape))
        results, parts = joined(bundle, feeds)
        return {"log_probs": results["log_probs"], "log_probs_lens": results["output_lens"]}, parts

    return _graph(OFFLINE, bundle, {}, body)


def _graph(graph: Graph, bundle: Bundle, own: dict[str, str], body: Body) -> ir.Model:
    """Return a joined graph. Its metadata is `own`, what both clients read, and the manifest's."""
    config = bundle.manifest.model
    sizes = {"vocab_size": str(config.vocab_size), "subsampling_factor": str(config.subsampling_rate)}
    metadata = own | {"model_type": "wenet_ctc", "version": "1"} | sizes | bundle.manifest.metadata()
    heads, _, width = _sizes(config, ATT_CACHE)
    channels, past = _sizes(config, CNN_CACHE)
    fixed = {"one": 1, "num_kv_heads": heads, "kv_dim": width, "conv_dim": channels, "conv_cache": past}

    def axis(name: str | int) -> int | None:
        return fixed[name] if name in fixed else config.axis(name)

    return inlined(joined_model(graph, "sherpa", axis, metadata, body))


def _sizes(config: ModelConfig, name: str) -> tuple[int, ...]:
    """Return `Cache.shape` of the cache `name`. Without convolution modules, the convolution cache has no frames."""
    missing = (0, 0, 0) if name == ATT_CACHE else (config.output_size, 0)
    return next((cache.shape for cache in config.caches if cache.name == name), missing)


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
        overwrite: replace `out` if it is a folder that contains tokens.txt but no bundle.json.
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

    def step(self, window: Array) -> Array:
        """Return log-probabilities [time, vocab] for one window [length, mel]."""
        options = self.options
        mask = np.ones((1, 1, self.required + options.chunk_size), np.bool_)
        num_chunks = int(self.offset[0]) // options.chunk_size - options.num_left_chunks
        mask[..., : max(self.required - num_chunks * options.chunk_size, 0)] = False
        values = (window[np.newaxis], self.offset, np.array([self.required]), self.att, self.cnn, mask)
        names = (node.name for node in self.session.get_inputs())
        log_probs, self.att, self.cnn = self.session.run(None, dict(zip(names, values, strict=True)))
        self.offset = self.offset + log_probs.shape[1]
        return cast("Array", log_probs[0])

    def run(self, features: Array) -> list[Array]:
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
            if log_probs_lens[row] != time:
                raise ParityError(f"{self.subject}: log_probs_lens is {log_probs_lens[row]}, expected {time}")
            pairs.append((self.model.ctc(self.model.encode(self.features[:length])), log_probs[row, :time]))
        return pairs
