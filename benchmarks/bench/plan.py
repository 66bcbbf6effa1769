"""Runs all measurements of `u2moe bench`, and returns their results as a JSON report."""

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.bound import measure_bound
from u2moe.benchmarks.bench.costs import measure_costs
from u2moe.benchmarks.bench.footprint import measure_footprint
from u2moe.benchmarks.bench.latency import measure_latency
from u2moe.benchmarks.bench.speed import measure_speed
from u2moe.benchmarks.bench.terminal import count_threads
from u2moe.benchmarks.instruments.host import cpu_times, other_cores, report_head, usable_cores
from u2moe.benchmarks.instruments.probe import Mode, Probe, Samples
from u2moe.benchmarks.instruments.rates import measure_rates
from u2moe.benchmarks.instruments.statistics import show_progress
from u2moe.runtime import AudioError, Bundle, DecodingOptions
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle.contract import PACKED
from u2moe.runtime.bundle.manifest import Manifest
from u2moe.runtime.corpus.lists import Recording
from u2moe.runtime.corpus.rows import changed_options, options_as_json
from u2moe.runtime.decoding.context import Hotwords
from u2moe.runtime.model.features import FeatureStream
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings

FORMAT, VERSION = "u2moe-bench", 1
FEWEST_ROUNDS = 4  # Minimum number of rounds. With fewer, quartiles mean little.
_ROUTED_S = 30.0  # seconds of a recording for expert statistics; memory grows quadratically with full context
_PROCESSES = 5  # maximum number of fresh processes per bundle
_PROFILED_S = 10.0  # seconds after which the longest recording is cut for profiling
_FIXED = (
    "the graph has a fixed shape for one stream, {}; not measured: full context, other chunks, batches (other shapes), "
    "bound (nodes belong to no part), experts (all are computed), numbers of parameters (two graphs have the CTC head)"
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The extent of the measurements. Full context is always measured as well."""

    threads: tuple[int, ...] = (1, 2)  # numbers of threads within one operator
    chunk_sizes: tuple[int, ...] = (16, 8, 4)  # encoder frames; each is combined with every number in `left_chunks`
    left_chunks: tuple[int, ...] = (4, -1)  # chunks of left context; -1: all
    repetitions: int = 5  # rounds of each measurement, after a warm-up
    paced_s: float = 10.0  # seconds to recognise in real time, with the first number in `left_chunks`; 0: none

    def __post_init__(self) -> None:
        if not self.threads or min(self.threads) < 1:
            raise ValueError(f"numbers of threads must be at least 1, got {list(self.threads)}")
        if not self.chunk_sizes or min(self.chunk_sizes) < 1:
            raise ValueError(f"chunk sizes must be at least 1, got {list(self.chunk_sizes)}")
        if self.repetitions < 1:
            raise ValueError(f"repetitions must be at least 1, got {self.repetitions}")

    def modes(self, bundle: Bundle, fixed: Iterable[Mode] = ()) -> list[Mode]:
        """Return the modes in which to measure a bundle, including any supported modes of `fixed` shapes."""
        config = bundle.manifest.model
        if (own := Mode.fixed(config)) is not None:
            return [own]
        pairs = itertools.product(self.chunk_sizes, self.left_chunks)
        streaming = [Mode(chunk_size=size, num_left_chunks=left) for size, left in pairs]
        streaming += [mode for mode in fixed if mode.chunk_size == config.whole_chunk(mode.chunk_size or 0)]
        return list(dict.fromkeys([Mode(), *(streaming if config.streaming else ())]))

    def live_modes(self) -> list[Mode]:
        """Return the modes to measure in real time."""
        return [Mode(chunk_size=size, num_left_chunks=self.left_chunks[0]) for size in self.chunk_sizes]

    def main_modes(self) -> list[Mode]:
        """Return the modes in which to measure bounds (see `measure_bound`) and expert statistics."""
        return [Mode(), *self.live_modes()[:1]]


PLANS = {
    "quick": Plan(threads=(1,), chunk_sizes=(16,), left_chunks=(4,), repetitions=FEWEST_ROUNDS, paced_s=0),
    "default": Plan(threads=(1, 2)[: usable_cores()]),
}


def run_suite(
    bundles: Mapping[str, Bundle],
    recordings: Sequence[Recording],
    plan: Plan,
    *,
    settings: SessionSettings | None = None,
    options: DecodingOptions | None = None,
    hotwords: Hotwords | None = None,
) -> dict[str, Any]:
    """Measure everything. The bundles take turns. docs/bench.md explains the report.

    Word errors are counted for `recordings` with a transcript. The plan sets the number of threads of `settings`, and
    each mode the context in `options` (see `Probe`). Without `hotwords`, those of each bundle apply. Raise ValueError
    if sample rates of bundles differ, and AudioError for a recording that is unreadable or too short.
    """
    settings = settings or SessionSettings()
    rates_hz = {bundle.manifest.features.sample_rate for bundle in bundles.values()}
    if len(rates_hz) != 1:
        raise ValueError(f"bundles must have the same sample rate, got {sorted(rates_hz)} Hz")
    sample_rate = rates_hz.pop()
    samples = [_read(recording.path, bundles.values()) for recording in recordings]
    fixed = {name: mode for name, bundle in bundles.items() if (mode := Mode.fixed(bundle.manifest.model))}
    modes = {name: plan.modes(bundle, fixed.values()) for name, bundle in bundles.items()}
    begin = cpu_times()
    files = [recording.path.name for recording in recordings]
    changed = changed_options(options_as_json(options or DecodingOptions()))
    report: dict[str, Any] = {
        **report_head(FORMAT, VERSION, settings.providers),
        "plan": {"warm_up": 1, **vars(plan)},
        "decoding": changed | ({} if hotwords is None else {"hotwords": hotwords}),
        "audio": {"files": files, "seconds": sum(map(len, samples)) / sample_rate},
        "bundles": {name: _describe(bundle.manifest) for name, bundle in bundles.items()},
        "left_out": [] if find_spec("onnx_ir") else ["bound", "experts", "numbers of parameters"],
        "without_bound": [name for name, bundle in bundles.items() if PACKED in bundle.manifest.quantization],
        "fixed_shapes": {name: _FIXED.format(mode.name) for name, mode in fixed.items()},
        **{section: [] for section in ("speed", "latency", "rates", "bound")},
    }
    has_bound = not report["left_out"] and report["providers"] == [DEFAULT_PROVIDER]
    for index, num_threads in enumerate(plan.threads):
        show_progress(count_threads(num_threads))
        own = dataclasses.replace(settings, num_threads=num_threads)
        probes = {name: Probe(bundle, own, options, hotwords) for name, bundle in bundles.items()}
        report["kernels"] = {name: item.model.kernels.data() for name, item in probes.items()}
        transcripts = [recording.transcript for recording in recordings]
        entries = measure_speed(probes, samples, modes, transcripts=transcripts, repetitions=plan.repetitions)
        if index == 0:
            report["costs"] = measure_costs(probes, samples, plan.repetitions)
        # The first recordings, with at most `paced_s` seconds in total. The last one is cut if necessary.
        starts, end = itertools.accumulate(map(len, samples), initial=0), int(plan.paced_s * sample_rate)
        paced = [own[: end - at] for own, at in zip(samples, starts, strict=False) if at < end] if index == 0 else []
        for mode in dict.fromkeys([*plan.live_modes(), *fixed.values()]) if paced else ():
            found = measure_latency({name: probes[name] for name in probes if mode in modes[name]}, paced, mode)
            report["latency"] += [{"threads": num_threads, **entry} for entry in found]
        report["speed"] += [{"threads": num_threads, **entry} for entry in entries]
        countable = {name: item for name, item in probes.items() if name not in {*report["without_bound"], *fixed}}
        if has_bound and countable:
            _add_bound(report, countable, num_threads, samples, plan)
    own, processes = dataclasses.replace(settings, num_threads=plan.threads[0]), min(plan.repetitions, _PROCESSES)
    report["footprint"] = measure_footprint(bundles, recordings[0].path, settings=own, repetitions=processes)
    routed = {name: bundle for name, bundle in bundles.items() if name not in fixed}
    report["experts"] = {} if report["left_out"] else _experts(routed, samples, plan)
    report["other_cores"] = other_cores(begin)
    return dict(json.loads(json.dumps(report)))  # the same types as in a report read from a file


def _read(path: Path, bundles: Collection[Bundle]) -> Samples:
    """Return the samples of a recording. Raise `AudioError` if it is too short for an encoder frame of a bundle."""
    samples: Samples = read_audio(path, next(iter(bundles)).manifest.features.sample_rate)
    for bundle in bundles:
        features, window = FeatureStream(bundle.manifest.features), bundle.manifest.model.window
        features.accept(samples)
        if features.num_ready < window:
            raise AudioError(f"{path}: has {features.num_ready} feature frames, expected at least {window}")
    return samples


def _add_bound(
    report: dict[str, Any], probes: Mapping[str, Probe], num_threads: int, recordings: Sequence[Samples], plan: Plan
) -> None:
    footprints = [sum(file.size for file in item.bundle.manifest.files.values()) for item in probes.values()]
    rates = measure_rates(footprints, num_threads, repetitions=plan.repetitions)
    report["rates"].append(rates)
    sample_rate = next(iter(probes.values())).sample_rate
    longest = max(recordings, key=len)[: int(_PROFILED_S * sample_rate)]
    for mode in plan.main_modes():
        if able := {name: item for name, item in probes.items() if mode in plan.modes(item.bundle)}:
            report["bound"] += measure_bound(able, longest, mode, rates, repetitions=plan.repetitions)


def _experts(bundles: Mapping[str, Bundle], recordings: Sequence[Samples], plan: Plan) -> dict[str, Any]:
    from u2moe.benchmarks.bench.expert_usage import measure_experts  # noqa: PLC0415 - needs the extra tools

    found = {}
    for name, bundle in bundles.items():
        samples = [part[: int(_ROUTED_S * bundle.manifest.features.sample_rate)] for part in recordings]
        modes = [mode for mode in plan.main_modes() if mode in plan.modes(bundle)]
        found[name] = measure_experts(bundle, samples, modes)
    return {name: entry for name, entry in found.items() if entry}


def name_bundles(paths: Sequence[Path]) -> dict[str, Path]:
    """Return names for folders: the shortest path suffixes that distinguish them, and a number for repetitions."""
    resolved = [path.resolve() for path in paths]
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(set(resolved)):
        depth += 1
    names: dict[str, Path] = {}
    for path in resolved:
        name = "/".join(path.parts[-depth:])
        names[name if name not in names else f"{name} ({sum(path == other for other in names.values()) + 1})"] = path
    return names


def _describe(manifest: Manifest) -> dict[str, Any]:
    return {
        "producer": manifest.producer,
        "recipe": manifest.quantization.get("recipe", "float32") + ", random weights" * manifest.random_weights,
        "streaming": manifest.model.streaming, "decoder": manifest.model.decoder, "frame_s": manifest.frame_s,
        "encoder": manifest.architecture.get("encoder", {}),
    }  # fmt: skip
