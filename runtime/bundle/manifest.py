"""Data and validation of a bundle's manifest: sizes, features, text and files."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, Never, get_args

from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.files import FileDigest, plain_name
from u2moe.runtime.bundle.weight_formats import quantized
from u2moe.runtime.declarations import HARMLESS, Checked, Definite, option, plain
from u2moe.runtime.language.model import FusionWeights
from u2moe.runtime.options import STREAM_CHUNK_SIZE, BundledOptions, EndpointConfig
from u2moe.runtime.text.vocabulary import TextConfig
from u2moe.runtime.validation import wrong

MANIFEST_FILE = "bundle.json"
TOKENS_FILE = "tokens.txt"
Decoder = Literal["bitransformer", "transformer", "none"]


MASKED = -24.0
"""Mask value for keys that do not exist. A masked key keeps a weight of 4e-11. The magnitude of the value is small
because the range of quantized scores must include it: with -30000, int8 would attend to all keys equally.
In float16, -1e6 is infinite."""


@dataclass(frozen=True, kw_only=True)
class StaticRate(Checked):
    """The keys that attention reads at one frame rate: those of cached frames, then those of the chunk."""

    step: int = option("integer", 1, least=1)  # Distance between consecutive keys, in frames after the subsampling
    mask: str = "mask"  # Name of the input [1, 1, 1, keys]: 0 for keys that exist, `MASKED` for others
    positions: str = ""  # Name of the input with the encodings of the keys' positions [1, keys, dim]; "": no such input


@dataclass(frozen=True, kw_only=True)
class StaticHistory:
    """A cache of earlier frames for convolutions."""

    cache: str  # Name of the cache
    start: str  # File with the cache before the first chunk, a numpy array in the graph's shape
    steps: tuple[int, ...]  # Distance between frames in each block, in frames after the subsampling


@dataclass(frozen=True, kw_only=True)
class StaticForm(Checked):
    """Fixed shape of `static.onnx`, which replaces the dynamic encoder graph in a bundle."""

    chunk_size: int = option("integer", 16, least=1)  # Encoder frames per chunk
    num_left_chunks: int = option("integer", 4, least=1)  # Chunks of left context; masks hide those before the start
    first_position: int = option("integer", 0, least=0)  # Encoder frame to which `max_position` moves positions back
    rates: tuple[StaticRate, ...] = (StaticRate(),)  # Frame rates of attention, highest first
    histories: tuple[StaticHistory, ...] = ()  # Caches of frames for convolutions, of fixed size in every bundle
    frequencies: tuple[float, ...] = ()
    """Frequencies in float32. Position encodings are the sines and cosines of positions times these frequencies."""
    interleaved: bool = True  # Whether sines and cosines alternate; otherwise all sines come first

    def graph(self, config: ModelConfig) -> contract.Graph:
        """Return the contract of `static.onnx`.

        Inputs:
            chunk: features [1, window, feature_size], with zeros after the end.
            mask and position encodings of each rate in `rates`.
            caches of keys and values [1, blocks * kv_heads, frames, 2 * head_dim], with the newest frame last.
            caches of frames before a convolution [1, blocks * frames, channels].

        Outputs:
            log_probs: [1, chunk, vocab].
            output: encoder output [1, chunk, dim].
            r_<name>: the caches for the next chunk.
        """

        def tensor(name: str, *axes: str | int) -> contract.Tensor:
            return contract.Tensor(name=name, dtype="float32", axes=(1, *axes))

        inputs = [tensor("chunk", config.num_features(self.chunk_size), "feature_size")]
        for rate in self.rates:
            num_keys = self.left_frames(config, rate.step) + self.frames(config, rate.step)
            inputs.append(tensor(rate.mask, 1, 1, num_keys))
            if rate.positions:
                inputs.append(tensor(rate.positions, num_keys, 2 * len(self.frequencies)))
        outputs = [tensor("log_probs", self.chunk_size, "vocab_size"), tensor("output", self.chunk_size, "output_size")]
        for cache in config.caches:
            shape = self.cache_shape(config, cache)
            inputs.append(tensor(cache.name, *shape[1:]))
            outputs.append(tensor(f"r_{cache.name}", *shape[1:]))
        return contract.Graph(name="static", inputs=tuple(inputs), outputs=tuple(outputs))

    def frames(self, config: ModelConfig, step: int) -> int:
        """Return the number of frames in a chunk. Each is as long as `step` frames after the subsampling."""
        return math.ceil(self.chunk_size * config.frame_reduction / step)

    def left_frames(self, config: ModelConfig, step: int) -> int:
        """Return the number of left-context frames. Each is as long as `step` frames after the subsampling."""
        return self.num_left_chunks * self.frames(config, step)

    def cache_shape(self, config: ModelConfig, cache: contract.Cache) -> tuple[int, ...]:
        """Return the shape of a cache in the graph."""
        if cache.time_axis is None:
            channels, past = cache.shape
            return (1, cache.num_blocks * past, channels)
        heads, _, width = cache.shape
        return (1, cache.num_blocks * heads, self.left_frames(config, step_of(config, cache)), width)


def step_of(config: ModelConfig, cache: contract.Cache) -> int:
    """Return the duration of one frame in a cache of keys and values, counted in frames after the subsampling."""
    return round(config.frame_reduction / cache.rate)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """Sizes and types for running the graphs. In `contract`, an axis named after a field has the field's value."""

    streaming: bool  # Whether the encoder can stream; not if it looks ahead or was not trained on chunks
    decoder: Decoder = option("choice", MISSING, choices=get_args(Decoder))
    feature_size: int = option("integer", MISSING, least=1)
    output_size: int = option("integer", MISSING, least=1)
    num_blocks: int = option("integer", MISSING, least=1)
    vocab_size: int = option("integer", MISSING, least=1)
    subsampling_rate: int = option("integer", MISSING, least=1)
    right_context: int = option("integer", MISSING, least=0)
    static_chunk_size: int = option("integer", MISSING, least=0)  # Chunk size that the encoder was trained for; 0: any
    blank: int = option("integer", MISSING, least=0)
    sos: int = option("integer", MISSING, least=0)
    eos: int = option("integer", MISSING, least=0)
    caches: tuple[contract.Cache, ...] = ()  # A stream keeps them from chunk to chunk; none without streaming
    chunk_multiple: int = option("integer", 1, least=1)  # Chunk sizes must be multiples: some layers have a lower rate
    frame_reduction: int = option("integer", 1, least=1)  # Frames after the subsampling per encoder frame
    max_position: int = option("integer", 5000, least=1)
    """Encoder frames after which a stream with limited left context moves its positions back."""
    static: StaticForm | None = None  # Fixed shape of the graph that replaces the encoder; None: the shape is dynamic

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("blank", "sos", "eos"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} must be a token id below {self.vocab_size}, got {getattr(self, name)}")
        if self.frame_reduction > self.subsampling_rate:
            reduction, most = self.frame_reduction, self.subsampling_rate
            raise ValueError(f"frame_reduction must be at most subsampling_rate, {most}, got {reduction}")
        for cache in self.caches:
            if cache.rate > self.frame_reduction:
                raise ValueError(f"rate of {cache.name} must be at most {self.frame_reduction}, got {cache.rate}")
            if self.static is not None and (len(cache.shape), cache.time_axis) not in ((2, None), (3, 3)):
                known = "[channels, frames] or [heads, 0, width]"
                raise ValueError(f"static: shape of {cache.name} must be {known}, got {list(cache.shape)}")
        if self.static is not None:
            found = {each.cache: len(each.steps) for each in self.static.histories}
            expected = {each.name: each.num_blocks for each in self.caches if each.time_axis is None}
            if found != expected:
                raise ValueError(f"static: histories must have a step per block: expected {expected}, got {found}")

    @property
    def bidirectional(self) -> bool:
        """Whether the decoder also scores right to left."""
        return self.decoder == "bitransformer"

    @property
    def window(self) -> int:
        """Feature frames that the first encoder frame needs."""
        return self.right_context + 1

    def num_features(self, num_frames: int) -> int:
        """Return the number of feature frames needed for `num_frames` encoder frames."""
        return num_frames * self.subsampling_rate - self.subsampling_rate // self.frame_reduction + self.window

    def whole_chunk(self, size: int) -> int:
        """Return the smallest supported chunk size that is at least `size`."""
        return -(-size // self.chunk_multiple) * self.chunk_multiple

    @property
    def stream_chunk_size(self) -> int:
        """Default number of encoder frames per chunk of a stream."""
        return self.static_chunk_size or self.whole_chunk(STREAM_CHUNK_SIZE)

    def graphs(self) -> tuple[contract.Graph, ...]:
        """Return the contracts of the graphs in a bundle of this model."""
        encoder = contract.encoder(streaming=self.streaming, caches=self.caches)
        encoder = encoder if self.static is None else self.static.graph(self)
        decoders = () if self.decoder == "none" else (contract.decoder(bidirectional=self.bidirectional),)
        return (encoder, contract.ctc(), *decoders)

    def axis(self, name: str | int) -> int | None:
        """Return the size of an axis of the contract, or None if it is dynamic."""
        value = name if isinstance(name, int) else getattr(self, name, None)
        return value if isinstance(value, int) else None


WINDOWS = ("povey", "hamming", "hanning", "blackman", "rectangular")  # Kaldi's window functions


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(Checked):
    """Front end used in training: Kaldi's log-mel filter banks or MFCC, computed from samples multiplied by 32768."""

    sample_rate: int = option("integer", 16000, least=1000, most=384_000, unit="Hz")
    num_mel_bins: int = option("integer", 80, least=3, most=1000)
    frame_length_ms: float = option("number", 25.0, least=1, most=1000)
    frame_shift_ms: float = option("number", 10.0, least=1, most=1000)
    window: str = option("choice", "povey", choices=WINDOWS)
    num_ceps: int = option("integer", 0, least=0, most=1000)
    """Cepstral coefficients per frame (MFCC), C0 first and liftered; 0: log-mel energies instead."""
    low_hz: float = 20.0  # Lower edge of the mel bands
    high_hz: float = 0.0  # Upper edge of the mel bands. If it is 0 or negative, it is added to the Nyquist frequency

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frame_shift_ms > self.frame_length_ms:
            raise wrong("frame_shift_ms", f"at most frame_length_ms ({self.frame_length_ms})", self.frame_shift_ms)
        if self.num_ceps > self.num_mel_bins:
            raise wrong("num_ceps", f"at most num_mel_bins ({self.num_mel_bins})", self.num_ceps)
        if not 0 <= self.low_hz < self.top_hz <= self.sample_rate / 2:
            raise ValueError(
                "low_hz must be at least 0 and below high_hz, which may be at most half the sample_rate "
                f"{self.sample_rate}, got {self.low_hz} and {self.high_hz}"
            )

    @property
    def size(self) -> int:
        """Values per frame."""
        return self.num_ceps or self.num_mel_bins

    @property
    def top_hz(self) -> float:
        """Upper edge of the mel bands."""
        return self.high_hz if self.high_hz > 0 else self.sample_rate / 2 + self.high_hz

    @property
    def frame_len(self) -> int:
        """Samples per frame, rounded down as in Kaldi."""
        return int(self.sample_rate * self.frame_length_ms / 1000)

    @property
    def shift_len(self) -> int:
        """Samples from the start of one frame to the start of the next, rounded down as in Kaldi."""
        return int(self.sample_rate * self.frame_shift_ms / 1000)


@dataclass(frozen=True, kw_only=True)
class BundledLanguageModel(FusionWeights):
    """Language model in a file of the bundle, with its fusion weights for the search."""

    file: str  # Compact language model, written by `u2moe lm attach`


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(Definite, BundledOptions[Never]):
    """Defaults of the decoding options. They are not in graph metadata: most of them are set after the export."""

    endpoint: EndpointConfig = field(default_factory=EndpointConfig)  # Rules that end utterances
    hotwords: tuple[str, ...] = ()  # Lines of a hotword file: "phrase" or "phrase :weight"
    language_model: BundledLanguageModel | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration(Checked):
    """Calibration of word confidences, fitted by `u2moe.benchmarks.studies.calibration --fit`."""

    scale: float = option("number", 1.0, above=0)  # Factor of the log-odds of a confidence
    bias: float = option("number", 0.0)  # Added to the scaled log-odds


@dataclass(frozen=True, kw_only=True)
class ExternalTensor:
    """A weight whose values are in a separate file next to its graph."""

    name: str
    file: str
    offset: int
    length: int  # Length in bytes
    type: str
    """Element type, as named by numpy or ml_dtypes: "float32", "int8", "int4"."""
    shape: tuple[int, ...]
    group: str
    """One of `contract.WEIGHT_GROUPS`, or "other"."""
    read_by: tuple[str, ...]
    """Functions of domain `u2moe` whose calls read the weight; "" stands for all other nodes."""

    def __post_init__(self) -> None:
        plain_name(self.file, "file")
        if min(self.offset, self.length, *self.shape) < 0:
            raise ValueError(f"offset, length and shape must be at least 0, got {self}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of bundle.json."""

    model: ModelConfig
    features: FeatureConfig
    text: TextConfig
    decoding: DecodingConfig
    producer: str  # Name and version of the program that wrote the bundle
    files: dict[str, FileDigest]  # Digest of every file of the bundle except the manifest, by plain name
    external: dict[str, tuple[ExternalTensor, ...]] = field(default_factory=dict)
    """External weights of each graph, by the graph's file; see `graph.file`. Graphs without external weights have no
    entry."""
    architecture: dict[str, Any] = field(default_factory=dict)  # For readers: blocks, heads, experts; ignored here
    quantization: dict[str, Any] = field(default_factory=dict)  # Recipe of a quantized bundle; empty for fp32
    calibration: Calibration | None = None  # Of confidences. It is fitted after export, so it is not in graph metadata
    random_weights: bool = option("flag", default=False, lost="the warning that its weights are random")
    """Whether the weights are random, which makes the bundle suitable only for measurements."""
    version: int = contract.FORMAT_VERSION

    def __post_init__(self) -> None:
        for kind in quantized(self.quantization.get("groups")):
            found = self.quantization.get(f"{kind.name}_version")
            if found != kind.version:
                raise ValueError(
                    f"{kind.name}_version of the quantization must be {kind.version}, got {found!r}: another "
                    f"version of u2moe wrote the {kind.bits}-bit weights; quantize the float32 bundle again"
                )
        if self.model.feature_size != self.features.size:
            expected = f"the size of the features ({self.features.size})"
            raise ValueError(f"feature_size of the model must be {expected}, got {self.model.feature_size}")
        model = self.decoding.language_model
        if self.files and model is not None and model.file not in self.files:
            raise ValueError(f"decoding: language_model: file is {model.file!r:.200}, which is not listed in files")

    @property
    def frame_s(self) -> float:
        """Seconds from one encoder frame to the next."""
        return self.model.subsampling_rate * self.features.frame_shift_ms / 1000

    def metadata(self) -> dict[str, str]:
        """Return the `metadata_props` of every graph: values that the runtime depends on and that are not defaults."""
        stated = {"version": contract.FORMAT_VERSION, **plain(self.model), **plain(self.features), **plain(self.text)}
        stated.pop(HARMLESS, None)  # the manifest, which is read with every graph, has it
        return {f"{contract.METADATA_PREFIX}{name}": as_text(value) for name, value in stated.items()}


def as_text(value: Any) -> str:
    """Return a value as graph metadata."""
    return value if isinstance(value, str) else json.dumps(plain(value))
