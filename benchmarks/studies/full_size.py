"""What does a billion-parameter mixture of experts cost compared with dense networks, and what do native kernels gain?

    python -m u2moe.benchmarks.studies.full_size FOLDER [--prepare]

docs/results/speed.md explains the method. FOLDER receives missing bundles with random weights (`random_models`).
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.bench.bound import measure_bound
from u2moe.benchmarks.bench.footprint import measure_footprint
from u2moe.benchmarks.bench.terminal import spread
from u2moe.benchmarks.instruments import workload
from u2moe.benchmarks.instruments.probe import Mode, Probe
from u2moe.benchmarks.instruments.rates import BEYOND_CACHE, best_rate, measure_rates, read_rate
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios, spread_of, timed
from u2moe.benchmarks.instruments.workload import CHUNK_SIZE, NUM_LEFT_CHUNKS, UTTERANCE_S, random_frames
from u2moe.benchmarks.results.files import measured, publish, tables_by_machine
from u2moe.benchmarks.results.markdown import Target, table
from u2moe.benchmarks.studies.shared import random_models
from u2moe.benchmarks.studies.shared.programs import write_wav
from u2moe.benchmarks.studies.shared.random_models import HALF, LARGE, MIXTURE, NAMES, SMALL, make_bundle
from u2moe.benchmarks.studies.shared.script import script, study_parser
from u2moe.export.random_checkpoint import num_parameters, random_config
from u2moe.runtime import Bundle, SessionSettings
from u2moe.runtime.model.native import CPU, KERNELS, choose_kernels

NATIVE, PLAIN = KERNELS[1:]
STREAMING, BATCH, FULL, SECOND_PASS = "streaming", "streaming-8", "full", "second-pass"
MODES = {STREAMING: "chunks of 16", BATCH: "batch of 8", FULL: "full context", SECOND_PASS: "second pass"}
COLUMNS = [*list(MODES.values())[:-1], "second pass, s"]  # titles of the columns of `MODES` in tables
ROUNDS = {STREAMING: 7, BATCH: 5, FULL: 5, SECOND_PASS: 5}
NUM_BOUNDS, NUM_STARTS, NUM_THREADS = 3, 2, (1, 2)
BOUNDS = {STREAMING: (Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS), 4.0), FULL: (Mode(), 10.0)}
"""Context, and seconds of speech to profile: few, because a profile has a line for each kernel of each chunk."""
START = ("verify_s", "load_s", "loaded_bytes", "peak_bytes")


@functools.cache
def parameters(model: str) -> tuple[float, float]:
    """Return a model's parameters in millions: the total, and those active for one token. This builds the network."""
    if model == HALF:
        (total, active), (more, more_active) = parameters(SMALL), parameters(MIXTURE)
        return (total + more) / 2, (active + more_active) / 2
    config = random_config(**random_models.SIZES[model])
    return num_parameters(config) / 1e6, num_parameters(config, active=True) / 1e6


@dataclass(frozen=True)
class Case:
    """A model in a format, and the kernels that run it."""

    model: str
    format: str
    kernels: str

    @property
    def key(self) -> str:
        """Name in the results."""
        return f"{self.model}/{self.format}/{self.kernels}"

    @property
    def size(self) -> str:
        """Both numbers of `parameters` as text for tables."""
        return "{:.0f} / {:.0f}".format(*parameters(self.model))

    @property
    def title(self) -> str:
        """Name in tables."""
        formats = {"int8": "int8", "int4": "int4 experts", "packed": "int8, packed in advance"}
        kernels = "native" if self.kernels == NATIVE else "onnxruntime alone"
        return f"{NAMES[self.model]}, {formats[self.format]}, {kernels}"


_FORMATS = ((MIXTURE, "int8"), (MIXTURE, "int4"), (SMALL, "int8"), (LARGE, "int8"))
CASES = tuple(Case(*own, kernels) for own in _FORMATS for kernels in (NATIVE, PLAIN))
INT8, PLAIN_INT8, INT4, _, DENSE, PLAIN_DENSE, NATIVE_LARGE, PLAIN_LARGE = CASES
EQUALS = {"native": (INT8, DENSE), "even": (PLAIN_INT8, PLAIN_DENSE)}
"""Mixtures and dense networks with equal engine and format: their ratio is the cost of the architecture."""
PACKED = Case(MIXTURE, "packed", NATIVE)  # packed in advance for native kernels; only its start is measured
STARTED = {case.key: case for case in (*CASES, PACKED)}


