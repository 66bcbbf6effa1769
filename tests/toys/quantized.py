"""Quantized products in plain numpy, and the activations before them in torch."""

import numpy as np

from u2moe.export.moe import activation
from u2moe.runtime.graph.activation import ACTIVATIONS

IN_TORCH = {kind: activation(kind) for kind in ACTIVATIONS}
LOWEST = {kind: declared.lowest for kind, declared in ACTIVATIONS.items() if declared.lowest is not None}


def rounded_rows(x, least=1e-20):
    """Return activations after quantization to int8 and back: one scale per row, for values of at least `least`."""
    peak = np.maximum(np.abs(x).max(axis=-1, keepdims=True), least)
    return np.clip(np.rint(x / peak * 127), -128, 127) / 127 * peak
