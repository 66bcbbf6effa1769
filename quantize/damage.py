"""Measures on recordings without transcripts how much damage each quantized layer causes.

The damage is shown as text and as a picture.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from u2moe.quantize.arithmetic import NOTHING, Array
from u2moe.quantize.comparison import Heard, changed_tokens_as_text, first_divergence, hear, second_divergence
from u2moe.quantize.observed import Levels, SwitchedGraph, SwitchedSession, Values, observed_model, trim_memory
from u2moe.quantize.passes.halves import read_single
from u2moe.quantize.picture import bar_picture
from u2moe.runtime.bundle_folder import Bundle

OUTLIER = 8.0  # a channel is an outlier if its largest magnitude exceeds this many times the median over channels
SHOWN_OUTLIERS, SHOWN_LAYERS = 8, 12
MOST_THREADS, MOST_BYTES = 4, 60_000_000  # maximum recordings measured in parallel, and bytes of decoder outputs
PIECE = 1 << 20  # number of values whose errors are summed at a time, in float64
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class LayerDamage:
    """The damage of one layer. Lists have an element for each level: first float32, then ever smaller formats."""

    layer: str
    group: str  # of its weights; see `recipes.FORMATS`
    bytes: Sequence[int]  # of its weights
    # divergence from float32, in nats per frame, if only this layer is quantized; see `Difference`. For layers of the
    # encoder and CTC head, it is that of the log-probabilities; for layers of decoders, that of the second pass
    alone: Sequence[float]
    errors: Sequence[float]  # largest relative error of its outputs when it reads the values of the float32 network
    outliers: Mapping[str, Sequence[int]]  # by value that it reads: channels much larger than others, the largest first


@dataclass(frozen=True, kw_only=True)
class Damage:
    """The damage of each layer, in the order of the graphs, on `frames` encoder frames used to choose formats."""

    divergence: float  # of both passes from float32, in nats per frame, with all layers in their smallest formats
    frames: int
    layers: Sequence[LayerDamage]


@dataclass(frozen=True)
class _Reference:
    frames: Array  # features of a recording [frames, mel]
    heard: Heard  # its float32 results
    feeds: Mapping[str, Sequence[Values]]  # of every run, by graph


Run = tuple[Values, Values]  # feeds of a graph's run for a recording, and the values before one of its parts


class DamageMeter:
    """Measures on features of recordings [frames, mel] how much damage any choice of layer formats causes.

    Its versions are the float32 bundle, then unpacked bundles made from it, each quantized more than the one before. If
    there is a `journal`, earlier measurements in this file are reused, and new ones are appended. Memory contains each
    layer in one format (the measured layer in all formats), and the values between two layers.
    `most` contains the last level of each layer.
    """

    def __init__(self, versions: Sequence[Bundle], features: Sequence[Array], journal: Path | None = None) -> None:
        trim_memory()
        self._manifest, self._features, self._journal = versions[0].manifest, features, journal
        self._known: dict[str, Any] = {}
        described = [repr(version.manifest.files) for version in versions]
        described += [hashlib.sha256(frames.tobytes()).hexdigest() for frames in features]
        self._of_these = hashlib.sha256(repr(described).encode()).hexdigest()
        if journal is not None and journal.exists():
            lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
            self._known = dict(json.loads(line) for line in lines if line.endswith("\n"))  # the last may be incomplete
        self._graphs = {
            graph.name: SwitchedGraph(*(read_single(version.path / graph.file) for version in versions))
            for graph in self._manifest.model.graphs()
        }
        self.most = {layer: len(own) - 1 for graph in self._graphs.values() for layer, own in graph.bytes.items()}

    def unload(self) -> None:
        """Free memory that the next measurement will allocate again."""
        for graph in self._graphs.values():
            graph.keep()
        trim_memory()

    def _measured(self, what: Any, measure: Callable[[], Any]) -> Any:
        """Return a measurement from the journal or, if the journal lacks it, from `measure`."""
        key = json.dumps([self._of_these, what])
        if key not in self._known:
            self._known[key] = measure()
            if self._journal is not None:
                with self._journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, self._known[key]]) + "\n")
        return self._known[key]

    @cached_property
    def _references(self) -> list[_Reference]:
        found = []
        for frames in self._features:
            sessions = {name: SwitchedSession(graph, {}) for name, graph in self._graphs.items()}
            heard = hear(observed_model(self._manifest, sessions), frames)
            found.append(_Reference(frames, heard, {name: session.feeds for name, session in sessions.items()}))
        return found

    def _each(self, measure: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield `measure(item)` for each item, one per recording. As many run in parallel as memory and cores allow."""
        runs = [feeds["hyps"].size for own in self._references for feeds in own.feeds.get("decoder", ())]
        size = max([1, *runs]) * self._manifest.model.vocab_size * np.dtype(np.float32).itemsize
        with ThreadPoolExecutor(max(min(os.cpu_count() or 1, MOST_THREADS, MOST_BYTES // size), 1)) as pool:
            yield from pool.map(measure, items)
        trim_memory()

    @property
    def _num_frames(self) -> int:
        return max(sum(len(own.heard.log_probs) for own in self._references), 1)

    def divergence(self, levels: Levels, progress: Callable[[float], None] = lambda _: None) -> float:
        """Return the total divergence from float32, in nats per frame, of both passes with layers at these levels."""

        def measure() -> float:
            references, nats = self._references, 0.0
            for graph in self._graphs.values():
                graph.keep(levels)
            for number, own in enumerate(self._each(lambda own: self._nats(own, levels), references), 1):
                nats += own
                progress(number / len(references))
            return nats / self._num_frames

        return float(self._measured(sorted((layer, level) for layer, level in levels.items() if level), measure))

    def _nats(
        self,
        reference: _Reference,
        levels: Levels,
        changed: str | None = None,
        begin: int = 0,
        known: Sequence[Run] = (),
    ) -> float:
        """Return the divergence from float32, in nats, of the pass to which the graph `changed` belongs.

        If `changed` is None, return the sum over both passes. The changed graph runs from part `begin`, and layers run
        at these levels; see `SwitchedSession`.
        """
        sessions = {name: SwitchedSession(graph, levels) for name, graph in self._graphs.items()}
        if changed is not None:
            sessions[changed] = SwitchedSession(self._graphs[changed], levels, begin, known)
        model, heard, nats = observed_model(self._manifest, sessions), reference.heard, 0.0
        output = model.encode(reference.frames) if changed in {None, "encoder"} else heard.output
        if changed != "decoder":
            nats += first_divergence(heard, model.ctc(output))
        if changed in {None, "decoder"}:
            nats += second_divergence(model, output, heard)
        return nats

    def share(self, layer: str) -> float:
        """Return the layer's share of the encoder's float32 weight bytes; 0 for layers of other graphs."""
        sizes = {name: own[0] for name, own in self._graphs["encoder"].bytes.items()}
        return sizes.get(layer, 0) / max(sum(sizes.values()), 1)

    def measure(self, progress: Callable[[float], None] = lambda _: None) -> Damage:
        """Measure the damage of every layer at each level, and of all layers together at their last levels."""
        layers = self.layers(progress)
        return Damage(divergence=self.divergence(self.most), frames=self._num_frames, layers=layers)

    def layers(self, progress: Callable[[float], None] = lambda _: None) -> list[LayerDamage]:
        """Measure the damage of every layer at each level, without running earlier layers again."""
        found: dict[str, LayerDamage] = {}
        parts = [graph.parts for graph in self._graphs.values()]
        work = [(part.num_levels - 1) * (len(own) - number) for own in parts for number, part in enumerate(own)]
        done = accumulate(work)
        for graph in self._graphs.values():
            graph.keep()  # each part is loaded when it runs; encoder layers need no decoder
        for name, graph in self._graphs.items():
            states = [[(feeds, feeds) for feeds in own.feeds[name]] for own in self._references]
            for number, part in enumerate(graph.parts):
                if part.layer and part.layer not in found:
                    found[part.layer] = self._layer(name, number, states)
                for state in states:
                    state[:] = [(feeds, part.after(values, part.run(values, 0))) for feeds, values in state]
                part.keep()
                progress(next(done) / max(sum(work), 1))
            trim_memory()
        return list(found.values())

    def _layer(self, name: str, number: int, states: Sequence[Sequence[Run]]) -> LayerDamage:
        """Measure the damage of the layer that begins part `number` of a graph."""
        graph = self._graphs[name]
        part, layer = graph.parts[number], graph.parts[number].layer
        inputs, levels = graph.inputs[layer], range(1, len(graph.bytes[layer]))

        def of_recording(pair: tuple[_Reference, Sequence[Run]]) -> tuple[list[float], Any, list[Any]]:
            own, state = pair
            squares, largest = np.zeros((len(levels), len(graph.outputs[layer]), 2)), []
            known: list[list[Run]] = [[] for _ in levels]
            for feeds, values in state:  # one at a time: outputs of the decoders' last layer are large
                expected = part.run(values, 0)
                read = [{**values, **expected}[each] for each in inputs]
                largest.append([np.abs(value).reshape(-1, value.shape[-1]).max(axis=0) for value in read])
                for number_of, level in enumerate(levels):
                    found = part.run(values, level)
                    squares[number_of] += [_squares(expected[each], found[each]) for each in graph.outputs[layer]]
                    known[number_of].append((feeds, part.after(values, found)))
            changed = zip(levels, known, strict=True)
            nats = [self._nats(own, {layer: level}, name, number + 1, runs) for level, runs in changed]
            return nats, squares, [np.max(sizes, axis=0) for sizes in zip(*largest, strict=True)]

        def measure() -> Any:
            measured = self._each(of_recording, zip(self._references, states, strict=True))
            nats, squares, largest = zip(*measured, strict=True)
            difference, size = np.moveaxis(np.sum(squares, axis=0), -1, 0)
            errors = np.sqrt(difference / np.maximum(size, NOTHING)).max(axis=1, initial=0.0).tolist()
            sizes = [np.max(own, axis=0) for own in zip(*largest, strict=True)]
            outliers = dict(zip(inputs, map(_outliers, sizes), strict=True))
            return [(np.sum(nats, axis=0) / self._num_frames).tolist(), errors, outliers]

        alone, errors, outliers = self._measured(layer, measure)
        group, sizes = graph.groups[layer], graph.bytes[layer]
        outliers = {name: own for name, own in outliers.items() if own}
        return LayerDamage(
            layer=layer, group=group, bytes=sizes, alone=[0.0, *alone], errors=[0.0, *errors], outliers=outliers
        )


def _squares(expected: Array, found: Array) -> list[float]:
    """Return the sum of the squared errors of `found`, and the sum of the squares of `expected`."""
    squares = [0.0, 0.0]
    for begin in range(0, expected.size, PIECE):
        own, other = (each.reshape(-1)[begin : begin + PIECE].astype(np.float64) for each in (expected, found))
        squares[0] += float(np.square(other - own).sum())
        squares[1] += float(np.square(own).sum())
    return squares


def _outliers(sizes: Array) -> list[int]:
    order = np.argsort(-sizes, kind="stable")[:SHOWN_OUTLIERS]
    return [int(channel) for channel in order if sizes[channel] > OUTLIER * max(np.median(sizes), NOTHING)]


def describe_damage(damage: Mapping[str, Any]) -> list[str]:
    """Describe `Damage` (plain data) in lines of text, with a table of the most damaging layers and a bar for each."""
    written = damage["written"]
    lines = [
        f"damage (divergence on {damage['frames']} encoder frames): {damage['divergence']:.4f} nats per frame",
        f"changed tokens (of {written['tokens']} in {written['seconds']:.0f} s of {written['recordings']} recordings): "
        + changed_tokens_as_text(written["changed_tokens"]),
        f"{'layer':44} {'alone':>8} {'error':>7} {'MB saved':>9}",
    ]
    sums: Counter[str] = Counter()
    for item in damage["layers"]:
        sums[item["group"]] += item["alone"][-1]
    lines += [f"{'sum of ' + group:44} {nats:8.4f}" for group, nats in sums.items()]
    ordered = sorted(damage["layers"], key=lambda item: -item["alone"][-1])
    most = max([NOTHING, *(item["alone"][-1] for item in ordered)])
    for item in ordered[:SHOWN_LAYERS]:
        alone, saved = item["alone"][-1], (item["bytes"][0] - item["bytes"][-1]) / 1e6
        bar = "#" * round(20 * max(alone, 0) / most)
        lines.append(f"{item['layer']:44} {alone:8.4f} {item['errors'][-1]:7.2%} {saved:9.2f} {bar}".rstrip())
        outliers = item["outliers"].items()
        lines += [f"  outlier channels of {value}: {', '.join(map(str, found))}" for value, found in outliers]
    return lines


def damage_picture(damage: Mapping[str, Any]) -> str:
    """Draw the damage section of a report, as a bar for each layer and format. Layers are in network order."""
    rows = []
    for item in damage["layers"]:
        notes = [f"outliers: {', '.join(map(str, found))}" for found in item["outliers"].values()]
        notes += [f"now {step['format']}" for step in damage.get("steps", []) if step["layer"] == item["layer"]]
        first, *others = reversed(item["alone"][1:])
        bars = [(0, first, "; ".join([f"{first:.4f}", *notes])), *((1, alone, "") for alone in others)]
        rows.append((item["layer"], bars))
    return bar_picture("divergence if only this layer is quantized, nats per frame", damage["formats"][:0:-1], rows)
