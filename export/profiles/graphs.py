"""Joins a bundle's graphs into one: for a chunk of samples (`streaming`), a recording (`offline`), a file (`clip`)."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir

from u2moe.export.joining import Joined, joined, joined_model, tensor, zeros
from u2moe.runtime.audio.padding import SOUND
from u2moe.runtime.bundle.contract import METADATA_PREFIX, Graph, Tensor
from u2moe.runtime.bundle.manifest import FeatureConfig, Manifest, ModelConfig
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.errors import UnsupportedError
from u2moe.runtime.graph.builder import GraphBuilder, build_model
from u2moe.runtime.graph.features import fbank
from u2moe.runtime.text.vocabulary import WORD_BOUNDARY

Profile = Literal["streaming", "offline", "clip", "ort"]
PROFILES: tuple[Profile, ...] = get_args(Profile)

EXTENSIONS = "ai.onnx.contrib"  # domain of the operators of onnxruntime-extensions
LONGEST_CLIP_S, _LONGEST_CLIP = 30, 480_000
"""Limits of a clip in seconds and in samples at any rate, because AudioDecoder silently truncates longer files."""


def _results(rows: str) -> tuple[Tensor, Tensor]:
    return tensor("log_probs", rows, "time", "vocab_size"), tensor("encoder_out", rows, "time", "output_size")


_TEXT = tensor("text", "one", dtype="str")


def streaming_contract(config: ModelConfig) -> Graph:
    """Return the contract for one chunk of a stream.

    Inputs:
        samples: the window of the chunk [batch, samples], in [-1, 1]. After n encoder frames, it starts at sample
            n * `samples_per_frame` of the stream. It has `window_samples` samples, plus `samples_per_frame` for each
            frame of the chunk after the first. Both numbers are in the graph's metadata. The last window may be
            shorter.
        offset: position of the chunk [batch]: 0, then `next_offset` of the previous chunk.
        required_cache_size: encoder frames of left context to keep; negative: all. Scalar.
        caches: as for a bundle's encoder.

    Outputs:
        log_probs: [batch, time, vocab].
        encoder_out: [batch, time, dim], for the decoder.
        next_offset: [batch]; it never exceeds `max_position` if the left context is limited.
        caches: the new caches.
    """
    offset, required = tensor("offset", "batch", dtype="int64"), tensor("required_cache_size", dtype="int64")
    inputs = tensor("samples", "batch", "samples"), offset, required
    outputs = *_results("batch"), tensor("next_offset", "batch", dtype="int64")
    before, after = ([cache.tensor(prefix) for cache in config.caches] for prefix in ("", "r_"))
    return Graph(name="streaming", inputs=(*inputs, *before), outputs=(*outputs, *after))


_TOKENS = tensor("tokens", "tokens", dtype="int64")
_TIMED = _TOKENS, tensor("times", "tokens")
OFFLINE = Graph(name="offline", inputs=(tensor("samples", "one", "samples"),), outputs=(*_TIMED, *_results("one")))
"""Contract of the graph for a recording with full context.

The graph maps samples [1, samples] to the greedy tokens, their start times in seconds, the log-probabilities, and the
encoder's output. Any number of samples is allowed; too few yield no tokens and no frames. If the bundle specifies
padding, frames are those of the padded recording, but times refer to the original."""
CLIP = Graph(name="clip", inputs=(tensor("audio", "one", "bytes", dtype="uint8"),), outputs=(_TEXT, *_TIMED))
"""Contract of the graph for a short file.

