"""Declarations of all functions that graphs call. `NATIVE` lists those that have native kernels.

A graph calls each layer as a model-local function of domain `u2moe`. `runtime.graph` and `quantize` write only the
functions declared here. `python runtime/kernels/declare.py` writes the names in `NATIVE` to the kernels' header.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from u2moe.runtime.bundle.weight_formats import LAYERS, WEIGHT_FORMATS

KERNELS_CONTRACT = 3  # Version of the inputs, attributes and results of native operators that our graphs need
PACKED_LAYOUT = 4  # Version of the weights that `u2moe quantize --packed` writes and native kernels map into memory
MOST_NUMBERS = 9  # Maximum number of functions of the same name that native kernels replace. The first has no number


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function that graphs call."""

    name: str  # if a graph has several functions of this name, a number is appended to all but the first
    inputs: tuple[str, ...]  # all allowed; empty: any. `#` stands for a number: `w1` is `w#`, `e0_w1` is `e#_w#`
    attributes: tuple[str, ...] = ()  # of its calls
    without_kernel: str = ""  # why native kernels do not compute the function; empty: they do

    @property
    def exported(self) -> bool:
        """Whether export writes the function. Quantization writes those whose names begin with a format's prefix."""
        return not self.name.startswith(tuple(each.prefix for each in WEIGHT_FORMATS.values() if each.prefix))

    def check(self, inputs: Iterable[str], attributes: Iterable[str]) -> None:
        """Raise ValueError if the inputs or attributes of a layer differ from the declaration."""
        if not self.inputs:
            return
        unknown = sorted({re.sub(r"\d+", "#", name) for name in inputs} - set(self.inputs))
        if unknown or set(attributes) != set(self.attributes):
            raise ValueError(
                f"function {self.name}: found attributes ({', '.join(attributes)}) and undeclared inputs "
                f"({', '.join(unknown) or 'none'}); FUNCTIONS declares attributes ({', '.join(self.attributes)}) "
                f"and inputs ({', '.join(self.inputs)})"
            )


def _all(names: str, inputs: str, attributes: str = "", why: str = "") -> list[Function]:
    """Declare functions that differ only in their names."""
    fields = {"inputs": tuple(inputs.split()), "attributes": tuple(attributes.split())}
    return [Function(name=name, **fields, without_kernel=why) for name in names.split()]


_PRODUCTS = "products in float32, left to onnxruntime's kernels"
_SEQUENCES = "over whole sequences, as products in float32: the kernel is for chunks and their caches"
_DISTANCES = "scores by distances or rotations, which the kernel for chunks does not compute"
_CONVOLUTIONS = "convolutions in float32, left to onnxruntime's kernels"
_NO_PRODUCTS = "no matrix products: look-ups, copies or elementwise operations"
_QUERY, _CACHE = "query key_value", "cache block first_kept"
_HEADS = "num_heads num_kv_heads size"
_MODULE = "kernel activation bias norm epsilon"
_MODULE_INPUTS = "linear gate cache block valid weight bias norm_weight norm_bias"
_MIXTURE = "num_experts top_k activation bias weights block_size"
_EXPERTS = "x gate e#_w# e#_w#_bias"

