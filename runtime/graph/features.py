"""The front end of a bundle as a graph: Kaldi's log-mel filter banks in standard operators, for programs without Kaldi.

The Fourier transform is a product with one matrix, which holds the window and the pre-emphasis, too.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.runtime import contract
from u2moe.runtime.graph.builder import GraphBuilder
from u2moe.runtime.manifest import FeatureConfig, Manifest

_PREEMPHASIS = 0.97
_LOWEST_HZ = 20.0
_SCALE = 32768.0
_FLOOR = np.finfo(np.float32).eps

Matrix = npt.NDArray[np.float32]


def features_graph(manifest: Manifest) -> ir.Model:
    """`contract.features` for a manifest: any rate, any number of bins, and any frames that it can state."""
    graph = contract.features()
    g = GraphBuilder(graph.name)
    inputs = {tensor.name: g.input(tensor, manifest.model.axis) for tensor in graph.inputs}
    outputs = {"features": fbank(g, inputs["samples"], manifest.features)}
    return g.model(graph, inputs, outputs, manifest.model.axis, manifest.metadata())


def fbank(g: GraphBuilder, samples: ir.Value, config: FeatureConfig) -> ir.Value:
    """Features [batch, frames, mel] of samples [batch, samples] in [-1, 1], as nodes."""
    length, shift = config.frame_len, config.shift_len
    spectrum, banks = transform(config)
    with g.scope("fbank"):
        # One more than the whole shifts between the first frame and the last; none for less than a frame.
        room = g.op("Max", g.op("Add", g.op("Shape", samples, start=1, end=2), [shift - length]), [0])
        num_frames = g.op("Squeeze", g.op("Div", room, [shift]), [0])
        starts = g.op("Mul", g.op("Range", _scalar(0), num_frames, _scalar(1)), [shift])
        places = g.op("Add", g.op("Unsqueeze", starts, [1]), np.arange(length)[np.newaxis])
        frames = g.op("Gather", samples, places, axis=1)
        # Subtracting the first sample before the mean makes a constant offset vanish without a rounding error.
        frames = g.op("Sub", frames, g.op("Slice", frames, [0], [1], [2]))
        centred = g.op("Sub", frames, g.op("ReduceMean", frames, [2]))
        parts = g.op("MatMul", centred, spectrum)
        energies = g.op("MatMul", g.op("Mul", parts, parts), np.concatenate([banks, banks]))
        return g.op("Log", g.op("Max", energies, float(_FLOOR)))


def transform(config: FeatureConfig) -> tuple[Matrix, Matrix]:
    """The matrices of the front end, for the bins of the spectrum that a mel bank uses.

    Returns:
        From the samples of a frame, without their mean, to real and imaginary parts [samples, 2*bins]; and the mel
        banks [bins, mel].
    """
    length = config.frame_len
    num_points = 1 << (length - 1).bit_length()
    banks = _mel_banks(config, num_points)
    used = np.flatnonzero(banks.any(axis=1))
    # numpy's vectorized functions differ from processor to processor in the last bit, and bundles should not.
    circle = np.array([math.cos(2 * math.pi * step / num_points) for step in range(num_points)])
    window = [(0.5 - 0.5 * math.cos(2 * math.pi * i / (length - 1))) ** 0.85 for i in range(length)]
    steps = np.outer(np.arange(length), used)
    quarter = num_points // 4
    waves = np.concatenate([circle[steps % num_points], circle[(steps + quarter) % num_points]], axis=1)
    waves *= np.array(window)[:, np.newaxis] * _SCALE
    # Pre-emphasis of the frame, y[i] = x[i] - 0.97 x[i-1] with x[-1] = x[0], moved from the samples to the matrix.
    emphasised = waves.copy()
    emphasised[:-1] -= _PREEMPHASIS * waves[1:]
    emphasised[0] -= _PREEMPHASIS * waves[0]
    return emphasised.astype(np.float32), banks[used].astype(np.float32)


def _mel_banks(config: FeatureConfig, num_points: int) -> npt.NDArray[np.float64]:
    """Triangles on the mel scale [points / 2, mel]; like Kaldi's they leave out the Nyquist frequency."""
    lowest, highest = _mel(_LOWEST_HZ), _mel(config.sample_rate / 2)
    width = (highest - lowest) / (config.num_mel_bins + 1)
    places = np.array([_mel(point * config.sample_rate / num_points) for point in range(num_points // 2)])
    lefts = lowest + width * np.arange(config.num_mel_bins)
    rising = (places[:, np.newaxis] - lefts) / width
    banks: npt.NDArray[np.float64] = np.maximum(np.minimum(rising, 2 - rising), 0)
    return banks


def _mel(frequency: float) -> float:
    return 1127.0 * math.log(1.0 + frequency / 700.0)


def _scalar(value: int) -> npt.NDArray[np.int64]:
    return np.array(value, np.int64)