The graph maps the file's bytes [1, bytes] to its text [1], its tokens, and the tokens' start times in seconds. Channels
are averaged. Files must be WAV, FLAC or MP3, shorter than 30 seconds, and at the model's rate. Other files are refused:
the run fails, and the name of the failing node states why."""


def profile_graph(bundle: Bundle, profile: Profile) -> ir.Model:
    """Return the graph of a profile that has a single graph; UnsupportedError if the encoder does not support it."""
    contract, nodes = {
        "streaming": (streaming_contract(bundle.manifest.model), _streaming),
        "offline": (OFFLINE, lambda g, bundle, inputs: _offline(g, bundle, inputs["samples"])),
        "clip": (CLIP, _clip),
    }[profile]
    manifest = bundle.manifest
    values: dict[str, Any] = {"profile": profile, "samples_per_frame": samples_per_frame(manifest)}
    values["window_samples"] = window_samples(manifest, manifest.model.num_features(1))
    metadata = manifest.metadata() | {f"{METADATA_PREFIX}{name}": str(value) for name, value in values.items()}
    return joined_model(contract, profile, _axis(manifest.model), metadata, lambda g, inputs: nodes(g, bundle, inputs))


def _streaming(g: GraphBuilder, bundle: Bundle, inputs: dict[str, ir.Value]) -> Joined:
    """Build the front end, the encoder and the CTC head for one chunk; see `streaming_contract`."""
    if not bundle.manifest.model.streaming:
        raise UnsupportedError(f"{bundle.path}: this encoder was trained for full context: use --profile offline")
    feeds = {name: value for name, value in inputs.items() if name != "samples"}
    results, parts = joined(bundle, feeds | _front_end(g, inputs["samples"], bundle.manifest.features))
    return {**results, "encoder_out": results["output"]}, parts


def _clip(g: GraphBuilder, bundle: Bundle, inputs: dict[str, ir.Value]) -> Joined:
    """Build a file decoder, then the graph of `_offline`, then a detokenizer; see `CLIP`."""
    outputs, parts = _offline(g, bundle, _decoded(g, inputs["audio"], bundle.manifest.features.sample_rate))
    return {**outputs, "text": _text(g, outputs["tokens"], bundle.tokens)}, parts


def _front_end(g: GraphBuilder, samples: ir.Value, config: FeatureConfig) -> dict[str, ir.Value]:
    frames = fbank(g, samples, config)
    lens = g.op("Expand", g.op("Shape", frames, start=1, end=2), g.op("Shape", frames, start=0, end=1))
    return {"chunk": frames, "chunk_lens": lens}


def _offline(g: GraphBuilder, bundle: Bundle, samples: ir.Value) -> Joined:
    """Build the whole graph for a recording [1, samples], including the greedy search; see `OFFLINE`."""
    config, features = bundle.manifest.model, bundle.manifest.features
    if config.streaming and config.static_chunk_size:
        raise UnsupportedError(
            f"{bundle.path}: static_chunk_size is {config.static_chunk_size}, so this encoder was trained only with "
            "chunks: use --profile streaming"
        )
    length = g.op("Shape", samples, start=1, end=2)
    samples, num_before = _padded(g, bundle.manifest, samples)
    # Too few samples for one encoder frame are padded with zeros; the resulting frame is discarded at the end.
    shortest = window_samples(bundle.manifest, config.window)
    missing = g.op("Max", g.op("Sub", [shortest], g.op("Shape", samples, start=1, end=2)), [0])
    feeds = _front_end(g, g.op("Concat", samples, zeros(g, [1], missing), axis=1), features)
    if config.streaming:
        feeds["offset"] = g.constant([0])
        feeds["required_cache_size"] = g.constant(np.array(0, np.int64))
        feeds |= {cache.name: zeros(g, [cache.num_blocks, 1, *cache.shape]) for cache in config.caches}
    results, parts = joined(bundle, feeds)
    with g.scope("greedy"):
        num_frames = g.op("Where", g.op("Equal", missing, [0]), results["output_lens"], [0])
        log_probs = g.op("Slice", results["log_probs"], [0], num_frames, [1])
        encoder_out = g.op("Slice", results["output"], [0], num_frames, [1])
        best = g.op("Squeeze", g.op("ArgMax", log_probs, axis=2, keepdims=0), [0])
        before = g.op("Slice", g.op("Concat", [-1], best, axis=0), [0], [-1], [0])
        is_blank = g.op("Equal", best, g.constant([config.blank]))
        begins = g.op("And", g.op("Not", is_blank), g.op("Not", g.op("Equal", best, before)))
        places = g.op("Squeeze", g.op("NonZero", begins), [0])
        frame_s = config.subsampling_rate * features.frame_shift_ms / 1000
        times = g.op("Mul", g.op("Cast", places, to=ir.DataType.FLOAT), float(frame_s))
        if bundle.manifest.decoding.padding_s:  # times are relative to the original recording
            casts = (g.op("Cast", num, to=ir.DataType.FLOAT) for num in (num_before, length))
            lead, end = (g.op("Div", num, float(features.sample_rate)) for num in casts)
            times = g.op("Min", g.op("Max", g.op("Sub", times, lead), 0.0), end)
        tokens = g.op("Gather", best, places)
    return {"tokens": tokens, "times": times, "log_probs": log_probs, "encoder_out": encoder_out}, parts


def _padded(g: GraphBuilder, manifest: Manifest, samples: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return samples [1, samples] padded as in `audio.padding`, and the number [1] of samples added at the start."""
    frame_len = manifest.features.frame_len
    num_silence = math.floor(manifest.decoding.padding_s * manifest.features.sample_rate + 0.5)
    if not num_silence:
        return samples, g.constant([0])
    with g.scope("padding"):
        one = g.op("Cast", g.op("Equal", g.op("Shape", samples, start=1, end=2), [0]), to=ir.DataType.INT64)
        nothing, parts = zeros(g, [1], one), []
        for begin, end in ((0, frame_len), (-frame_len, np.iinfo(np.int64).max)):
            edge = g.op("Concat", g.op("Slice", samples, [begin], [int(end)], [1]), nothing, axis=1)  # never empty
            span = g.op("Sub", *(g.op(name, edge, [1], keepdims=0) for name in ("ReduceMax", "ReduceMin")))
            is_sound = g.op("Cast", g.op("Greater", span, SOUND), to=ir.DataType.INT64)
            parts.append(g.op("Mul", is_sound, [num_silence]))
        before, after = (zeros(g, [1], num) for num in parts)
        return g.op("Concat", before, samples, after, axis=1), parts[0]


