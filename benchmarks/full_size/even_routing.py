"""Random routers, adjusted ("turned") so that tokens spread over a given number of experts, or all of them.

Random routers favour some experts because tokens have something in common: their mean. Without the direction of the
mean, a router treats all experts alike, and along it any expert can be excluded. The graphs do not change: a session
uses the adjusted routers instead of those in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.benchmarks.bench.expert_usage import summary
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, Frames
from u2moe.quantize.routing import ExpertInputs, RoutedLayer
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.model.windows import Windows

Gates = Mapping[str, Frames]
"""Routers [dim, experts] by the name of the weight."""

RULED_OUT = -30.0
"""Logit of an expert that is never chosen; the magnitude of the others is about 3."""
_ROUNDS = 3
"""Number of rounds: a turned layer slightly changes the inputs of later ones, which the next round turns again."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """The routing of chunks.

    Attributes:
        layers: the mixtures of experts; `turned`: the same with the routers in use.
        tokens: the inputs of each layer [tokens, dim].
        counts: number of tokens for each expert [chunks, layers, experts].
    """

    layers: list[RoutedLayer]
    turned: list[RoutedLayer]
    tokens: list[Frames]
    counts: npt.NDArray[np.int64]


def turned_gates(bundle: Bundle, frames: Frames, num_used: float | None = None) -> dict[str, Frames]:
    """Routers with which chunks of `frames` use as many experts as possible, or `num_used` on average over the layers.

    Args:
        bundle: a bundle with random weights and experts.
        frames: features [frames, mel] to adjust the routers with.
        num_used: number of experts to choose from; None: all. Each layer has a whole number of them, at least top-k.
    """
    gates: dict[str, Frames] = {}
    for _ in range(_ROUNDS):
        routed = _route(bundle, frames, gates)
        numbers = _whole_numbers(routed.layers, num_used)
        gates = {
            layer.gate_name: _turned(layer, tokens, used)
            for layer, tokens, used in zip(routed.layers, routed.tokens, numbers, strict=True)
        }
    return gates


def routing(bundle: Bundle, frames: Frames, gates: Gates) -> dict[str, Any]:
    """The experts that chunks of `frames` use with these routers; see `expert_usage.summary`."""
    routed = _route(bundle, frames, gates)
    return summary(routed.turned, routed.counts)


def _whole_numbers(layers: Sequence[RoutedLayer], mean: float | None) -> list[int]:
    """The number of experts to use in each layer, with the given mean."""
    ends = [round(index * mean) if mean else index * layers[0].gate.shape[1] for index in range(len(layers) + 1)]
    return [max(end - start, layers[0].top_k) for start, end in pairwise(ends)]


def _turned(layer: RoutedLayer, tokens: Frames, num_used: int) -> Frames:
    """The router without the direction of the mean token, along which all but the first `num_used` are excluded."""
    mean = tokens.mean(axis=0)
    logits_of_mean = np.zeros(layer.gate.shape[1], np.float32)
    logits_of_mean[num_used:] = RULED_OUT
    change = np.outer(mean, logits_of_mean - mean @ layer.gate) / (mean @ mean)
    return np.ascontiguousarray(layer.gate + change, np.float32)


def _route(bundle: Bundle, frames: Frames, gates: Gates) -> Routed:
    """The inputs of each layer, chunk by chunk, and the tokens of each expert, with these routers."""
    settings = TurnedSettings(gates)
    inputs = ExpertInputs(bundle, settings.options())
    layers = list(inputs.layers.values())
    turned = [replace(layer, gate=gates.get(layer.gate_name, layer.gate)) for layer in layers]
    cutter = Windows(bundle.manifest.model, CHUNK_SIZE)
    whole = (len(frames) - cutter.length) // cutter.stride * cutter.stride + cutter.length
    chunks = list(inputs.chunks(frames[:whole], CHUNK_SIZE, NUM_LEFT_CHUNKS))
    return Routed(
        layers=layers,
        turned=turned,
        tokens=[np.concatenate([chunk[layer.name] for chunk in chunks]) for layer in layers],
        counts=np.array([[layer.counts(chunk[layer.name]) for layer in turned] for chunk in chunks]),
    )


class TurnedSettings:
    """Session options that supply these routers; must outlive the sessions, which read them in place."""

    def __init__(self, gates: Gates) -> None:
        self._values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(gate) for name, gate in gates.items()}

    def options(self, num_threads: int = 1, kernels: str = "onnxruntime") -> onnxruntime.SessionOptions:
        """The runtime's options, with these routers."""
        options = SessionSettings(num_threads=num_threads, kernels=kernels).session_options()
        for name, value in self._values.items():
            options.add_initializer(name, value)
        return options
