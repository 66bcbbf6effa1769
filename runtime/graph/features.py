"""Front end of a bundle as a graph, for programs in other languages. It uses the equations of `model.features`.

The graph and `model.features` compute in double precision, so their features rarely differ, and only in the last bit.
"""

import math

import numpy as np
import onnx_ir as ir

from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.manifest import FeatureConfig, Manifest
from u2moe.runtime.graph.attention import END
from u2moe.runtime.graph.builder import GraphBuilder, build_model
from u2moe.runtime.model.features import FLOOR, PREEMPHASIS, constants_of


def features_graph(manifest: Manifest) -> ir.Model:
    """Build the graph of `contract.features` for the feature configuration of a manifest."""

    def body(g: GraphBuilder, inputs: dict[str, ir.Value]) -> dict[str, ir.Value]:
        return {"features": fbank(g, inputs["samples"], manifest.features)}

    return build_model(contract.features(), manifest.model.axis, manifest.metadata(), body)


def fbank(g: GraphBuilder, samples: ir.Value, config: FeatureConfig) -> ir.Value:
    """Add nodes for features [batch, frames, mel] of samples [batch, samples]. Raises errors of `constants_of`."""
    constants = constants_of(config)
    banks = constants.banks()
    with g.scope("fbank"):
        emphasised = _emphasised(g, samples, config, is_first_used=bool(constants.window[0]))
        waves = g.op("Unsqueeze", g.op("Mul", emphasised, constants.window), [3])
        parts = g.op("DFT", waves, np.array(constants.num_points), axis=2, onesided=1)
        power = g.op("ReduceSum", g.op("Mul", parts, parts), [3], keepdims=0)
        energies = g.op("MatMul", g.op("Slice", power, [0], [len(banks)], [2]), banks)
        log_energies = g.op("Log", g.op("Max", energies, np.array(FLOOR)))
        if constants.cepstra is not None:
            log_energies = g.op("MatMul", log_energies, constants.cepstra)
        return g.op("Cast", log_energies, to=ir.DataType.FLOAT)


def _emphasised(g: GraphBuilder, samples: ir.Value, config: FeatureConfig, *, is_first_used: bool) -> ir.Value:
    """Return frames [batch, frames, frame_len] after mean removal and pre-emphasis, in double precision."""
    # The first sample of a frame is correct only if `is_first_used`. Most window functions multiply it by 0.
    length, shift = config.frame_len, config.shift_len
    # Frames overlap by whole blocks. Gathering blocks is much faster than gathering samples.
    block = math.gcd(length, shift)
    num_samples = g.op("Shape", samples, start=1, end=2)
    in_blocks = g.op("Mul", g.op("Div", num_samples, [block]), [block])
    signal = g.op("Cast", g.op("Slice", samples, [0], in_blocks, [1]), to=ir.DataType.DOUBLE)
    before = g.op("Pad", signal, [0, 1, 0, -1])
    emphasised = g.op("Sub", signal, g.op("Mul", before, np.array(PREEMPHASIS)))
    # One frame, plus one for each complete shift that fits after it; no frame if there are too few samples.
    room = g.op("Max", g.op("Add", num_samples, [shift - length]), [0])
    num_frames = g.op("Div", room, [shift])
    starts = g.op("Mul", g.op("Range", 0, g.op("Squeeze", num_frames, [0]), 1), [shift // block])
    places = g.op("Add", g.op("Unsqueeze", starts, [1]), np.arange(length // block)[np.newaxis])
    sums = g.op("ReduceSum", g.op("Reshape", signal, [0, -1, block]), [2], keepdims=0)
    totals = g.op("ReduceSum", g.op("Gather", sums, places, axis=1), [2])
    frames = g.op("Gather", g.op("Reshape", emphasised, [0, -1, block]), places, axis=1)
    shape = g.op("Concat", g.op("Shape", samples, start=0, end=1), num_frames, [length], axis=0)
    frames = g.op("Reshape", frames, shape, allowzero=1)
    if is_first_used:  # the first sample also stands for the one before it
        first = g.op("Gather", signal, g.op("Mul", starts, [block]), axis=1)
        first = g.op("Unsqueeze", g.op("Mul", first, np.array(1 - PREEMPHASIS)), [2])
        frames = g.op("Concat", first, g.op("Slice", frames, [1], [END], [2]), axis=2)
    return g.op("Sub", frames, g.op("Mul", totals, np.array((1 - PREEMPHASIS) / length)))