def _decoded(g: GraphBuilder, audio: ir.Value, sample_rate: int) -> ir.Value:
    """Return the samples [1, samples] of a file; for files that it refuses, see `_refused`."""
    with g.scope("decoder"):
        # An ID3 tag hides the format of an MP3 file from AudioDecoder.
        first = g.op("Slice", g.op("Pad", audio, [0, 0, 0, 3]), [0], [3], [1])
        tag = g.constant(np.frombuffer(b"ID3", np.uint8)[np.newaxis].astype(np.int64))
        matches = g.op("Cast", g.op("Equal", g.op("Cast", first, to=ir.DataType.INT64), tag), to=ir.DataType.INT64)
        is_tagged = g.op("Equal", g.op("ReduceMin", matches, [1], keepdims=0), [1])
        kind = g.op("Where", is_tagged, g.constant_strings(["mp3"]), g.constant_strings([""]))
        as_it_is = g.op("AudioDecoder", audio, kind, domain=EXTENSIONS, stereo_to_mono=1)
        samples = g.op("AudioDecoder", audio, kind, domain=EXTENSIONS, downsampling_rate=sample_rate, stereo_to_mono=1)
        length = g.op("Shape", samples, start=1, end=2)
        # AudioDecoder's resampling has aliasing, so files at other rates are refused.
        other_rate = g.op("Not", g.op("Equal", length, g.op("Shape", as_it_is, start=1, end=2)))
        longest = min(LONGEST_CLIP_S * sample_rate, _LONGEST_CLIP)
        too_long = g.op("GreaterOrEqual", length, [longest])
        length = _refused(g, other_rate, length, f"the sample rate must be {sample_rate} Hz")
        length = _refused(g, too_long, length, f"the clip must be shorter than {longest / sample_rate:g} s")
        return g.op("Slice", samples, [0], length, [1])


def _refused(g: GraphBuilder, condition: ir.Value, value: ir.Value, reason: str) -> ir.Value:
    """Return `value` [1]. If `condition` is true, the run fails in a node whose name states the reason."""
    with g.scope(f"REFUSED: {reason}"):
        return g.op("Gather", value, g.op("Cast", condition, to=ir.DataType.INT64))


def detokenizer_graph(bundle: Bundle) -> ir.Model:
    """Return the last part of the profile `clip` as a graph, which maps token ids [tokens] to text [1]."""
    contract = Graph(name="detokenizer", inputs=(_TOKENS,), outputs=(_TEXT,))
    axes, symbols = _axis(bundle.manifest.model), bundle.tokens
    return build_model(contract, axes, {}, lambda g, inputs: {"text": _text(g, inputs["tokens"], symbols)})


_SPACES = r"[\s\v\x1c-\x1f\x{85}\p{Z}]+"  # the white space of `str.split`, in RE2's syntax


def _text(g: GraphBuilder, tokens: ir.Value, symbols: list[str]) -> ir.Value:
    """Compute the text of token ids as `Vocabulary.text` does. Return it as a string tensor [1]."""
    with g.scope("text"):
        table = g.constant_strings([*(symbol.replace(WORD_BOUNDARY, " ") for symbol in symbols), ""])
        # An empty symbol is appended: without any string, StringJoin would have no input.
        ids = g.op("Concat", tokens, [len(symbols)], axis=0)
        axis = g.constant([0])
        text = g.op("StringJoin", g.op("Gather", table, ids), g.constant_strings([""]), axis, domain=EXTENSIONS)
        text = g.op("Reshape", text, [1])
        for pattern, new in ((_SPACES, " "), (r"^ | $", "")):
            strings = g.constant_strings([pattern]), g.constant_strings([new])
            text = g.op("StringRegexReplace", text, *strings, domain=EXTENSIONS)
        return text


def _axis(config: ModelConfig) -> Callable[[str | int], int | None]:
    return lambda name: 1 if name == "one" else config.axis(name)


def window_samples(manifest: Manifest, num_features: int) -> int:
    """Return the number of samples that `num_features` feature frames are computed from."""
    return (num_features - 1) * manifest.features.shift_len + manifest.features.frame_len


def samples_per_frame(manifest: Manifest) -> int:
    """Return the number of samples from one encoder frame to the next."""
    return manifest.model.subsampling_rate * manifest.features.shift_len
