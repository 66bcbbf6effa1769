"""Products of uint8 and int8 that some processors get wrong, and onnxruntime's option that gets them right there.

x86 without VNNI multiplies two rows of a weight at once and adds the two products in 16 bits, which end at 32767. Where
the sum is larger, that is what it stays: the result is wrong, and nobody is told. `u2moe quantize` writes weights whose
pairs of rows never come so far; bundles of versions before that need the option.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnxruntime

from u2moe.runtime.contract import PAIR_SUMS, PAIR_SUMS_FIT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PRECISE = ("session.x64quantprecision", "1")
"""Name and value of the option: onnxruntime then takes kernels for uint8 weights, which add in 32 bits and take longer,
on processors that need it."""
OLDEST_PRECISE = (1, 30)
"""onnxruntime before it ends the process when it is given a graph of ours with the option."""

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
"""Weights of which each pair of rows fits into 16 bits, as extreme as they come."""
_ACTIVATIONS = [[255, 255, 255, 255], [255, 0, 255, 0], [0, 255, 0, 255]]


class Products(NamedTuple):
    """Which products of uint8 and int8 are exact on this processor: of any weights, and of those in fitting pairs."""

    any: bool
    paired: bool


@cache
def exact_products() -> Products:
    """What this processor makes of the largest values, by onnxruntime; computed once in a process."""
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

    return Products(any=is_exact(_LARGEST), paired=is_exact(_PAIRED))


def must_be_precise(bundle: Path, metadata: Mapping[str, str], options: onnxruntime.SessionOptions | None) -> bool:
    """Whether a quantized graph must be loaded with `PRECISE`: without it, results would be wrong on this processor.

    Warns if so: of the time that it takes, or, where it cannot be done, of wrong results. False then.

    Args:
        bundle: folder of the graph.
        metadata: what the graph says about itself.
        options: those that the caller brought, which are used as they are.
    """
    products = exact_products()
    if products.paired if metadata.get(PAIR_SUMS) == PAIR_SUMS_FIT else products.any:
        return False
    name, value = PRECISE
    advice = "quantize the float32 bundle again with this version of u2moe"
    if options is not None:
        if _config_entry(options, name) != value:
            advice = f"set {name} to {value!r} in sess_options, or {advice}"
            warnings.warn(f"{bundle}: results are wrong on this processor, which lacks VNNI: {advice}", stacklevel=2)
        return False
    if _version(onnxruntime.__version__) < OLDEST_PRECISE:
        oldest = ".".join(map(str, OLDEST_PRECISE))
        advice = f"use onnxruntime {oldest} or newer, or {advice}"
        warnings.warn(f"{bundle}: results are wrong on this processor, which lacks VNNI: {advice}", stacklevel=2)
        return False
    warnings.warn(f"{bundle}: takes longer on this processor, which lacks VNNI, than it must: {advice}", stacklevel=2)
    return True


def _config_entry(options: onnxruntime.SessionOptions, name: str) -> str | None:
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:  # it is not set
        return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
