"""Routers of random weights, turned so that tokens spread over as many experts as is wanted: all of them, or a few.

Random routers favour some experts, because all tokens have something in common. What tokens have in common is their
mean; without its direction a router treats all experts alike, and along it any expert can be ruled out. The graphs stay
as they are: a session takes the turned routers in place of those in the file.
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
from u2moe.benchmarks.quality.levers import second_share
from u2moe.quantize.routing import ExpertInputs, RoutedLayer
from u2moe.runtime.bundle import Bundle
from u2moe.runtime.session import SessionSettings
from u2moe.runtime.windows import Windows

Gates = Mapping[str, Frames]
"""Routers [dim, experts] by the names of their weights."""

RULED_OUT = -30.0
"""Logit of an expert that is never chosen; the others' are of the size of 3."""
_ROUNDS = 3
"""A turned layer changes the tokens of those behind it, a little: the next round turns these once more."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """How chunks are routed.

    Attributes:
        layers: the mixtures of experts; `turned`: with the routers at work.
        tokens: those that reach each layer [tokens, dim].
        counts: how many each expert gets [chunks, layers, experts].
    """

    layers: list[RoutedLayer]
    turned: list[RoutedLayer]
    tokens: list[Frames]
    counts: npt.NDArray[np.int64]


def turned_gates(bundle: Bundle, frames: Frames, num_used: float | None = None) -> dict[str, Frames]:
    """Routers under which chunks of `frames` touch as many experts as can be, or `num_used` in the mean of the layers.

    Args:
        bundle: of random weights, with experts.
        frames: features [frames, mel], by which the routers are turned.
        num_used: experts that are left to choose from; None: all. Layers have whole numbers, at least those of a token.
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
    """What chunks of `frames` touch under these routers; see `expert_usage.summary`."""
    routed = _route(bundle, frames, gates)
    return summary(routed.turned, routed.counts)


def second_shares(bundle: Bundle, frames: Frames, gates: Gates) -> Frames:
    """Weights [tokens of all layers] of the second expert of each token, in chunks of `frames`, under these routers."""
    routed = _route(bundle, frames, gates)
    return np.concatenate([second_share(layer, x) for layer, x in zip(routed.turned, routed.tokens, strict=True)])


def _whole_numbers(layers: Sequence[RoutedLayer], mean: float | None) -> list[int]:
    """Experts to use in each layer, with that mean."""
    ends = [round(index * mean) if mean else index * layers[0].gate.shape[1] for index in range(len(layers) + 1)]
    return [max(end - start, layers[0].top_k) for start, end in pairwise(ends)]


def _turned(layer: RoutedLayer, tokens: Frames, num_used: int) -> Frames:
    """The router without the direction of the mean token, along which all experts but the first are ruled out."""
    mean = tokens.mean(axis=0)
    logits_of_mean = np.zeros(layer.gate.shape[1], np.float32)
    logits_of_mean[num_used:] = RULED_OUT
    change = np.outer(mean, logits_of_mean - mean @ layer.gate) / (mean @ mean)
    return np.ascontiguousarray(layer.gate + change, np.float32)


def _route(bundle: Bundle, frames: Frames, gates: Gates) -> Routed:
    """What reaches each layer, chunk by chunk, and what each expert gets, under these routers."""
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
    """Options of sessions that take these routers; must live as long as the sessions, which read them from here."""

    def __init__(self, gates: Gates) -> None:
        self._values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(gate) for name, gate in gates.items()}

    def options(self, num_threads: int = 1) -> onnxruntime.SessionOptions:
        """Options as the runtime's own, but for the routers."""
        options = SessionSettings(num_threads=num_threads).session_options()
        for name, value in self._values.items():
            options.add_initializer(name, value)
        return options