def measure(root: Path) -> dict[str, Any]:
    """Take all measurements of this study on this machine.

    `seconds` and `bounds` (see `bounds_of`) are by mode and case, `starts` (see `starts_of`) by case. `threads` has the
    bytes read and multiply-adds per second by number of threads, and `found`, the results of `two_threads` by case.
    """
    chosen = choose_kernels("auto", [CPU])
    cases = [case for case in CASES if chosen.native or case.kernels == PLAIN]
    bundles = {case: make_bundle(case.model, case.format, root) for case in cases}

    content: dict[str, Any] = {"kernels": chosen.data(), "touched": random_models.touched(bundles[PLAIN_INT8])}
    content |= {"seconds": {}, "starts": {}}
    for mode, rounds in ROUNDS.items():
        runs = {case.key: timed(run_of(bundles[case], case.kernels, mode)) for case in cases}
        content["seconds"][mode] = interleaved(runs, rounds, title=mode)
    bounded = [case for case in (INT8, PLAIN_INT8, PLAIN_DENSE) if case in cases]
    probes = {case.key: Probe(bundles[case], SessionSettings(kernels=case.kernels)) for case in bounded}
    content["bounds"] = {mode: bounds_of(probes, mode) for mode in BOUNDS}
    started = {**bundles, **({PACKED: make_bundle(MIXTURE, "packed", root)} if chosen.native else {})}
    for kernels in dict.fromkeys(case.kernels for case in started):
        own = {case.key: bundle for case, bundle in started.items() if case.kernels == kernels}
        content["starts"] |= starts_of(own, kernels)
    rates = [measure_rates([BEYOND_CACHE], number) for number in NUM_THREADS]
    content["threads"] = {
        "read": [read_rate(own, BEYOND_CACHE) for own in rates],
        "multiply": [best_rate(own, "integer") for own in rates],
        "found": {case.key: two_threads(bundles[case], case.kernels) for case in (INT8, INT4, DENSE) if case in cases},
    }
    return content


def run_of(bundle: Bundle, kernels: str, mode: str, num_threads: int = 1) -> Callable[[], Any]:
    """Return a function that runs one round of a mode on random features."""
    model = bundle.load(SessionSettings(num_threads=num_threads, kernels=kernels))
    return workload.one_round(mode, model, random_frames(bundle))


def bounds_of(probes: Mapping[str, Probe], mode: str) -> dict[str, Any]:
    """Return spreads of the encoder's `ms` per second of speech, and of its `ratio` to the bound, on one thread."""
    sizes = sorted({sum(file.size for file in probe.bundle.manifest.files.values()) for probe in probes.values()})
    rates = measure_rates(sizes, 1, repetitions=NUM_BOUNDS)
    context, seconds = BOUNDS[mode]
    samples = workload.speech(seconds, next(iter(probes.values())).sample_rate)
    found = {}
    for entry in measure_bound(probes, samples, context, rates, repetitions=NUM_BOUNDS):
        encoder = entry["stages"]["encoder"]
        least_s = sum(part["least_s"] for name, part in entry["parts"].items() if name not in ("ctc", "decoder"))
        scales = {"ms": 1e3 / entry["audio_s"], "ratio": 1 / least_s}
        found[entry["bundle"]] = {name: spread_of(encoder, scale).data() for name, scale in scales.items()}
    return found


def starts_of(bundles: Mapping[str, Bundle], kernels: str) -> dict[str, Any]:
    """Return each bundle's spreads of the values in `START`, in fresh processes, and its size in bytes (`files`)."""
    rate = next(iter(bundles.values())).manifest.features.sample_rate
    with tempfile.TemporaryDirectory() as folder:
        audio = write_wav(Path(folder) / "speech.wav", workload.speech(UTTERANCE_S, rate), rate)
        found = measure_footprint(bundles, audio, settings=SessionSettings(kernels=kernels), repetitions=NUM_STARTS)
    return {name: {**{key: item[key] for key in START}, "files": item["disk"]["files"]} for name, item in found.items()}


