"""The formats of weights, each declared once; recipes, passes, packing, checks and tests follow from the table.

How the numbers of a format are made and multiplied is in the file of its name in `quantize/formats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MATRICES = (
    "experts", "feed_forward", "attention", "subsampling", "pointwise_convolutions", "embeddings", "output_layers",
)  # fmt: skip
"""The groups whose weights can be quantized. Routers, biases, norms and depthwise convolutions are always fp32."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """What a bundle says of weights in a format.

    Attributes:
        name: in recipes, manifests and reports, such as "int4".
        prefix: of the names of functions that read such weights: "Int4" of "Int4Linear".
        bits: of a weight in a file.
        groups: the groups of weights that recipes may give it, of `MATRICES`.
        block_sizes: numbers of rows that may share a step; empty: none do.
        version: of the numbers in files, which manifests hold; None: they have been the same since the first release.
        halves: whether files hold the scales and biases of its layers in float16.
        needs_constants: whether onnxruntime must compute constants before it runs a graph, an optimisation.
        not_native: why native kernels have none of its functions; "": they have its products.
    """

    name: str
    prefix: str
    bits: int
    groups: tuple[str, ...] = ()
    block_sizes: tuple[int, ...] = ()
    version: int | None = None
    halves: bool = False
    needs_constants: bool = False
    not_native: str = ""

    def function(self, layer: str) -> str:
        """The name of the function that computes a kind of layer, such as "Linear", with such weights."""
        return f"{self.prefix}{layer}"


WEIGHT_FORMATS: Mapping[str, WeightFormat] = MappingProxyType(
    {
        item.name: item
        for item in (
            WeightFormat(name="fp32", prefix="", bits=32, groups=MATRICES, not_native="onnxruntime has them"),
            WeightFormat(name="fp16", prefix="Half", bits=16, not_native="onnxruntime has them"),
            WeightFormat(name="int8", prefix="Int8", bits=8, groups=MATRICES),
            WeightFormat(
                name="int4",
                prefix="Int4",
                bits=4,
                groups=MATRICES,
                block_sizes=(16, 32, 64, 128),
                version=2,  # 1 had a scale in float32 for every block
                halves=True,
                needs_constants=True,
            ),
        )
    }
)
"""By name, the best first."""
FLOAT32, HALF, INT8 = (WEIGHT_FORMATS[name] for name in ("fp32", "fp16", "int8"))


LAYERS = ("Linear", "FeedForward", "GatedFeedForward", "MixtureOfExperts", "Embedding")
"""Kinds of layers that may read weights in any format, as functions of a graph name them."""
_FORMATS = {item.function(layer): item for item in WEIGHT_FORMATS.values() for layer in LAYERS}


def format_of(function: str) -> WeightFormat | None:
    """The format of the weights that a function of this name reads; None: it is no layer of `LAYERS`."""
    return _FORMATS.get(function)


def quantized(groups: Mapping[str, str] | None) -> list[WeightFormat]:
    """The formats with fewer bits than floats among those of a manifest's groups; names of others are left out."""
    found = set(dict(groups or {}).values())
    return [item for item in WEIGHT_FORMATS.values() if item.name in found and item.bits < HALF.bits]
