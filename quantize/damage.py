"""What each quantized layer of an encoder costs on recordings, without transcripts; and which of them to spare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from u2moe.quantize.arithmetic import NOTHING, relative_error
from u2moe.quantize.switches import SwitchedGraph
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.decoding.ctc import ctc_greedy_search
from u2moe.runtime.model.encoder import Encoder
from u2moe.runtime.model.session import Session
from u2moe.runtime.text.word_errors import edit_distance

Array = npt.NDArray[Any]
OUTLIER = 8.0
"""A channel is an outlier if its largest magnitude is this many times the median of all channels'."""
SHOWN_OUTLIERS, SHOWN_LAYERS = 8, 12


@dataclass(frozen=True, kw_only=True)
class LayerDamage:
    """One layer, by itself and among all.

    Attributes:
        layer: its name in the graph.
        bytes: of its weights in float32; `quantized_bytes`: as they are now.
        alone: divergence of the log-probabilities from float32 if only this layer is quantized, in nats a frame.
        among_all: by how much the divergence falls if this layer alone is left in float32, in nats a frame.
        error: relative error of what the layer gives for inputs in float32.
        outliers: channels that are much larger than the others, the largest first, by the value that the layer reads.
    """

    layer: str
    bytes: int
    quantized_bytes: int
    alone: float
    among_all: float
    error: float
    outliers: Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Of a quantized bundle on recordings.

    Attributes:
        frames: encoder frames that were compared.
        divergence: Kullback-Leibler divergence of the CTC log-probabilities from float32, in nats a frame.
        changed_tokens: edits between the greedy texts, as a share of the tokens in float32.
        layers: the damage of each, in the order of the graphs.
    """

    frames: int
    divergence: float
    changed_tokens: float
    layers: Sequence[LayerDamage]


class DamageMeter:
    """Measures any choice of quantized layers of an encoder and its CTC head on recordings.

    Attributes:
        layers: the names of all quantized layers, in order.
        bytes: the bytes of each layer's weights in the reference and quantized.
        log_probs: what is compared with, of each recording [time, vocab].
    """

    def __init__(
        self,
        reference: Bundle,
        quantized: Bundle,
        features: Sequence[Array],
        log_probs: Sequence[Array] | None = None,
    ) -> None:
        """Load the graphs of both bundles.

        Args:
            reference: in float32, or with a better format of some layers.
            quantized: made from the same float32 bundle, and not packed.
            features: of recordings [frames, mel], each long enough for the encoder.
            log_probs: what to compare with, of each recording [time, vocab]; None: those of `reference`.
        """
        self._config = reference.manifest.model
        self._features = features
        self._encoder, self._ctc = (
            SwitchedGraph(*(ir.load(bundle.path / graph.file) for bundle in (reference, quantized)))
            for graph in self._config.graphs()[:2]
        )
        self.layers = [*self._encoder.layers, *self._ctc.layers]
        self.bytes = {**self._encoder.bytes, **self._ctc.bytes}
        inputs = sorted({name for names in self._encoder.inputs.values() for name in names})
        outputs = [name for names in self._encoder.outputs.values() for name in names]
        self._encoder.record([*inputs, *outputs])
        own: list[Array] = []
        self._outputs: list[dict[str, Array]] = []
        self._largest: dict[str, Array] = {}
        for found, values in self._run((), sorted({*inputs, *outputs})):
            own.append(found)
            self._outputs.append({name: values[name] for name in outputs})
            for name in inputs:
                largest = np.abs(values[name]).reshape(-1, values[name].shape[-1]).max(axis=0)
                self._largest[name] = np.maximum(largest, self._largest.get(name, 0))
        self.log_probs = own if log_probs is None else log_probs
        self._texts = [ctc_greedy_search(log_probs).tokens for log_probs in self.log_probs]

    def measure(self, progress: Callable[[str], None] = lambda _: None) -> Damage:
        """The damage of every layer; runs the encoder twice for each of them."""
        divergence, changed = self.total(self.layers)
        return Damage(
            frames=sum(map(len, self.log_probs)),
            divergence=divergence,
            changed_tokens=changed,
            layers=[self._of(layer, divergence, progress) for layer in self.layers],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the greedy texts that are compared with."""
        return sum(map(len, self._texts))

    def total(self, quantized: Collection[str]) -> tuple[float, float]:
        """Divergence in nats a frame and share of changed tokens, with these layers quantized and others in float32."""
        found = [log_probs for log_probs, _ in self._run(quantized)]
        texts = [ctc_greedy_search(log_probs).tokens for log_probs in found]
        changed = sum(edit_distance(*pair) for pair in zip(self._texts, texts, strict=True))
        return self._divergence(found), changed / max(self.num_tokens, 1)

    def _of(self, layer: str, divergence: float, progress: Callable[[str], None]) -> LayerDamage:
        progress(f"damage: layer {self.layers.index(layer) + 1} of {len(self.layers)}: {layer}")
        names = self._encoder.outputs.get(layer, [])
        alone, values = zip(*self._run([layer], names), strict=True)
        errors = [
            relative_error(
                *(np.concatenate([part[name].ravel() for part in parts]) for parts in (self._outputs, values))
            )
            for name in names
        ]
        before, after = self.bytes[layer]
        return LayerDamage(
            layer=layer,
            bytes=before,
            quantized_bytes=after,
            alone=self._divergence(alone),
            among_all=divergence - self.total([other for other in self.layers if other != layer])[0],
            error=max(errors, default=0.0),
            outliers={name: found for name in self._encoder.inputs.get(layer, []) if (found := self._outliers(name))},
        )

    def _run(
        self, quantized: Collection[str], names: Sequence[str] = ()
    ) -> Iterator[tuple[Array, Mapping[str, Array]]]:
        """Log-probabilities [time, vocab] and recorded values of each recording."""
        switched = _Switched(self._encoder, quantized, names)
        encoder = Encoder(cast("Session", switched), self._config)  # it needs only `run`
        for frames in self._features:
            output = encoder.whole(frames)
            found = self._ctc.run({"encoder_out": output[np.newaxis]}, quantized)["log_probs"][0]
            yield found, {name: switched.values[name] for name in names}

    def _divergence(self, found: Sequence[Array]) -> float:
        total = 0.0
        for expected, log_probs in zip(self.log_probs, found, strict=True):
            total += float((np.exp(expected, dtype=np.float64) * (expected - log_probs)).sum())
        return total / max(sum(map(len, found)), 1)

    def _outliers(self, name: str) -> list[int]:
        largest = self._largest[name]
        order = np.argsort(-largest, kind="stable")[:SHOWN_OUTLIERS]
        return [int(channel) for channel in order if largest[channel] > OUTLIER * max(np.median(largest), NOTHING)]


