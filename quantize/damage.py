"""Damage by each quantized layer of a model, measured on recordings without transcripts, as text and as a picture."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from u2moe.quantize.arithmetic import NOTHING
from u2moe.quantize.comparison import Heard, combined_scores, first_divergence, hear, second_divergence
from u2moe.quantize.observed import Array, Levels, SwitchedGraph, SwitchedSession, observed_model
from u2moe.quantize.passes.halves import read_single
from u2moe.runtime.bundle_folder import Bundle

OUTLIER = 8.0
"""A channel is an outlier if its largest magnitude is this many times the median of all channels'."""
SHOWN_OUTLIERS, SHOWN_LAYERS = 8, 12
MOST_THREADS = 4
"""Recordings that are measured at a time: each needs memory for what its layers give."""


@dataclass(frozen=True, kw_only=True)
class LayerDamage:
    """One layer, by itself and among all; lists have an element for each level.

    Attributes:
        layer: its name in the graph.
        bytes: of its weights; at level 0 in float32.
        alone: divergence from float32 if only this layer is quantized, in nats a frame; see `Difference`. For layers of
            encoder and CTC head that of the log-probabilities, for decoders that of the second pass.
        errors: relative error of what the layer gives for inputs in float32.
        among_all: by how much it falls if this layer alone is left in float32 and all others of the pass are quantized
            as much as they can be, in nats a frame.
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
    """Of a quantized bundle on the recordings by which formats are chosen.

    Attributes:
        divergence: of both passes from float32, in nats a frame, with all layers at their last levels.
        frames: encoder frames.
        layers: the damage of each, in the order of the graphs.
        groups: `alone` and `among_all` of all layers of a group together, at their last levels, of both passes.
    """

    divergence: float
    frames: int
    layers: Sequence[LayerDamage]
    groups: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class _Run:
    """A recording at some levels: its graphs as sessions, and what they give."""

    sessions: Mapping[str, SwitchedSession]
    heard: Heard


Sums = dict[str, Any]


class DamageMeter:
    """Measures any choice of formats of the layers of a model on recordings.

    Attributes:
        bytes: by layer, in order, the bytes of its weights at each level.
        most: the last level of each layer.
    """

    def __init__(self, versions: Sequence[Bundle], features: Sequence[Array], journal: Path | None = None) -> None:
        """Read the graphs.

        Args:
            versions: the bundle in float32, and others made from it, each quantized more than the one before, and none
                packed.
            features: of recordings [frames, mel], each long enough for the encoder.
            journal: a file of measurements that are not made again, and to which new ones are added; None: none.
        """
        self._manifest, self._features, self._journal = versions[0].manifest, features, journal
        self._known: dict[str, Any] = {}
        self._of_these = hashlib.sha256(repr([version.manifest.files for version in versions]).encode()).hexdigest()
        if journal is not None and journal.exists():
            lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
            self._known = dict(json.loads(line) for line in lines if line.endswith("\n"))  # the last may be cut off
        self._graphs = {
            graph.name: SwitchedGraph(*(read_single(version.path / graph.file) for version in versions))
            for graph in self._manifest.model.graphs()
        }
        self.bytes = {layer: sizes for graph in self._graphs.values() for layer, sizes in graph.bytes.items()}
        self.most = {layer: len(sizes) - 1 for layer, sizes in self.bytes.items()}
        self._second = self._graphs["decoder"].bytes if "decoder" in self._graphs else {}

    def _of_each(
        self, what: str, levels: Levels, measure: Callable[[Array], Sums], progress: Callable[[float], None]
    ) -> list[Sums]:
        """A measurement of every recording, several at a time, out of the journal where it has it."""
        own = sorted((layer, level) for layer, level in levels.items() if level)
        keys = [
            json.dumps([self._of_these, what, hashlib.sha256(frames.tobytes()).hexdigest(), own])
            for frames in self._features
        ]
        missing = [number for number, key in enumerate(keys) if key not in self._known]
        sizes, done = list(map(len, self._features)), sum(map(len, self._features))
        done -= sum(sizes[number] for number in missing)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
            measured = pool.map(lambda number: measure(self._features[number]), missing)
            for number, found in zip(missing, measured, strict=True):
                self._known[keys[number]] = found
                if self._journal is not None:
                    with self._journal.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([keys[number], found]) + "\n")
                done += sizes[number]
                progress(done / sum(sizes))
        return [self._known[key] for key in keys]

    def _run(self, frames: Array, levels: Levels, before: _Run | None = None, *, second: bool = True) -> _Run:
        """A recording at these levels; what `before` has computed is not computed again, the second pass if wanted."""
        sessions = {
            name: graph.session(levels, None if before is None else before.sessions[name])
            for name, graph in self._graphs.items()
        }
        model = observed_model(self._manifest, sessions)
        if before is None:
            return _Run(sessions, hear(model, frames))
        output = model.encode(frames)
        log_probs = model.ctc(output)
        hypotheses, scores = before.heard.hypotheses, before.heard.scores
        if second and hypotheses:
            scores = combined_scores(model, output, hypotheses)
        heard = dataclasses.replace(before.heard, output=output, log_probs=log_probs, scores=scores)
        return _Run(sessions, heard)

    def divergence(self, levels: Levels, progress: Callable[[float], None] = lambda _: None) -> float:
        """Of both passes from float32 with layers at these levels, in nats a frame."""

        def measure(frames: Array) -> Sums:
            reference = self._run(frames, {})
            heard = self._run(frames, levels, reference).heard
            return {"nats": _nats(reference, heard), "frames": len(heard.log_probs)}

        found = self._of_each("total", levels, measure, progress)
        return float(sum(each["nats"] for each in found) / max(sum(each["frames"] for each in found), 1))

    def share(self, layer: str) -> float:
        """The layer's share of the float32 weights of the encoder's layers; 0 for layers of other graphs."""
        sizes = {name: own[0] for name, own in self._graphs["encoder"].bytes.items()}
        return sizes.get(layer, 0) / max(sum(sizes.values()), 1)

    def measure(self, progress: Callable[[float], None] = lambda _: None) -> Damage:
        """The damage of every layer at each level, and of every group.

        For each layer only those run that come after it. `progress` is called with the share of the work that is done.
        """
        found = self._of_each("layers", self.most, self._layers, progress)
        num_frames = max(sum(each["frames"] for each in found), 1)

        def mean(*path: Any) -> float:
            return float(sum(_at(each, path) for each in found) / num_frames)

        layers = []
        for graph in self._graphs.values():
            for layer, sizes in graph.bytes.items():
                levels = range(len(sizes) - 1)
                own = [each["layers"][layer] for each in found]
                squares = [np.sum([each["errors"][level] for each in own], axis=0) for level in levels]
                largest = {name: np.max([each["largest"][name] for each in found], axis=0)
                           for name in graph.inputs[layer]}  # fmt: skip
                damage = LayerDamage(
                    layer=layer,
                    bytes=sizes,
                    alone=[0.0, *(mean("layers", layer, "alone", level) for level in levels)],
                    errors=[0.0, *(_largest_ratio(each) for each in squares)],
                    among_all=mean("layers", layer, "among_all"),
                    outliers={name: large for name, sizes in largest.items() if (large := _outliers(sizes))},
                )
                layers.append(damage)
        groups = {
            group: {name: mean("groups", group, name) for name in ("alone", "among_all")} for group in self._groups()
        }
        return Damage(divergence=mean("nats"), frames=num_frames, layers=layers, groups=groups)

    def _groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for graph in self._graphs.values():
            for layer, group in graph.groups.items():
                groups.setdefault(group, []).append(layer)
        return groups

    def _layers(self, frames: Array) -> Sums:
        """Sums over the frames of a recording, of which means are made."""
        reference = self._run(frames, {})
        second = {layer: level for layer, level in self.most.items() if layer in self._second}
        first = {layer: level for layer, level in self.most.items() if layer not in self._second}
        whole = self._run(frames, self.most, reference)
        layers: dict[str, Any] = {}
        for others in (first, second):
            is_second = others is second
            among = self._run(frames, others, reference, second=is_second)
            total = _nats(reference, among.heard, second=is_second)
            for layer, most in others.items():
                runs = [self._run(frames, {layer: level}, reference, second=is_second) for level in range(1, most + 1)]
                without = self._run(frames, {**others, layer: 0}, among, second=is_second)
                layers[layer] = {
                    "alone": [_nats(reference, run.heard, second=is_second) for run in runs],
                    "errors": [self._errors(layer, reference, run) for run in runs],
                    "among_all": total - _nats(reference, without.heard, second=is_second),
                }
        groups, nats = {}, _nats(reference, whole.heard)
        for group, names in self._groups().items():
            own = {layer: self.most[layer] for layer in names}
            alone = self._run(frames, own, reference).heard
            without = self._run(frames, {**self.most, **dict.fromkeys(own, 0)}, whole)
            groups[group] = {"alone": _nats(reference, alone), "among_all": nats - _nats(reference, without.heard)}
        largest = {
            name: _channel_sizes(reference.sessions[graph], name)
            for graph, own in self._graphs.items()
            for names in own.inputs.values()
            for name in names
        }
        num_frames = len(reference.heard.log_probs)
        return {"nats": nats, "frames": num_frames, "layers": layers, "groups": groups, "largest": largest}

    def _errors(self, layer: str, reference: _Run, run: _Run) -> list[list[float]]:
        """For each value that a layer gives, squares of its error and of itself."""
        (graph,) = (name for name, own in self._graphs.items() if layer in own.bytes)
        pairs = list(zip(reference.sessions[graph].values, run.sessions[graph].values, strict=False))
        return [
            [
                sum(_square(found[name].astype(np.float64) - expected[name]) for expected, found in pairs),
                sum(_square(expected[name].astype(np.float64)) for expected, _ in pairs),
            ]
            for name in self._graphs[graph].outputs[layer]
        ]


def _nats(reference: _Run, heard: Heard, *, second: bool | None = None) -> float:
    """Of the first pass, of the second, or of both (None)."""
    nats = 0.0 if second else first_divergence(reference.heard, heard.log_probs)
    return nats if second is False else nats + second_divergence(reference.heard, heard.scores)


def _square(values: Array) -> float:
    return float(np.square(values).sum())


def _largest_ratio(squares: Array) -> float:
    """The largest relative error of squares of errors and values [values, 2]."""
    return float(np.sqrt(squares[:, 0] / np.maximum(squares[:, 1], NOTHING)).max(initial=0.0))


def _channel_sizes(session: SwitchedSession, name: str) -> list[float]:
    """Of a value [..., channels], the largest magnitude of each channel."""
    parts = [np.abs(values[name]).reshape(-1, values[name].shape[-1]).max(axis=0) for values in session.values]
    sizes: list[float] = np.max(parts, axis=0).astype(float).tolist()
    return sizes


def _outliers(sizes: Array) -> list[int]:
    order = np.argsort(-sizes, kind="stable")[:SHOWN_OUTLIERS]
    return [int(channel) for channel in order if sizes[channel] > OUTLIER * max(np.median(sizes), NOTHING)]


def _at(tree: Any, path: Sequence[Any]) -> Any:
    """What lies at a path of keys in nested data."""
    return functools.reduce(lambda found, key: found[key], path, tree)


def describe_damage(damage: Mapping[str, Any]) -> list[str]:
    """Lines of a table of `Damage` as plain data: the layers that cost most, with a bar for what each costs alone."""
    written = damage["written"]
    lines = [
        f"damage, divergence on {damage['frames']} encoder frames: {damage['divergence']:.4f} nats a frame",
        f"of {written['tokens']} tokens in {written['seconds']:.0f} s of {written['recordings']} recordings change "
        + ", ".join(
            f"{name.replace('_', ' ')} {found['value']:.2%} ({found['low']:.2%} to {found['high']:.2%})"
            for name, found in written["changed_tokens"].items()
        ),
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
NUM_TICKS = 4
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
    bottom = LINE * (len(layers) + 2)
    for tick in range(NUM_TICKS + 1):
        x, label = LEFT + WIDTH * tick // NUM_TICKS, f"{most * tick / NUM_TICKS:.2g}"
        lines.append(f'<path d="M{x} {2 * LINE}V{bottom}" stroke="#ccc"/>')
        lines.append(f'<text x="{x}" y="{bottom + 12}" text-anchor="middle">{label}</text>')
    for index, (kind, colour) in enumerate(zip(reversed(formats[1:]), COLOURS, strict=False)):
        x = LEFT + 120 * index
        lines.append(f'<rect x="{x}" y="{LINE + 4}" width="10" height="10" fill="{colour}"/>')
        lines.append(f'<text x="{x + 16}" y="{LINE + 13}">{escape(kind)}</text>')
    title = "divergence of each layer alone, nats a frame"
    size = f'width="{LEFT + WIDTH + 320}" height="{bottom + 2 * LINE}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n<text x="{LEFT}" y="{LINE}">{escape(title)}</text>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )
