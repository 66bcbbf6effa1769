"""The native kernels at full size: MoE-1B in int8 and int4, and Dense-225M in int8, each with them and without.

    python -m u2moe.benchmarks.full_size.native FOLDER --prepare
    python -m u2moe.benchmarks.full_size.native FOLDER [--results FILE]
    python -m u2moe.benchmarks.full_size.native FOLDER --threads [--results FILE]

FOLDER holds the bundles, random weights in WeNet's layout; `--prepare` creates those that are missing. The results file
holds one entry for each kind of machine, and a run replaces that of this machine alone; `--threads` adds one thread
beside two to it. Encoder and CTC head, without features and search, otherwise on one thread; routers are adjusted so
that tokens spread evenly over all experts, the worst case.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.bench.bound import measure_bound
from u2moe.benchmarks.bench.footprint import measure_footprint
from u2moe.benchmarks.full_size.cells import MIXTURE, SMALL, encoder_parts, encoder_ratio
from u2moe.benchmarks.full_size.even_routing import TurnedSettings, turned_gates
from u2moe.benchmarks.full_size.models import make_artefact
from u2moe.benchmarks.full_size.networks import has_experts
from u2moe.benchmarks.full_size.threads import (
    gains_of_rates,
    measure_rates_of_threads,
    measure_threads,
    rates_table,
    threads_table,
    threads_targets,
)
from u2moe.benchmarks.instruments.probe import Mode, Probe
from u2moe.benchmarks.instruments.rates import measure_rates
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios, spread_of, timed
from u2moe.benchmarks.instruments.workload import (
    CHUNK_SIZE,
    NUM_LEFT_CHUNKS,
    UTTERANCE_S,
    audio_seconds,
    one_round,
    random_frames,
    speech,
)
from u2moe.benchmarks.peers.process import write_wav
from u2moe.benchmarks.results.files import read_json, results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, table
from u2moe.benchmarks.results.provenance import machine_key, measured, measured_here
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.quantize.config import recipe
from u2moe.quantize.quantizer import quantize_bundle
from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.model.model import Model
from u2moe.runtime.model.native import CPU, KERNELS, choose_kernels

NATIVE, PLAIN = KERNELS[1:]
RECIPES = {
    "int8": recipe("int8"),
    "int4": recipe("int4-experts"),
}
PACKED = "packed"
"""The mixture in int8 with weights packed in advance, as native kernels use them: only how it starts is measured."""
PACKED_KEY = f"{MIXTURE}/{PACKED}/{NATIVE}"
LOAD_S = 0.5
_PRECISIONS = {"int8": "int8", "int4": "int4 experts"}
ROUNDS = {"streaming": 7, "streaming-8": 5, "full": 5}
TITLES = {"streaming": "streaming", "streaming-8": "streaming, batch of 8", "full": "full context"}
BOUNDS = {"streaming": Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS), "full": Mode()}
BOUND_S = {"streaming": 3.0, "full": UTTERANCE_S}
NUM_BOUNDS, NUM_STARTS = 3, 2


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
        name = {MIXTURE: "MoE-1B", SMALL: "Dense-225M"}[self.model]
        return f"{name}, {_PRECISIONS[self.precision]}, {'native' if self.kernels == NATIVE else 'onnxruntime alone'}"

    def bundle(self, root: Path) -> Bundle:
        """Its bundle."""
        return Bundle.open(root / self.model / self.precision, verify=False)


CASES = tuple(
    Case(model, precision, kernels)
    for model, precision in ((MIXTURE, "int8"), (MIXTURE, "int4"), (SMALL, "int8"))
    for kernels in (NATIVE, PLAIN)
)
_TITLES = {case.key: case.title for case in CASES}
BASELINE = Case(SMALL, "int8", PLAIN)
"""What the model with experts is to keep up with."""


def prepare(root: Path, *, again: bool = False, progress: Callable[[str], None] = lambda _: None) -> None:
    """Create what is missing: bundles, and routers.

    Args:
        root: folder of all models.
        again: quantize anew.
        progress: called with a line for each step.
    """
    for model in dict.fromkeys(case.model for case in CASES):
        make_artefact(model, root, progress=progress)
    for model, precision in dict.fromkeys((case.model, case.precision) for case in CASES):
        if again or not (root / model / precision).is_dir():
            progress(f"{model}: {precision}")
            quantize_bundle(root / model / "bundle", root / model / precision, RECIPES[precision], overwrite=again)
    if again or not (root / MIXTURE / PACKED).is_dir():
        progress(f"{MIXTURE}: {PACKED}")
        packed = recipe("int8", packed=True)
        quantize_bundle(root / MIXTURE / "bundle", root / MIXTURE / PACKED, packed, overwrite=again)
    for case in CASES:
        gates_of(root, case)


def gates_of(root: Path, case: Case) -> dict[str, Any]:
    """Routers with which tokens spread evenly, created once; empty without experts."""
    if not has_experts(case.model):
        return {}
    file = root / case.model / "routers-all.npz"
    if not file.exists():
        bundle = Case(case.model, "int8", PLAIN).bundle(root)
        np.savez(file, **turned_gates(bundle, random_frames(bundle)))  # type: ignore[arg-type]
    with np.load(file) as arrays:
        return dict(arrays)


def measure(root: Path, *, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All measurements on this machine.

    Returns:
        kernels: see `Kernels.data`; seconds: of each round, by mode and case; bounds: entries of `measure_bound` for
        the case of each key, by mode; starts: of `measure_footprint`, by case.

    Raises:
        KernelsError: u2moe-kernels is not installed or cannot run here.
    """
    kernels = choose_kernels(NATIVE, [CPU]).data()
    return {
        "kernels": kernels,
        "seconds": _seconds(root, progress),
        "bounds": _bounds(root, progress),
        "starts": _starts(root, progress),
    }