class _Switched:
    """The encoder with a choice of quantized layers, as a session; keeps the values of its last run."""

    def __init__(self, graph: SwitchedGraph, quantized: Collection[str], names: Sequence[str]) -> None:
        self.graph, self.quantized, self.names = graph, quantized, names
        self.values: dict[str, Array] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """As `Session.run`."""
        self.values = self.graph.run(feeds, self.quantized, self.names)
        return self.values


def layers_to_spare(
    meter: DamageMeter, damage: Damage, limit: float, progress: Callable[[str], None]
) -> tuple[list[str], float]:
    """The layers to spare so that at most a share `limit` of the tokens changes, and the share that then does.

    Layers are spared by the divergence that each byte removes, until the limit is met; of those the ones that turn out
    not to be needed, the largest first, are quantized after all. If sparing all is not enough, all are returned.
    """

    def changed(spared: Collection[str]) -> float:
        return meter.total([layer for layer in meter.layers if layer not in spared])[1]

    saved = {item.layer: max(item.bytes - item.quantized_bytes, 1) for item in damage.layers}
    gain = {item.layer: max(item.among_all, item.alone) / saved[item.layer] for item in damage.layers}
    spared: list[str] = []
    share = damage.changed_tokens
    for layer in sorted(meter.layers, key=lambda layer: -gain[layer]):
        if share <= limit:
            break
        spared.append(layer)
        share = changed(spared)
        progress(f"damage: {share:.2%} of the tokens change without {layer} and {len(spared) - 1} others")
    if share > limit:
        return spared, share
    for layer in sorted(spared, key=lambda layer: -saved[layer]):
        others = [other for other in spared if other != layer]
        if (found := changed(others)) <= limit:
            spared, share = others, found
    return sorted(spared, key=meter.layers.index), share


def describe_damage(damage: Mapping[str, Any]) -> list[str]:
    """Lines of a table of `Damage` as plain data: the layers that cost most, with a bar for what each costs alone."""
    summary = "{divergence:.4f} nats a frame, {changed_tokens:.2%} of the tokens of greedy search change"
    lines = [
        f"damage on {damage['frames']} encoder frames: {summary.format(**damage)}",
        f"{'layer':44} {'alone':>8} {'among all':>10} {'error':>7} {'MB saved':>9}",
    ]
    ordered = sorted(damage["layers"], key=lambda item: -item["alone"])
    most = max([NOTHING, *(item["alone"] for item in ordered)])
    for item in ordered[:SHOWN_LAYERS]:
        saved = (item["bytes"] - item["quantized_bytes"]) / 1e6
        bar = "#" * round(20 * max(item["alone"], 0) / most)
        row = "{layer:44} {alone:8.4f} {among_all:10.4f} {error:7.2%}"
        lines.append(f"{row.format(**item)} {saved:9.2f} {bar}".rstrip())
        for value, found in item["outliers"].items():
            lines.append(f"  outlier channels of {value}: {', '.join(map(str, found))}")
    return lines
