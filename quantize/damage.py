"""Damage by each quantized layer of a model, measured on recordings without transcripts, as text and as a picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from u2moe.quantize.arithmetic import NOTHING, relative_error
from u2moe.quantize.observed import Array, Levels, SwitchedGraph, observed_model
from u2moe.quantize.passes.halves import read_single
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.decoding.ctc import Hypothesis, ctc_greedy_search, ctc_prefix_beam_search
from u2moe.runtime.decoding.rescoring import attention_rescoring
from u2moe.runtime.text.word_errors import edit_distance

OUTLIER = 8.0
"""A channel is an outlier if its largest magnitude is this many times the median of all channels'."""
SHOWN_OUTLIERS, SHOWN_LAYERS = 8, 12
BEAM_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class LayerDamage:
    """One layer, by itself and among all; lists have an element for each level.

    Attributes:
        layer: its name in the graph.
        bytes: of its weights; at level 0 in float32.
        alone: divergence from float32 if only this layer is quantized, in nats; see `Damage`. For layers of encoder and
            CTC head that of the log-probabilities, for decoders that of their scores.
        errors: relative error of what the layer gives for inputs in float32.
        among_all: by how much it falls if this layer alone is left in float32 and all others of the pass are quantized
            as much as they can be, in nats.
        outliers: channels that are much larger than the others, the largest first, by the value that the layer reads.
    """

    layer: str
    bytes: Sequence[int]
    alone: Sequence[float]
    errors: Sequence[float]
    among_all: float
    outliers: Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Of a quantized bundle on recordings.

    Attributes:
        divergence: Kullback-Leibler divergence of the CTC log-probabilities from float32, in nats a frame, plus that of
            the decoders in nats a token (half the mean squared difference of the tokens' scores, which small
            divergences are equal to).
        changed_tokens: edits between the texts, as a share of the tokens in float32: of greedy search or of the second
            pass, whichever changes more.
        frames: encoder frames that were compared.
        layers: the damage of each, in the order of the graphs.
        groups: `alone` and `among_all` of all layers of a group together, at their last levels.
    """

    divergence: float
    changed_tokens: float
    frames: int
    layers: Sequence[LayerDamage]
    groups: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class _Reference:
    """The float32 model's results for a recording: encoder output, log-probabilities, texts, scores, values."""

    output: Array
    log_probs: Array
    hypotheses: Sequence[Hypothesis]
    texts: Sequence[Sequence[int]]
    scores: Array
    values: Mapping[str, Array]