_DECLARED = (
    *_all("Linear", "x weight bias", why=_PRODUCTS),
    *_all("FeedForward", "x w# w#_bias", "activation bias", _PRODUCTS),
    *_all("GatedFeedForward", "x gate w# w#_bias", "activation bias", _PRODUCTS),
    *_all("MixtureOfExperts", _EXPERTS, _MIXTURE, _PRODUCTS),
    *_all("Attention", f"{_QUERY} bias positions", f"{_HEADS} relative", _SEQUENCES),
    *_all("RotaryAttention", f"{_QUERY} bias cosines sines", _HEADS, _SEQUENCES),
    *_all("DistanceAttention", f"{_QUERY} bias vectors", _HEADS, _SEQUENCES),
    *_all("ShiftedAttention", f"{_QUERY} bias positions content_bias position_bias places", _HEADS, _SEQUENCES),
    *_all("CachedAttention", f"{_QUERY} {_CACHE} bias positions", f"{_HEADS} relative"),
    *_all("RotaryCachedAttention", f"{_QUERY} {_CACHE} bias cosines sines", _HEADS, _DISTANCES),
    *_all("DistanceCachedAttention", f"{_QUERY} {_CACHE} bias vectors", _HEADS, _DISTANCES),
    *_all("NextCache", "cache first kept.#"),
    *_all("CachedConvolution", _MODULE_INPUTS, _MODULE),
    *_all("Convolution", _MODULE_INPUTS, f"{_MODULE} causal", _CONVOLUTIONS),
    *_all("CachedDepthwiseConvolution", "x cache block weight bias", "kernel", _CONVOLUTIONS),
    *_all("DepthwiseConvolution", "x cache block valid weight bias", "kernel causal", _CONVOLUTIONS),
    *_all("ReducingConvolution", "x valid weight bias", "kernel stride before after", _CONVOLUTIONS),
    *_all("Subsampling", "features conv# conv#_bias weight bias", "kernels strides bins", _CONVOLUTIONS),
    *_all("SubsamplingConvolutions", "features conv# conv#_bias", "kernels strides bins activation", _CONVOLUTIONS),
    *_all("Normalization", "x weight bias", "epsilon"),
    *_all("AddNormalization", "x branch weight bias", "epsilon"),
    *_all("RmsNormalization", "x weight", "epsilon", _NO_PRODUCTS),
    *_all("Activation", "x", "activation", _NO_PRODUCTS),
    *_all("Embedding", "table tokens", why=_NO_PRODUCTS),
    *_all("Sinusoids SinesAndCosines", "positions", "dim", _NO_PRODUCTS),
    *_all("SharedPrefixes", "tokens lens", "", _NO_PRODUCTS),
    *_all("StackedFrames", "features", "num_frames bins", _NO_PRODUCTS),
    *_all("TimeWindows", "x valid", "stride", _NO_PRODUCTS),
    *_all("HalfMixtureOfExperts", _EXPERTS, _MIXTURE, _PRODUCTS),
    *_all("Int8MixtureOfExperts", "x gate w#_bias e#_w# e#_w#_scale e#_w#_bias", _MIXTURE),
    *_all("Int4MixtureOfExperts", "x gate e#_w# e#_w#_steps e#_w#_scale e#_w#_bias", _MIXTURE),
    *_all("Int8Rows", "x", "activation"),
    *_all("Int8MatMul", "q row_scale weight scale bias"),
    *_all("Int8Linear", "x weight scale bias", "activation"),
    *_all("Int4Linear", "x weight steps scale bias", "in out block_size"),
    *_all("Int8FeedForward Int8GatedFeedForward", "x gate gate_scale w# w#_scale w#_bias", "activation bias"),
    *_all(
        "Int4FeedForward Int4GatedFeedForward", "x gate gate_steps gate_scale w# w#_steps w#_scale w#_bias",
        "activation bias in block_size",
    ),
    *_all("Int8FirstConvolutions", "x first_weight weight scale bias", "bins channels kernels strides"),
    *_all(
        "Int8Convolution", "x weight scale bias", "kernel stride",
        "a third convolution of the front end: the kernel is for the first two",
    ),
    *_all("Int8Embedding", "weight scale tokens", "", _NO_PRODUCTS),
    *_all("Int4Embedding", "weight steps scale tokens", "dim block_size", _NO_PRODUCTS),
)  # fmt: skip
_OF_FORMATS = (
    Function(name=item.function(layer), inputs=(), without_kernel=item.not_native)
    for item in WEIGHT_FORMATS.values()
    for layer in LAYERS
)
"""Every kind of layer in every weight format. The detailed declarations above replace some of them."""
FUNCTIONS: Mapping[str, Function] = MappingProxyType({each.name: each for each in (*_OF_FORMATS, *_DECLARED)})
"""All functions of graphs, by name."""
NATIVE = tuple(name for name, function in FUNCTIONS.items() if not function.without_kernel)
"""Names of the functions that native kernels compute."""


def plain_name(function: str) -> str:
    """Return the name of a function without the number that distinguishes functions of the same name in a graph."""
    return re.sub(r"_\d+$", "", function)


def is_replaced(function: str, operators: Collection[str]) -> bool:
    """Return whether native operators replace a function. A number up to `MOST_NUMBERS` after its name is ignored."""
    name, _, number = function.rpartition("_")
    is_twin = number.isdecimal() and 2 <= int(number) <= MOST_NUMBERS
    return (name if is_twin else function) in operators
