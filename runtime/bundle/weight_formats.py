"""The table of weight formats, for recipes, passes, packing, checks and tests.

A format is implemented in the file of the same name in `quantize/formats`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MATRICES = (
    "experts", "feed_forward", "attention", "subsampling", "pointwise_convolutions", "embeddings", "output_layers",
)  # fmt: skip
"""Groups whose weights can be quantized. Routers, biases, norms and depthwise convolutions are always fp32."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """A weight format."""

    name: str  # in recipes, manifests and reports, such as "int4"
    prefix: str  # of the names of functions that read such weights, like "Int4" in "Int4Linear"
    bits: int  # per weight in a file
    groups: tuple[str, ...] = ()  # those of `MATRICES` that recipes may store in this format
    block_sizes: tuple[int, ...] = ()  # allowed numbers of rows that share a step; empty: rows do not share steps
    version: int | None = None  # of the format, recorded in the manifest; None: unchanged since the first release
    halves: bool = False  # whether files store the scales and biases of layers in this format as float16
    needs_constants: bool = False  # whether graphs run only if onnxruntime folds constants, one of its optimisations
    not_native: str = ""  # why native kernels do not compute products with such weights; empty: they do

    def function(self, layer: str) -> str:
        """Return the name of the function that computes a layer such as "Linear" with weights in this format."""
        return f"{self.prefix}{layer}"


FLOAT32 = WeightFormat(name="fp32", prefix="", bits=32, groups=MATRICES, not_native="left to onnxruntime")
HALF = WeightFormat(name="fp16", prefix="Half", bits=16, not_native="left to onnxruntime")
INT8 = WeightFormat(name="int8", prefix="Int8", bits=8, groups=MATRICES)
INT4 = WeightFormat(
    name="int4",
    prefix="Int4",
    bits=4,
    groups=MATRICES,
    block_sizes=(16, 32, 64, 128),
    halves=True,
    needs_constants=True,
    version=2,  # version 1 had a float32 scale per block
)
WEIGHT_FORMATS: Mapping[str, WeightFormat] = MappingProxyType({item.name: item for item in (FLOAT32, HALF, INT8, INT4)})
"""Formats by name, from the most to the least accurate."""


LAYERS = ("Linear", "FeedForward", "GatedFeedForward", "MixtureOfExperts", "Embedding")
"""Kinds of layers that support every weight format, as used in function names."""
FORMATS_OF_LAYERS = {item.function(layer): item for item in WEIGHT_FORMATS.values() for layer in LAYERS}
"""Weight format that each function of a layer reads."""


def quantized(groups: Mapping[str, str] | None) -> list[WeightFormat]:
    """Of the formats in a manifest's `groups`, return those below 16 bits per weight. Unknown names are ignored."""
    found = set(dict(groups or {}).values())
    return [item for item in WEIGHT_FORMATS.values() if item.name in found and item.bits < HALF.bits]