def two_threads(bundle: Bundle, kernels: str) -> dict[str, Any]:
    """Return `seconds` by mode and number of threads, and `equal`: whether the outputs are bit-identical."""
    found: dict[str, Any] = {"seconds": {}, "equal": True}
    for mode in (STREAMING, FULL):
        runs = {str(number): run_of(bundle, kernels, mode, number) for number in NUM_THREADS}
        one, two = (np.concatenate([np.atleast_2d(part) for part in run()]) for run in runs.values())
        found["equal"] &= np.array_equal(one, two)
        cases = {number: timed(run) for number, run in runs.items()}
        found["seconds"][mode] = interleaved(cases, ROUNDS[mode])
    return found


def factor(content: Mapping[str, Any], mode: str, case: Case) -> Spread | None:
    """Return the real-time factor of a case or, for the second pass, its time in seconds. None if not measured."""
    seconds = content["seconds"].get(mode, {}).get(case.key)
    scale = 1.0 if mode == SECOND_PASS else workload.audio_seconds(mode)
    return Spread.of([value / scale for value in seconds]) if seconds else None


def both_times(content: Mapping[str, Any], case: Case, missing: str, separator: str) -> str:
    """Return the cell of a table with `both_passes` of streams and of full context."""
    both = [both_passes(content, mode, case) for mode in (STREAMING, FULL)]
    return separator.join(missing if value is None else f"{value:.3f}" for value in both)


def both_passes(content: Mapping[str, Any], mode: str, case: Case) -> float | None:
    """Return the real-time factor of both passes together for ten seconds of speech; None if one was not measured."""
    first, second = factor(content, mode, case), factor(content, SECOND_PASS, case)
    return first.median + second.median / UTTERANCE_S if first and second else None


