"""Products of uint8 and int8 that some processors compute wrongly, and onnxruntime's option that corrects this.

x86 without VNNI multiplies two rows of a weight at once and adds the two products in 16 bits, which saturate at 32767:
a larger sum is silently wrong. `u2moe quantize` writes weights whose pairs of rows never saturate; bundles from earlier
versions need the option.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnxruntime

from u2moe.runtime.bundle.contract import PAIR_SUMS, PAIR_SUMS_FIT, is_replaced
from u2moe.runtime.errors import ProviderError
from u2moe.runtime.log import log_debug
from u2moe.runtime.model.native import plain_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

PRECISE = ("session.x64quantprecision", "1")
"""Name and value of the option: on processors that need it, onnxruntime then uses the slower kernels for uint8 weights,
which add in 32 bits."""
OLDEST_PRECISE = (1, 30)
"""Earlier versions of onnxruntime crash if they load one of our graphs with the option."""

_PRODUCT = bytes.fromhex(
    "08073a3e0a180a01610a0162120179220d4d61744d756c496e74656765721201675a090a016112040a0208025a090a016212040a020803"
    "62090a017912040a02080642040a00100d"
)
"""The ONNX graph y = MatMulInteger(a, b) of uint8 a, int8 b and int32 y; it takes less than a millisecond to load."""
_LARGEST = [[127], [127], [127], [127]]
_PAIRED = [
    [127, 64, 0, 127, -127, -64],
    [0, 64, 127, -127, 0, -64],
    [127, 64, 1, -127, -1, -64],
    [1, 64, 127, 127, -127, -64],
]
"""The most extreme weights for which each pair of rows fits into 16 bits."""
_ACTIVATIONS = [[255, 255, 255, 255], [255, 0, 255, 0], [0, 255, 0, 255]]


_WITHOUT_PRODUCTS = ("Int8Rows", "Int8Embedding")
"""Functions of quantized graphs that multiply no uint8 by int8. All others may."""


class Products(NamedTuple):
    """Whether products of uint8 and int8 are exact on this processor: for any weights, and for pairs that fit."""

    any: bool
    paired: bool


@cache
def exact_products() -> Products:
    """Test the products of the largest values with onnxruntime; computed once per process."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_PRODUCT, options, providers=["CPUExecutionProvider"])

    def is_exact(weights: list[list[int]]) -> bool:
        # one row has a kernel of its own
        calls = [np.array(rows, np.uint8) for rows in (_ACTIVATIONS, *([row] for row in _ACTIVATIONS))]
        weight = np.array(weights, np.int8)
        return all(
            np.array_equal(session.run(None, {"a": rows, "b": weight})[0], rows.astype(np.int32) @ weight)
            for rows in calls
        )

    found = Products(any=is_exact(_LARGEST), paired=is_exact(_PAIRED))
    log_debug("products of uint8 and int8 are exact: of any weights %s, of pairs that fit %s", *found)
    return found


def has_no_other_products(functions: Collection[str], operators: Collection[str]) -> bool:
    """Whether a graph that calls these functions leaves no products of uint8 and int8 to onnxruntime.

    Args:
        functions: names of the functions that it calls.
        operators: names of the native operators that replace functions; their products are exact on every processor.
    """
    return all(is_replaced(name, operators) or plain_name(name) in _WITHOUT_PRODUCTS for name in functions)


def must_be_precise(bundle: Path, metadata: Mapping[str, str], options: onnxruntime.SessionOptions | None) -> bool:
    """Whether a quantized graph must be loaded with `PRECISE`: without it, results would be wrong on this processor.

    If so, warns that this takes longer.

    Args:
        bundle: folder of the graph.
        metadata: metadata of the graph.
        options: the caller's options, which are used unchanged.

    Raises:
        ProviderError: results would be wrong, and the option cannot be set: onnxruntime is too old for it, or the
            caller's options lack it.
    """
    products = exact_products()
    if products.paired if metadata.get(PAIR_SUMS) == PAIR_SUMS_FIT else products.any:
        return False
    name, value = PRECISE
    again = "quantize the float32 bundle again with this version of u2moe (u2moe quantize)"
    if version_of(onnxruntime.__version__) < OLDEST_PRECISE:
        oldest = ".".join(map(str, OLDEST_PRECISE))
        raise _refused(bundle, f"use onnxruntime {oldest} or newer (this is {onnxruntime.__version__}), or {again}")
    if options is None:
        warnings.warn(
            f"{bundle}: takes longer on this processor, which lacks VNNI, than it must: {again}", stacklevel=2
        )
        return True
    if _config_entry(options, name) != value:
        raise _refused(bundle, f"set {name} to {value!r} in sess_options, or {again}")
    return False


def _refused(bundle: Path, remedy: str) -> ProviderError:
    return ProviderError(
        f"{bundle}: results would be wrong on this processor, which lacks VNNI: it adds products of uint8 and int8 in "
        f"pairs of 16 bits, and the bundle's metadata has no {PAIR_SUMS} = {PAIR_SUMS_FIT!r}, so its weights may be "
        f"too large for that: {remedy}"
    )


def _config_entry(options: onnxruntime.SessionOptions, name: str) -> str | None:
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:  # it is not set
        return None


def version_of(text: str) -> tuple[int, ...]:
    """Its first two numbers, to be compared."""
    return tuple(int(part) for part in text.split(".")[:2])