def _seconds(root: Path, progress: Callable[[str], None]) -> dict[str, dict[str, list[float]]]:
    settings = {case: TurnedSettings(gates_of(root, case)) for case in CASES}  # must outlive the sessions
    models = {}
    for case, own in settings.items():
        progress(f"loading {case.title}")
        options = own.options(kernels=case.kernels)
        models[case] = case.bundle(root).load(sess_options=options, verify=False)
    frames = {case: random_frames(case.bundle(root)) for case in CASES}
    found = {}
    for mode, rounds in ROUNDS.items():
        runs = {case.key: timed(one_round(mode, models[case], frames[case])) for case in CASES}
        found[mode] = interleaved(runs, rounds, title=mode, progress=progress)
    return found


def measure_all_threads(root: Path, *, progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """One thread beside two: of the machine, and of each case with native kernels by its key; see `threads.py`."""
    rates = measure_rates_of_threads(progress)
    cases = [case for case in CASES if case.kernels == NATIVE]
    return {"rates": rates, "found": {case.key: _threads(root, case, progress) for case in cases}}


def _threads(root: Path, case: Case, progress: Callable[[str], None]) -> dict[str, Any]:
    bundle, settings = case.bundle(root), TurnedSettings(gates_of(root, case))  # must outlive the sessions

    def load(num_threads: int) -> Model:
        progress(f"loading {case.title}, {num_threads} threads")
        return bundle.load(sess_options=settings.options(num_threads, case.kernels), verify=False)

    return measure_threads(load, random_frames(bundle), progress)


def _bounds(root: Path, progress: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Time and bound of the parts of the mixture's encoder in int8, with its own routers and speech."""
    cases = [case for case in CASES if (case.model, case.precision) == (MIXTURE, "int8")]
    probes = {case.key: Probe(case.bundle(root), kernels=case.kernels) for case in cases}
    footprints = sorted({sum(file.size for file in item.bundle.manifest.files.values()) for item in probes.values()})
    rates = measure_rates(footprints, 1, repetitions=NUM_BOUNDS, progress=progress)
    rate = next(iter(probes.values())).sample_rate
    found = {}
    for mode, context in BOUNDS.items():
        samples = speech(BOUND_S[mode], rate)
        entries = measure_bound(probes, samples, context, rates, repetitions=NUM_BOUNDS, progress=progress)
        found[mode] = {entry["bundle"]: entry for entry in entries}
    return found


def _starts(root: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = CASES[0].bundle(root)
        rate = bundle.manifest.features.sample_rate
        audio = write_wav(Path(folder) / "speech.wav", speech(UTTERANCE_S, rate), rate)
        for kernels in (NATIVE, PLAIN):
            bundles = {case.key: case.bundle(root) for case in CASES if case.kernels == kernels}
            if kernels == NATIVE:
                bundles[PACKED_KEY] = Bundle.open(root / MIXTURE / PACKED, verify=False)
            found |= measure_footprint(bundles, audio, kernels=kernels, repetitions=NUM_STARTS, progress=progress)
    return {key: found[key] for key in (*_TITLES, PACKED_KEY)}


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: the tables of all machines in turn; ratios and megabytes of the one measured last."""
    machines = list(results["machines"].values())
    tables = "\n\n".join(line for content in machines for line in _page(content))
    found = {"tables": tables or "Nothing has been measured yet."}
    for title, one, other in (
        ("gain", Case(MIXTURE, "int8", PLAIN), Case(MIXTURE, "int8", NATIVE)),
        ("int4", Case(MIXTURE, "int4", NATIVE), BASELINE),
        ("int8", Case(MIXTURE, "int8", NATIVE), BASELINE),
    ):
        for mode in TITLES:
            seconds = machines[-1]["seconds"][mode] if machines else {}
            found[f"{title}.{mode}"] = f"{ratios(seconds[one.key], seconds[other.key]).median:.2f}" if seconds else "?"
    found["least.full"] = f"{_least(machines[-1]):.2f}" if machines else "?"
    rates = machines[-1].get("threads", {}).get("rates") if machines else None
    gains = gains_of_rates(rates) if rates else {}
    found |= {f"threads.{name}": f"{gains[name]:.2f}" if name in gains else "?" for name in ("read", "multiply")}
    for case in _cases(machines[-1]) if machines else ():
        if case.model == MIXTURE:
            loaded = spread_of(machines[-1]["starts"][case.key]["loaded_bytes"], 1e-6)
            found[f"loaded.{case.precision}.{case.kernels}"] = f"{loaded.median:.0f}"
    return found


def _cases(content: Mapping[str, Any]) -> list[Case]:
    """The cases that were measured; older results lack some."""
    return [case for case in CASES if case.key in content["starts"]]


def _least(content: Mapping[str, Any]) -> float:
    """The bound of the mixture's encoder with full context over the time of `BASELINE`."""
    entry = content["bounds"]["full"][Case(MIXTURE, "int8", NATIVE).key]
    least_s = sum(part["least_s"] for part in encoder_parts(entry).values()) / entry["audio_s"]
    dense_s = Spread.of(content["seconds"]["full"][BASELINE.key]).median / audio_seconds("full")
    return float(least_s / dense_s)


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {machine_key(content)}"
    yield f"{measured(content)} {content['kernels']['description']}."
    yield _times(content)
    yield _encoders(content)
    yield _memory(content)
    if threads := content.get("threads"):
        yield measured(threads)
        yield threads_table(_TITLES, threads["found"])
        if rates := threads.get("rates"):
            yield rates_table(rates)


def _times(content: Mapping[str, Any]) -> str:
    """Real-time factors, and their ratios to the same bundle without native kernels and to the dense model without."""
    rows = []
    for mode, seconds in content["seconds"].items():
        for case in _cases(content):
            factor = Spread.of([value / audio_seconds(mode) for value in seconds[case.key]])
            plain = Case(case.model, case.precision, PLAIN)
            faster = quartiles(ratios(seconds[plain.key], seconds[case.key])) if case != plain else ""
            beside = quartiles(ratios(seconds[case.key], seconds[BASELINE.key])) if case != BASELINE else ""
            rows.append([f"{TITLES[mode]}: {case.title}", quartiles(factor, 4), faster, beside])
    return table(("", "real-time factor", "times as fast", f"time / {BASELINE.title}"), rows)


def _encoders(content: Mapping[str, Any]) -> str:
    rows = []
    for mode, entries in content["bounds"].items():
        for case in CASES:
            if entry := entries.get(case.key):
                seconds = spread_of(entry["stages"]["encoder"], 1e3 / entry["audio_s"])
                rows.append(
                    [f"{TITLES[mode]}: {case.title}", quartiles(seconds, 1), f"{encoder_ratio(entry).median:.2f}"]
                )
    return table(("encoder in int8, own routers, speech", "ms for a second", "time / bound"), rows)


def _memory(content: Mapping[str, Any]) -> str:
    rows = []
    titles = {**_TITLES, PACKED_KEY: f"{Case(MIXTURE, 'int8', NATIVE).title}, packed in advance"}
    for key, item in content["starts"].items():
        sizes = [quartiles(spread_of(item[part], 1e-6), 0) for part in ("loaded_bytes", "peak_bytes")]
        rows.append([titles[key], f"{item['disk']['files'] / 1e6:.0f}", quartiles(spread_of(item["load_s"])), *sizes])
    return table(("fresh process, one thread", "bundle, MB", "sessions, s", "memory then, MB", "at its peak"), rows)


def targets(results: Mapping[str, Any]) -> list[Target]:
    """The targets of native kernels, on each machine."""
    return [target for content in results["machines"].values() for target in _targets(content)]


def _targets(content: Mapping[str, Any]) -> Iterator[Target]:
    where = machine_key(content)
    eight, four = (Case(MIXTURE, precision, NATIVE) for precision in RECIPES)
    dense = Case(SMALL, "int8", NATIVE)
    plain = Case(MIXTURE, "int8", PLAIN)
    amx = "amx" in content["kernels"]["isa"]
    for one, other, mode, limit, at_most in (
        (plain, eight, "streaming", 1.6, False),
        (plain, eight, "full", 1.8 if amx else 1.6, False),
        (plain, four, "streaming", 2.3, False),
        (four, BASELINE, "streaming", 1.3, True),
        (four, dense, "streaming", 1.7, True),
        (four, BASELINE, "full", 0.8, True),
        (eight, BASELINE, "full", 0.8, True),
        (four, dense, "full", 1.35, True),
        (eight, dense, "full", 1.35, True),
        (BASELINE, dense, "streaming", 1.2, False),
        (plain, eight, "streaming-8", 1.5, False),
    ):
        seconds = content["seconds"][mode]
        if not {one, other} <= set(_cases(content)):
            continue
        found = ratios(seconds[one.key], seconds[other.key])
        name = f"{where}: time of {one.title} / {other.title}, {TITLES[mode]}"
        yield Target(name=name, found=found, limit=limit, at_most=at_most)
    for mode, limit in (("streaming", 1.5), ("full", 1.0)):
        name = f"{where}: encoder of {eight.title} / its bound, {TITLES[mode]}"
        yield Target(name=name, found=encoder_ratio(content["bounds"][mode][eight.key]), limit=limit, at_most=True)
    if packed := content["starts"].get(PACKED_KEY):
        name = f"{where}: {eight.title}, packed in advance: sessions"
        yield Target(name=name, found=spread_of(packed["load_s"]), limit=LOAD_S, at_most=True, unit=" s")
    yield from threads_targets(where, _TITLES, content.get("threads", {"found": {}})["found"])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("full_size.native", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--results", type=Path, help="JSON file; other machines in it are kept")
    parser.add_argument("--prepare", action="store_true", help="create what is missing in FOLDER, and measure nothing")
    parser.add_argument("--threads", action="store_true", help="only measure one thread beside two")
    parser.add_argument("--again", action="store_true", help="with --prepare: quantize anew")
    args = parser.parse_args(arguments)
    if args.prepare:
        prepare(args.folder, again=args.again, progress=report)
        return
    file = args.results or results_file("native")
    results = read_json(file)
    here = measured_here()
    content = {**here, "kernels": choose_kernels(NATIVE, [CPU]).data()}
    machines = dict(results.get("machines", {}))
    before = machines.pop(machine_key(content), {})
    if args.threads:
        if not before:
            parser.error(f"{file}: has no results of this machine: measure without --threads first")
        content = {**before, "threads": {**here, **measure_all_threads(args.folder, progress=report)}}
    else:
        content |= measure(args.folder, progress=report)
    write_json(file, {**here, "machines": {**machines, machine_key(content): content}})
    print(values({"machines": {"": content}})["tables"])


if __name__ == "__main__":
    run_script(main)
