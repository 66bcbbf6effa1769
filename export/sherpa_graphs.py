"""Combines a bundle's encoder and CTC head into one graph for sherpa-onnx's WeNet clients, online and offline.

The graphs are used unchanged, except for inputs and outputs. Networks that a client cannot run are refused, because the
client would end the whole process when it loads the file.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from u2moe.export.encoders.network import ATT_CACHE, CNN_CACHE
from u2moe.export.joining import Body, Joined, inlined, joined, joined_model, tensor, zeros
from u2moe.runtime.bundle.contract import Graph
from u2moe.runtime.bundle.manifest import FeatureConfig, Manifest, ModelConfig
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.errors import UnsupportedError
from u2moe.runtime.graph.builder import GraphBuilder

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

BLANKS = ("<blk>", "<eps>", "<blank>")
"""Symbols that the client accepts as the blank; it uses the first one that it finds."""
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
    values = {
        "head": _sizes(config, ATT_CACHE)[0], "num_blocks": config.num_blocks, "output_size": config.output_size,
        "cnn_module_kernel": _sizes(config, CNN_CACHE)[1] + 1, "right_context": config.right_context,
        "chunk_size": options.chunk_size, "left_chunks": options.num_left_chunks,
    }  # fmt: skip
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
