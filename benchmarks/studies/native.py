"""What do native kernels gain at full size? MoE-1B in int8 and int4 and Dense-225M in int8, with them and without.

    python -m u2moe.benchmarks.studies.native FOLDER --prepare
    python -m u2moe.benchmarks.studies.native FOLDER [--results FILE]

FOLDER holds the bundles (`random_models`); `--prepare` creates those that are missing. The results file holds an entry
for each kind of machine, and a run replaces that of this machine. Encoder and CTC head, without features and search, on
one thread and, with native kernels, on two; routers are adjusted so that tokens spread evenly, the worst case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.instruments.probe import Probe
from u2moe.benchmarks.instruments.rates import BEYOND_CACHE, best_rate, measure_rates, read_rate
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios, spread_of, timed
from u2moe.benchmarks.instruments.workload import audio_seconds, one_round, random_frames
from u2moe.benchmarks.results.files import read_json, results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import machine_key, measured, measured_here
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.encoders import (
    BOUNDS,
    START_HEADER,
    bound_ratio,
    bounds_of,
    parts_of,
    start_row,
    starts_of,
)
from u2moe.benchmarks.studies.shared.random_models import (
    MIXTURE,
    NAMES,
    SMALL,
    GateSettings,
    even_gates,
    make_bundle,
)
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.runtime.model.native import CPU, KERNELS, choose_kernels
from u2moe.runtime.model.settings import SessionSettings

NATIVE, PLAIN = KERNELS[1:]
TITLES = {"streaming": "streaming", "streaming-8": "streaming, batch of 8", "full": "full context"}
ROUNDS = {"streaming": 7, "streaming-8": 5, "full": 5}
NUM_BOUNDS, NUM_STARTS = 3, 2
NUM_THREADS = (1, 2)
PACKED_KEY = f"{MIXTURE}/packed/{NATIVE}"
"""Weights packed in advance, as native kernels use them: only how it starts is measured."""


@dataclass(frozen=True)
class Case:
    """A model in a precision, and what computes it."""

    model: str
    precision: str
    kernels: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.model}/{self.precision}/{self.kernels}"

    @property
    def title(self) -> str:
        """Its name in tables."""
        precision = {"int8": "int8", "int4": "int4 experts"}[self.precision]
        return f"{NAMES[self.model]}, {precision}, {'native' if self.kernels == NATIVE else 'onnxruntime alone'}"


CASES = tuple(
    Case(model, precision, kernels)
    for model, precision in ((MIXTURE, "int8"), (MIXTURE, "int4"), (SMALL, "int8"))
    for kernels in (NATIVE, PLAIN)
)
INT8, PLAIN_INT8, INT4, _, DENSE, BASELINE = CASES
"""The baseline is what the model with experts is to keep up with: a dense one on onnxruntime alone."""


def measure(root: Path) -> dict[str, Any]:
    """All measurements on this machine.

    Returns:
        kernels: see `Kernels.data`; seconds: of each round, by mode and case; bounds: entries of `measure_bound` by
        mode and case, of the mixture in int8; starts: of `measure_footprint`, by case; threads: `rates` of the machine
        and `seconds` of each round by number of threads, and `equal`: whether all outputs are, to the last bit.
    """
    bundles = {case: make_bundle(case.model, case.precision, root) for case in CASES}
    settings = {case: GateSettings(even_gates(case.model, root)) for case in CASES}  # must outlive the sessions

    def runs_of(case: Case, mode: str, num_threads: int = 1) -> Callable[[], Any]:
        options = settings[case].options(num_threads, case.kernels)
        return one_round(mode, bundles[case].load(SessionSettings(sess_options=options)), random_frames(bundles[case]))

    content: dict[str, Any] = {"kernels": choose_kernels(NATIVE, [CPU]).data(), "seconds": {}}
    for mode, rounds in ROUNDS.items():
        cases = {case.key: timed(runs_of(case, mode)) for case in CASES}
        content["seconds"][mode] = interleaved(cases, rounds, title=mode, progress=report)
    probes = {case.key: Probe(bundles[case], SessionSettings(kernels=case.kernels)) for case in (INT8, PLAIN_INT8)}
    content["bounds"] = {mode: bounds_of(probes, mode, NUM_BOUNDS, report) for mode in BOUNDS}
    packed = {PACKED_KEY: make_bundle(MIXTURE, "packed", root)}
    content["starts"] = {}
    for kernels, more in ((NATIVE, packed), (PLAIN, {})):
        own = {case.key: bundles[case] for case in CASES if case.kernels == kernels}
        content["starts"] |= starts_of({**own, **more}, kernels, NUM_STARTS)
    rates = {str(number): measure_rates([BEYOND_CACHE], number, progress=report) for number in NUM_THREADS}
    found: dict[str, Any] = {}
    for case in (INT8, INT4, DENSE):
        found[case.key] = {"seconds": {}, "equal": True}
        for mode in ("streaming", "full"):
            runs = {str(number): runs_of(case, mode, number) for number in NUM_THREADS}
            one, two = (np.concatenate([np.atleast_2d(part) for part in run()]) for run in runs.values())
            found[case.key]["equal"] &= np.array_equal(one, two)
            cases = {number: timed(run) for number, run in runs.items()}
            found[case.key]["seconds"][mode] = interleaved(cases, ROUNDS[mode], progress=report)
    return {**content, "threads": {**measured_here(), "rates": rates, "found": found}}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: the tables of all machines; ratios and megabytes of the one measured last."""
    *_, last = results["machines"].values()
    found = {"tables": "\n\n".join(line for content in results["machines"].values() for line in _page(content))}
    pairs = {"gain": (PLAIN_INT8, INT8), "int4": (INT4, BASELINE), "int8": (INT8, BASELINE)}
    for title, (one, other) in pairs.items():
        for mode, seconds in last["seconds"].items():
            found[f"{title}.{mode}"] = f"{ratios(seconds[one.key], seconds[other.key]).median:.2f}"
    entry = last["bounds"]["full"][INT8.key]
    least_s = sum(part["least_s"] for part in parts_of(entry).values()) / entry["audio_s"]
    dense_s = Spread.of(last["seconds"]["full"][BASELINE.key]).median / audio_seconds("full")
    found["least.full"] = f"{least_s / dense_s:.2f}"
    for name, speeds in _speeds(last["threads"]["rates"]).items():
        found[f"threads.{name}"] = f"{speeds[1] / speeds[0]:.2f}"
    for case in CASES[:4]:
        loaded = spread_of(last["starts"][case.key]["loaded_bytes"], 1e-6)
        found[f"loaded.{case.precision}.{case.kernels}"] = f"{loaded.median:.0f}"
    return found