class DamageMeter:
    """Measures any choice of formats of the layers of a model on recordings.

    Attributes:
        bytes: by layer, in order, the bytes of its weights at each level.
        most: the last level of each layer.
        num_frames: encoder frames of all recordings.
        num_tokens: tokens of the texts that are compared with: of the search that finds the fewest.
    """

    def __init__(self, versions: Sequence[Bundle], features: Sequence[Array], journal: Path | None = None) -> None:
        """Load the graphs.

        Args:
            versions: the bundle in float32, and others made from it, each quantized more than the one before, and none
                packed.
            features: of recordings [frames, mel], each long enough for the encoder.
            journal: a file of measurements that are not made again, and to which new ones are added; None: none.
        """
        manifest = versions[0].manifest
        self._weights, self._journal = manifest.decoding.weights(), journal
        self._known: dict[str, Any] = {}
        self._of_these = ""
        if journal is not None:
            digest = hashlib.sha256(repr([version.manifest.files for version in versions]).encode())
            for frames in features:
                digest.update(frames.tobytes())
            self._of_these = digest.hexdigest()
            lines = journal.read_text(encoding="utf-8").splitlines(keepends=True) if journal.exists() else []
            self._known = dict(json.loads(line) for line in lines if line.endswith("\n"))  # the last may be cut off
        self._graphs = {
            graph.name: SwitchedGraph(*(read_single(version.path / graph.file) for version in versions))
            for graph in manifest.model.graphs()
        }
        self.bytes = {layer: sizes for graph in self._graphs.values() for layer, sizes in graph.bytes.items()}
        self.most = {layer: len(sizes) - 1 for layer, sizes in self.bytes.items()}
        self._second = self._graphs["decoder"].bytes if "decoder" in self._graphs else {}
        self._model = observed_model(manifest, self._graphs)
        self._largest: dict[str, Array] = {}
        self._features = features
        self._references = [self._reference(frames) for frames in features]
        self._lengths = [sum(map(len, texts)) for texts in zip(*(each.texts for each in self._references), strict=True)]
        self.num_frames, self.num_tokens = (
            sum(len(each.log_probs) for each in self._references),
            min(self._lengths),
        )

    def _reference(self, frames: Array) -> _Reference:
        graphs = self._graphs.values()
        read = {name for graph in graphs for names in graph.inputs.values() for name in names}
        given = {name for graph in graphs for names in graph.outputs.values() for name in names}
        self._choose({}, [*read, *given])
        output = self._model.encode(frames)
        log_probs = self._model.ctc(output)
        hypotheses = ctc_prefix_beam_search(log_probs, BEAM_SIZE) if self._model.has_decoder else []
        texts, scores = self._read(output, log_probs, hypotheses)
        values = self._values()
        for name in read:
            largest = np.abs(values[name]).reshape(-1, values[name].shape[-1]).max(axis=0)
            self._largest[name] = np.maximum(largest, self._largest.get(name, 0))
        return _Reference(output, log_probs, hypotheses, texts, scores, {name: values[name] for name in given})

    def _choose(self, levels: Levels, names: Sequence[str] = ()) -> None:
        for graph in self._graphs.values():
            graph.levels, graph.seen = levels, {}
            graph.names = [name for name in graph.observed if name in names]

    def _values(self) -> dict[str, Array]:
        return {name: value for graph in self._graphs.values() for name, value in graph.seen.items()}

    def _read(
        self, output: Array, log_probs: Array, hypotheses: Sequence[Hypothesis]
    ) -> tuple[Sequence[Sequence[int]], Array]:
        """The texts of greedy search and of the second pass, and the decoders' scores of all hypotheses."""
        greedy = ctc_greedy_search(log_probs).tokens
        if not hypotheses:
            return [greedy], np.zeros(0, np.float32)
        scores = self._model.token_scores(output, [hypothesis.tokens for hypothesis in hypotheses])
        best = attention_rescoring(hypotheses, scores, self._weights)[0].hypothesis.tokens
        directions = [own for own in (scores.left, scores.right) if own is not None]
        return [greedy, best], np.stack(directions)[:, 0]

    def total(self, levels: Levels) -> dict[str, float]:
        """`divergence` and `changed_tokens` with layers at these levels, see `Damage`."""
        return self._once("total", levels, lambda: self._run(levels, read=True)[0])

    def _run(
        self, levels: Levels, names: Sequence[str] = (), *, read: bool = False
    ) -> tuple[dict[str, float], list[Mapping[str, Array]]]:
        """The total damage, and values of these names for each recording.

        Only what differs from float32 runs, and without `read` the decoders only if they are quantized themselves.
        """
        self._choose(levels, names)
        changed = {name for name, graph in self._graphs.items() if any(levels.get(layer) for layer in graph.bytes)}
        divergence = second = 0.0
        edits = np.zeros(len(self._lengths), int)
        values: list[Mapping[str, Array]] = []
        for frames, reference in zip(self._features, self._references, strict=True):
            output = self._model.encode(frames) if "encoder" in changed else reference.output
            log_probs = self._model.ctc(output) if changed & {"encoder", "ctc"} else reference.log_probs
            expected = reference.log_probs.astype(np.float64)
            divergence += float((np.exp(expected) * (expected - log_probs)).sum())
            if read or "decoder" in changed:
                texts, scores = self._read(output, log_probs, reference.hypotheses)
                second += float(np.square(reference.scores.astype(np.float64) - scores).sum()) / 2
                edits += list(map(edit_distance, reference.texts, texts))
            values.append(self._values())
        num_scores = sum(reference.scores.size for reference in self._references)
        divergence = divergence / max(self.num_frames, 1) + second / max(num_scores, 1)
        return {"divergence": divergence, "changed_tokens": float((edits / np.maximum(self._lengths, 1)).max())}, values

    def share(self, layer: str) -> float:
        """The layer's share of the float32 weights of the encoder's layers; 0 for layers of other graphs."""
        sizes = {name: own[0] for name, own in self._graphs["encoder"].bytes.items()}
        return sizes.get(layer, 0) / max(sum(sizes.values()), 1)

    def measure(self, progress: Callable[[str], None] = lambda _: None) -> Damage:
        """The damage of every layer at each level; runs the model once for each, and once more for the layer.

        And of every group: runs it twice for each.
        """
        layers: list[LayerDamage] = []
        for graph in self._graphs.values():
            for layer in graph.bytes:
                progress(f"damage: layer {len(layers) + 1} of {len(self.bytes)}: {layer}")
                layers.append(self._of(graph, layer))
        group_of = {layer: group for graph in self._graphs.values() for layer, group in graph.groups.items()}
        groups = {}
        for group in dict.fromkeys(group_of.values()):
            own = {layer: level for layer, level in self.most.items() if group_of[layer] == group}
            without = {**self.most, **dict.fromkeys(own, 0)}
            among_all = self._divergence(self.most) - self._divergence(without)
            groups[group] = {"alone": self._divergence(own), "among_all": among_all}
        return Damage(**self.total(self.most), frames=self.num_frames, layers=layers, groups=groups)

    def _of(self, graph: SwitchedGraph, layer: str) -> LayerDamage:
        levels = range(1, len(self.bytes[layer]))
        found = [self._once("alone", {layer: level}, partial(self._alone, graph, layer, level)) for level in levels]
        is_second = graph is self._graphs.get("decoder")
        others = {name: level for name, level in self.most.items() if (name in self._second) == is_second}
        return LayerDamage(
            layer=layer,
            bytes=self.bytes[layer],
            alone=[0.0, *(each["divergence"] for each in found)],
            errors=[0.0, *(each["error"] for each in found)],
            among_all=self._divergence(others) - self._divergence({**others, layer: 0}),
            outliers={name: large for name in graph.inputs[layer] if (large := self._outliers(name))},
        )

    def _divergence(self, levels: Levels) -> float:
        return self._once("divergence", levels, lambda: self._run(levels)[0])["divergence"]

    def _alone(self, graph: SwitchedGraph, layer: str, level: int) -> dict[str, float]:
        total, values = self._run({layer: level}, graph.outputs[layer])
        errors = []
        for name in graph.outputs[layer]:
            expected = np.concatenate([reference.values[name].ravel() for reference in self._references])
            found = np.concatenate([own[name].ravel() for own in values])
            errors.append(relative_error(expected, found))
        return {"divergence": total["divergence"], "error": max(errors)}

    def _once(self, what: str, levels: Levels, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A measurement, out of the journal if it has it."""
        own = sorted((layer, level) for layer, level in levels.items() if level)
        key = json.dumps([self._of_these, what, own])
        if key not in self._known:
            self._known[key] = measure()
            if self._journal is not None:
                with self._journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self._known[key]]) + "\n")
        found: dict[str, float] = self._known[key]
        return found

    def _outliers(self, name: str) -> list[int]:
        largest = self._largest[name]
        order = np.argsort(-largest, kind="stable")[:SHOWN_OUTLIERS]
        return [int(channel) for channel in order if largest[channel] > OUTLIER * max(np.median(largest), NOTHING)]


def describe_damage(damage: Mapping[str, Any]) -> list[str]:
    """Lines of a table of `Damage` as plain data: the layers that cost most, with a bar for what each costs alone."""
    summary = "divergence {divergence:.4f} nats, {changed_tokens:.2%} of the tokens change"
    lines = [
        f"damage on {damage['frames']} encoder frames: {summary.format(**damage)}",
        f"{'layer':44} {'alone':>8} {'among all':>10} {'error':>7} {'MB saved':>9}",
    ]
    for group, found in damage["groups"].items():
        lines.append(f"{'all ' + group:44} {found['alone']:8.4f} {found['among_all']:10.4f}")
    ordered = sorted(damage["layers"], key=lambda item: -item["alone"][-1])
    most = max([NOTHING, *(item["alone"][-1] for item in ordered)])
    for item in ordered[:SHOWN_LAYERS]:
        alone, saved = item["alone"][-1], (item["bytes"][0] - item["bytes"][-1]) / 1e6
        bar = "#" * round(20 * max(alone, 0) / most)
        row = f"{item['layer']:44} {alone:8.4f} {item['among_all']:10.4f} {item['errors'][-1]:7.2%} {saved:9.2f} {bar}"
        lines.append(row.rstrip())
        for value, found in item["outliers"].items():
            lines.append(f"  outlier channels of {value}: {', '.join(map(str, found))}")
    return lines


LINE, LEFT, WIDTH = 16, 330, 460
COLOURS = ("#e8a33d", "#4c78a8")
"""Of the lowest format and of the one above it."""


def damage_picture(damage: Mapping[str, Any]) -> str:
    """A bar for what each layer costs alone, in each format, in the order of the network.

    Args:
        damage: the report's, with the names of `formats`.
    """
    layers, formats = damage["layers"], damage["formats"]
    most = max([NOTHING, *(item["alone"][-1] for item in layers)])
    lines = []
    for row, item in enumerate(layers):
        y = LINE * (row + 2)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(item["layer"])}</text>')
        for alone, colour in zip(reversed(item["alone"][1:]), COLOURS, strict=False):
            width = round(WIDTH * max(alone, 0) / most, 1)
            lines.append(f'<rect x="{LEFT}" y="{y + 2}" width="{width}" height="{LINE - 4}" fill="{colour}"/>')
        notes = [f"{item['alone'][-1]:.4f}"]
        notes += [f"outliers: {', '.join(map(str, found))}" for found in item["outliers"].values()]
        notes += [f"now {step['format']}" for step in damage.get("steps", []) if step["layer"] == item["layer"]]
        x = LEFT + 6 + round(WIDTH * max(item["alone"][-1], 0) / most)
        lines.append(f'<text x="{x}" y="{y + 12}" fill="#666">{escape("; ".join(notes))}</text>')
    title = f"divergence of each layer alone in {' and '.join(reversed(formats[1:]))}, nats"
    size = f'width="{LEFT + WIDTH + 320}" height="{LINE * (len(layers) + 3)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n<text x="{LEFT}" y="{LINE}">{escape(title)}</text>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )
