"""What quantized products compute, in plain numpy, and the activations in front of them, in torch."""

import numpy as np
import torch

ACTIVATIONS = {"relu": torch.relu, "swish": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
               "tanh": torch.tanh, "selu": torch.selu, "hardtanh": torch.nn.functional.hardtanh}  # fmt: skip


def rounded_rows(x, least=1e-20):
    """Activations after quantization to int8 and back: one scale per row, of values of at least `least`."""
    peak = np.maximum(np.abs(x).max(axis=-1, keepdims=True), least)
    return np.clip(np.rint(x / peak * 127), -128, 127) / 127 * peak