def _speeds(rates: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Bytes read and multiply-adds per second with one thread and with two."""
    one, two = (rates[str(number)] for number in NUM_THREADS)
    return {
        "read": (read_rate(one, BEYOND_CACHE), read_rate(two, BEYOND_CACHE)),
        "multiply": (best_rate(one, "integer"), best_rate(two, "integer")),
    }


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    """The tables of one machine: times, the encoder and its bound, starts, and two threads."""
    yield f"### {machine_key(content)}"
    yield f"{measured(content)} {content['kernels']['description']}."
    rows = []
    for mode, seconds in content["seconds"].items():
        for case in CASES:
            factor = Spread.of([value / audio_seconds(mode) for value in seconds[case.key]])
            plain = f"{case.model}/{case.precision}/{PLAIN}"
            faster = quartiles(ratios(seconds[plain], seconds[case.key])) if case.kernels == NATIVE else ""
            beside = quartiles(ratios(seconds[case.key], seconds[BASELINE.key])) if case != BASELINE else ""
            rows.append([f"{TITLES[mode]}: {case.title}", quartiles(factor, 4), faster, beside])
    yield table(("", "real-time factor", "times as fast", f"time / {BASELINE.title}"), rows)
    rows = []
    for mode, entries in content["bounds"].items():
        for case in (INT8, PLAIN_INT8):
            seconds = spread_of(entries[case.key]["stages"]["encoder"], 1e3 / entries[case.key]["audio_s"])
            ratio = f"{bound_ratio(entries[case.key]).median:.2f}"
            rows.append([f"{TITLES[mode]}: {case.title}", quartiles(seconds, 1), ratio])
    yield table(("encoder in int8, own routers, speech", "ms for a second", "time / bound"), rows)
    titles = {**{case.key: case.title for case in CASES}, PACKED_KEY: f"{INT8.title}, packed in advance"}
    rows = [[titles[key], *start_row(item)] for key, item in content["starts"].items()]
    yield table(("fresh process, one thread", *START_HEADER), rows)
    threads = content["threads"]
    rows = []
    for key, own in threads["found"].items():
        for mode, seconds in own["seconds"].items():
            times = [[value / audio_seconds(mode) for value in seconds[str(number)]] for number in NUM_THREADS]
            factors = [quartiles(Spread.of(values), 4) for values in times]
            equal = "yes" if own["equal"] else "no"
            rows.append([f"{TITLES[mode]}: {titles[key]}", *factors, quartiles(ratios(*times)), equal])
    yield table(("real-time factor", "one thread", "two threads", "times as fast", "equal"), rows)
    if rates := threads.get("rates"):
        units = {"read": ("reading weights, GB/s", 1e-9), "multiply": ("int8 products, 10^9 per second", 1e-9)}
        rows = [
            [units[name][0], f"{units[name][1] * one:.1f}", f"{units[name][1] * two:.1f}", f"{two / one:.2f}"]
            for name, (one, two) in _speeds(rates).items()
        ]
        yield table(("what the machine can do", "one thread", "two threads", "times as fast"), rows)


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """The limits, on each machine."""
    for where, content in results["machines"].items():
        amx = "amx" in content["kernels"]["isa"]
        for one, other, mode, limit, at_most in (
            (PLAIN_INT8, INT8, "streaming", 1.6, False),
            (PLAIN_INT8, INT8, "full", 1.8 if amx else 1.6, False),
            (PLAIN_INT8, INT4, "streaming", 2.3, False),
            (INT4, BASELINE, "streaming", 1.3, True),
            (INT4, DENSE, "streaming", 1.7, True),
            (INT4, BASELINE, "full", 0.8, True),
            (INT8, BASELINE, "full", 0.8, True),
            (INT4, DENSE, "full", 1.35, True),
            (INT8, DENSE, "full", 1.35, True),
            (BASELINE, DENSE, "streaming", 1.2, False),
            (PLAIN_INT8, INT8, "streaming-8", 1.5, False),
        ):
            seconds = content["seconds"][mode]
            found = ratios(seconds[one.key], seconds[other.key])
            name = f"{where}: time of {one.title} / {other.title}, {TITLES[mode]}"
            yield Target(name=name, found=found, limit=limit, at_most=at_most)
        for mode, limit in (("streaming", 1.5), ("full", 1.0)):
            name = f"{where}: encoder of {INT8.title} / its bound, {TITLES[mode]}"
            yield Target(name=name, found=bound_ratio(content["bounds"][mode][INT8.key]), limit=limit, at_most=True)
        if packed := content["starts"].get(PACKED_KEY):
            name = f"{where}: {INT8.title}, packed in advance: sessions"
            yield Target(name=name, found=spread_of(packed["load_s"]), limit=0.5, at_most=True, unit=" s")
        for case in (INT8, INT4, DENSE):
            for mode, seconds in content["threads"]["found"][case.key]["seconds"].items():
                name = f"{where}: gain of two threads, {case.title}, {TITLES[mode]}"
                found = ratios(*(seconds[str(number)] for number in NUM_THREADS))
                yield Target(name=name, found=found, limit=1.8, at_most=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.native", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--results", type=Path, help="JSON file; other machines in it are kept")
    parser.add_argument("--prepare", action="store_true", help="create what is missing in FOLDER, and measure nothing")
    args = parser.parse_args(arguments)
    for model, kind in {(case.model, case.precision): None for case in CASES} | {(MIXTURE, "packed"): None}:
        make_bundle(model, kind, args.folder, report)
        even_gates(model, args.folder)
    if args.prepare:
        return
    file, here = args.results or results_file("native"), measured_here()
    content = {**here, **measure(args.folder)}
    machines = {**read_json(file).get("machines", {}), machine_key(content): content}
    write_json(file, {**here, "machines": machines})
    print(values({"machines": {"": content}})["tables"])


if __name__ == "__main__":
    run_script(main)