def ratio(content: Mapping[str, Any], mode: str, case: Case, other: Case) -> Spread | None:
    """Return the ratio of the times of two cases, round by round; None if a case was not measured."""
    seconds = content["seconds"].get(mode, {})
    return ratios(seconds[case.key], seconds[other.key]) if {case.key, other.key} <= seconds.keys() else None


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the values for pages: tables for all machines, and each number from the first machine that provides it."""
    found = {case.model: f"{parameters(case.model)[0]:.0f}" for case in CASES}
    active, of_dense = (parameters(case.model)[1] for case in (INT8, DENSE))
    found |= {f"{MIXTURE}.active": f"{active:.0f}", "active": f"{active / of_dense:.2f}"}
    found["tables"] = tables_by_machine(results, _page)
    pairs = {
        **EQUALS, "gain": (PLAIN_INT8, INT8), "int4": (INT4, PLAIN_DENSE), "int8": (INT8, PLAIN_DENSE),
        "dense": (INT4, DENSE), "dense_1b": (PLAIN_LARGE, PLAIN_INT8),
    }  # fmt: skip
    for content in reversed(results["machines"].values()):
        found["touched"] = f"{content['touched']:.1f}"
        for name, pair in pairs.items():
            for mode in MODES:
                if spread := ratio(content, mode, *pair):
                    found[f"{name}.{mode}"] = f"{spread.median:.2f}"
                one, other = (both_passes(content, mode, case) for case in pair)
                if one and other:
                    found[f"{name}.{mode}.both"] = f"{one / other:.2f}"
        if entry := content["bounds"].get(FULL, {}).get(INT8.key):  # ratios if the kernels reached the bound
            bound = entry["ratio"]["median"]
            found["bound.int8.full"] = f"{float(found['int8.full']) / bound:.2f}"
            found["bound.gain.full"] = f"{float(found['gain.full']) * bound:.2f}"
            if batch := factor(content, BATCH, PLAIN_DENSE):  # a batch needs as many products per second of speech
                found["bound.int4.batch"] = f"{entry['ms']['median'] / 1e3 / bound / batch.median:.2f}"
        for key, item in content["starts"].items():
            found[f"loaded.{key.replace('/', '.')}"] = f"{item['loaded_bytes']['median'] / 1e6:.0f}"
        for name in {"read", "multiply"} & content.get("threads", {}).keys():
            one, two = content["threads"][name]
            found[f"threads.{name}"] = f"{two / one:.2f}"
    return found


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield two tables of one machine: real-time factors; and bounds, gains of two threads, load times and memory."""
    yield measured(content)
    rows = []
    for case in CASES:
        cells = [factor(content, mode, case) for mode in MODES]
        if any(cells):
            shown = [spread(cell.data(), 1, 3) if cell else "" for cell in cells]
            rows.append([case.title, case.size, *shown, both_times(content, case, "", " / ")])
    parameters = "million parameters / active"
    yield table(("real-time factor", parameters, *COLUMNS, "both passes: chunks / full"), rows)
    rows = []
    for key, item in content["starts"].items():
        bounds = [own[key]["ratio"]["median"] for own in content["bounds"].values() if key in own]
        threads = content.get("threads", {}).get("found", {}).get(key, {}).get("seconds", {})
        gains = [ratios(own["1"], own["2"]).median for own in threads.values()]
        shares = [", ".join(f"{value:.2f}" for value in own) for own in (bounds, gains)]
        times = [f"{item[name]['median']:.2f}" for name in ("verify_s", "load_s")]
        sizes = [f"{item[name]['median'] / 1e6:.0f}" for name in ("loaded_bytes", "peak_bytes")]
        rows.append([STARTED[key].title, STARTED[key].size, *shares, f"{item['files'] / 1e6:.0f}", *times, *sizes])
    header = ("encoder / bound", "gain of two threads", "bundle, MB", "SHA-256, s", "sessions, s", "memory then, MB")
    yield table(("pairs: chunks, full", parameters, *header, "peak, MB"), rows)


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Yield the limits for each machine. Those of equal formats and kernels are 1.54, the ratio of active parameters.

    Only for a single stream, the limit is 2, because each chunk reads nearly all experts.
    """
    for where, content in results["machines"].items():
        amx = "amx" in where
        for mode, one, other, limit, at_most in (
            *((mode, INT8, DENSE, 2.0 if mode == STREAMING else 1.54, True) for mode in MODES),
            (STREAMING, INT4, PLAIN_DENSE, 1.2 if amx else 0.95, True),
            (BATCH, INT4, PLAIN_DENSE, 0.9, True),
            (FULL, INT8, PLAIN_DENSE, 0.7 if amx else 1.0, True),
            (STREAMING, INT4, DENSE, 1.6, True),
            (STREAMING, PLAIN_INT8, INT8, 2.3, False),
            (FULL, PLAIN_INT8, INT8, 1.6, False),
            (FULL, PLAIN_LARGE, PLAIN_INT8, 2.5, False),
        ):
            if found := ratio(content, mode, one, other):
                name = f"time of {one.title} / time of {other.title}, {MODES[mode]}"
                yield Target(name=name, where=where, found=found, limit=limit, at_most=at_most)
        for mode, limit in ((STREAMING, 1.15), (FULL, 1.2 if amx else 1.05)):
            if entry := content["bounds"].get(mode, {}).get(INT8.key):
                name = f"encoder of {INT8.title} / its bound, {MODES[mode]}"
                yield Target(name=name, where=where, found=spread_of(entry["ratio"]), limit=limit, at_most=True)
        if packed := content["starts"].get(PACKED.key):
            name, found = f"{PACKED.title}: load time", spread_of(packed["load_s"])
            yield Target(name=name, where=where, found=found, limit=0.3, at_most=True, unit=" s")
        threads = content.get("threads", {"found": {}})
        seconds = threads["found"].get(INT8.key, {}).get("seconds", {})
        for (mode, own), limit, bound in zip(seconds.items(), (1.9, 1.8), ("read", "multiply"), strict=False):
            one, two = threads.get(bound, (1, limit))  # no program can gain more than the machine itself
            if two >= limit * one:
                name, found = f"gain of two threads, {INT8.title}, {MODES[mode]}", ratios(own["1"], own["2"])
                yield Target(name=name, where=where, found=found, limit=limit, at_most=False)


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("full_size", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--prepare", action="store_true", help="only create missing bundles; do not measure")
    args = parser.parse_args(arguments)
    packed = (PACKED,) if choose_kernels("auto", [CPU]).native else ()
    for model, form in dict.fromkeys((case.model, case.format) for case in (*CASES, *packed)):
        make_bundle(model, form, args.folder)
    if not args.prepare:
        publish(args.results, measure(args.folder), values, per_machine=True)
