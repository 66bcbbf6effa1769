"""Routers of random weights, turned so that tokens spread over as many experts as is wanted: all of them, or a few.

Random routers favour some experts, because all tokens have something in common. What tokens have in common is their
mean; without its direction a router treats all experts alike, and along it any expert can be ruled out. The graphs stay
as they are: a session takes the turned routers in place of those in the file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.benchmarks.bench.expert_usage import Layer, Routers, layers_of, summary, tokens_per_expert
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, Frames, windows
from u2moe.benchmarks.quality.levers import second_share
from u2moe.runtime.bundle import Bundle
from u2moe.runtime.encoder import Encoder, required_cache_size
from u2moe.runtime.session import Session, SessionSettings

Gates = Mapping[str, Frames]
"""Routers [dim, experts] by the names of their weights."""

RULED_OUT = -30.0
"""Logit of an expert that is never chosen; the others' are of the size of 3."""
_ROUNDS = 3
"""A turned layer changes the tokens of those behind it, a little: the next round turns these once more."""


def turned_gates(bundle: Bundle, frames: Frames, num_used: float | None = None) -> dict[str, Frames]:
    """Routers under which chunks of `frames` touch as many experts as can be, or `num_used` in the mean of the layers.

    Args:
        bundle: of random weights, with experts.
        frames: features [frames, mel], by which the routers are turned.
        num_used: experts that are left to choose from; None: all. Layers have whole numbers, at least those of a token.
    """
    layers, gates = layers_of(bundle), dict[str, Frames]()
    for _ in range(_ROUNDS):
        tokens, _counts = _hear(bundle, layers, frames, gates)
        gates = {
            gate_name(layer): _turned(layer, own, used)
            for layer, own, used in zip(layers, tokens, _whole_numbers(layers, num_used), strict=True)
        }
    return gates


def routing(bundle: Bundle, frames: Frames, gates: Gates) -> dict[str, Any]:
    """What chunks of `frames` touch under these routers, as `experts.summary` tells."""
    layers = layers_of(bundle)
    return summary(layers, _hear(bundle, layers, frames, gates)[1])


def second_shares(bundle: Bundle, frames: Frames, gates: Gates) -> Frames:
    """Weights [tokens of all layers] of the second expert of each token, in chunks of `frames`, under these routers."""
    layers = layers_of(bundle)
    tokens, _ = _hear(bundle, layers, frames, gates)
    turned = [replace(layer, gate=gates.get(gate_name(layer), layer.gate)) for layer in layers]
    return np.concatenate([second_share(layer, own) for layer, own in zip(turned, tokens, strict=True)])


def gate_name(layer: Layer) -> str:
    """Name of a layer's router in the graph."""
    return f"{layer.name}.gate.weight"


def _whole_numbers(layers: Sequence[Layer], mean: float | None) -> list[int]:
    """Experts to use in each layer, with that mean."""
    ends = [round(index * mean) if mean else index * layers[0].gate.shape[1] for index in range(len(layers) + 1)]
    return [max(end - start, layers[0].top_k) for start, end in pairwise(ends)]


def _turned(layer: Layer, tokens: Frames, num_used: int) -> Frames:
    """The router without the direction of the mean token, along which all experts but the first are ruled out."""
    mean = tokens.mean(axis=0)
    logits_of_mean = np.zeros(layer.gate.shape[1], np.float32)
    logits_of_mean[num_used:] = RULED_OUT
    change = np.outer(mean, logits_of_mean - mean @ layer.gate) / (mean @ mean)
    return np.ascontiguousarray(layer.gate + change, np.float32)


def _hear(
    bundle: Bundle, layers: Sequence[Layer], frames: Frames, gates: Gates
) -> tuple[list[Frames], npt.NDArray[np.int64]]:
    """Tokens [n, dim] that reach each layer, and how many each expert gets [chunks, layers, experts]."""
    turned = [replace(layer, gate=gates.get(gate_name(layer), layer.gate)) for layer in layers]
    settings = TurnedSettings(gates)
    with tempfile.TemporaryDirectory() as folder:
        ear = _Ear(Routers(bundle, turned, Path(folder), settings.options()), layers)
        encoder = Encoder(cast("Session", ear), bundle.manifest.model)  # all that it needs of a session is `run`
        caches, required = encoder.start(), required_cache_size(CHUNK_SIZE, NUM_LEFT_CHUNKS)
        for window in windows(bundle.manifest.model, frames):
            _, caches = encoder.step(window, caches, required_cache_size=required)
    counts = [
        [tokens_per_expert(layer, own) for own in chunks] for layer, chunks in zip(turned, ear.tokens, strict=True)
    ]
    return [np.concatenate(chunks) for chunks in ear.tokens], np.array(counts).swapaxes(0, 1)


class _Ear:
    """An encoder's session that keeps, layer by layer, the tokens [time, dim] of each chunk."""

    def __init__(self, routers: Routers, layers: Sequence[Layer]) -> None:
        self._routers = routers
        self._names = [layer.tokens for layer in layers]
        self.tokens: list[list[Frames]] = [[] for _ in layers]

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        result = self._routers.run(feeds)
        for own, name in zip(self.tokens, self._names, strict=True):
            own.append(result[name].reshape(-1, result[name].shape[-1]))
        return result


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
