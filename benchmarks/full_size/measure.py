"""The paper's table at full size: a billion parameters in experts, beside dense networks of 225 million and a billion.

    python -m u2moe.benchmarks.full_size.measure FOLDER --prepare
    python -m u2moe.benchmarks.full_size.measure FOLDER --results full_size.json [--only int8/1/] [--at-most 1]

FOLDER holds the bundles, random weights in WeNet's layout; those that are missing are made (`artefacts`). What is
measured is written to the results cell by cell, and a second run goes on where the first was stopped. A cell is one
setting of all models in turn; `--at-most 1` ends after one, for machines that are quiet only now and then. The table
comes from the results alone (`tables`).

Time is that of encoder and CTC head, features and search left out: the search through random probabilities says
nothing of that through a trained model's. Random routers are turned so that tokens spread evenly over all experts, the
worst case, and once so that chunks touch as many as people's speech does in the demo model (`routing`). A further
bundle skips second experts, of as many tokens as in the demo model at a limit that hardly costs words (`levers`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from u2moe.benchmarks.bench.bound import measure_bound
from u2moe.benchmarks.bench.expert_usage import measure_experts
from u2moe.benchmarks.bench.footprint import measure_footprint
from u2moe.benchmarks.full_size.even_routing import Gates, TurnedSettings, routing, second_shares, turned_gates
from u2moe.benchmarks.full_size.models import Artefact, make_artefact
from u2moe.benchmarks.instruments.probe import Instrument, Mode
from u2moe.benchmarks.instruments.rates import measure_rates
from u2moe.benchmarks.instruments.statistics import interleaved
from u2moe.benchmarks.instruments.workload import (
    CHUNK_SIZE,
    NUM_LEFT_CHUNKS,
    UTTERANCE_S,
    clips,
    one_round,
    random_frames,
    speech,
    utterance,
)
from u2moe.benchmarks.peers.process import write_wav
from u2moe.benchmarks.results.json_file import read_json, write_json
from u2moe.benchmarks.results.provenance import of_bundle, recorded, resumed
from u2moe.export.random_checkpoint import PRESETS, num_parameters, random_config
from u2moe.quantize.config import recipe
from u2moe.quantize.quantizer import quantize_bundle
from u2moe.runtime.audio import read_audio
from u2moe.runtime.bundle import Bundle
from u2moe.runtime.model import Model
from u2moe.runtime.recognizer import DEMO_FOLDER

MODELS = ("dense-225m", "moe-1b", "dense-1b")
SMALL, MIXTURE, LARGE = MODELS
ROUTED = "routed"
"""Behind the name of a model with experts, as a case: with routers turned so that it is routed as the demo model."""
SKIPPING = "skipping"
"""The same: the bundle whose tokens skip their second expert where it weighs little, evenly routed."""
SKIPPING_ROUTED = f"{SKIPPING}-{ROUTED}"
OWN, EVEN, AS_DEMO, DEMO = "own routers, speech", "even", "as the demo model", "demo model, speech"
"""Routings that are told of."""

TIMED = ("streaming", "streaming-8", "full", "second-pass")
BOUNDS = {
    "bound-streaming": Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS),
    "bound-full": Mode(),
}
MODES = ("start", *TIMED, *BOUNDS)
"""`start`: a fresh process loads a model. `bound-...`: encoder and bound, with the models' own routers and speech. The
others are those of `utterances.one_round`, evenly routed."""
BOUND_S = {"bound-streaming": 5.0, "bound-full": UTTERANCE_S}
"""Seconds of speech; a profile has a line for each kernel of each chunk."""
REPETITIONS = {"int8": 5, "fp32": 3}
NUM_STARTS, NUM_BOUNDS = 3, 5
RESULTS = Path(__file__).parents[1] / "results" / "full_size.json"
LEVERS = RESULTS.with_name("levers.json")
COST_LIMIT = 0.02
"""Of errors more, of those without skipped experts: what the lever may cost in the demo model, with full context."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting, measured for all models in turn.

    Attributes:
        precision: "fp32" or "int8".
        num_threads: of onnxruntime.
        mode: one of `MODES`.
    """

    precision: str
    num_threads: int
    mode: str

    @property
    def key(self) -> str:
        """Its name in the results."""
        return f"{self.precision}/{self.num_threads}/{self.mode}"


def all_cells() -> list[Cell]:
    """All settings, those of the targets first; float32 has no targets, and takes minutes to start a few times."""
    modes = {("int8", 1): MODES, ("int8", 2): TIMED, ("fp32", 1): TIMED, ("fp32", 2): TIMED}
    return [
        Cell(precision=precision, num_threads=num_threads, mode=mode)
        for (precision, num_threads), own in modes.items()
        for mode in own
    ]


class Bench:
    """Models on disk with routers turned for them, and those in memory that the last cell needed."""

    def __init__(
        self, artefacts: Sequence[Artefact], demo: Mapping[str, Any], progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """Load nothing yet; `demo` is what `demo_routing` tells."""
        self.artefacts = {item.name: item for item in artefacts}
        self.demo = demo
        self.lever = best_lever(read_json(LEVERS), COST_LIMIT)
        self.progress = progress
        self.free()

    def free(self) -> None:
        """Leave no model in memory."""
        self._key: tuple[str, int] | None = None
        self._models: dict[str, Model] = {}
        self._settings: list[TurnedSettings] = []

    def bundles(self, precision: str) -> dict[str, Bundle]:
        """All models."""
        return {name: Bundle.open(item.bundle(precision), verify=False) for name, item in self.artefacts.items()}

    def models(self, precision: str, num_threads: int) -> dict[str, Model]:
        """All models, evenly routed; in int8 on one thread also routed as the demo model, and with skipped experts."""
        if self._key != (precision, num_threads):
            self.free()
            for name, bundle in self.bundles(precision).items():
                self._load(name, bundle, num_threads, self.gates(name, EVEN))
                if has_experts(name) and (precision, num_threads) == ("int8", 1):
                    self._load(f"{name}/{ROUTED}", bundle, num_threads, self.gates(name, AS_DEMO))
                    if self.lever:
                        skipping = self.skipping(name)
                        self._load(f"{name}/{SKIPPING}", skipping, num_threads, self.gates(name, EVEN))
                        self._load(f"{name}/{SKIPPING_ROUTED}", skipping, num_threads, self.gates(name, AS_DEMO))
            self._key = (precision, num_threads)
        return self._models

    def _load(self, case: str, bundle: Bundle, num_threads: int, gates: Gates) -> None:
        settings = TurnedSettings(gates)
        self._models[case] = bundle.load(sess_options=settings.options(num_threads))
        self._settings.append(settings)

    def gates(self, name: str, title: str) -> Gates:
        """Routers of a model, turned; made once, none without experts."""
        if not has_experts(name):
            return {}
        num_used = self.demo["touched"] if title == AS_DEMO else None
        file = self.artefacts[name].folder / f"routers-{f'{num_used:.2f}' if num_used else 'all'}.npz"
        if not file.exists():
            self.progress(f"{name}: routers, {title}")
            bundle = self.bundles("int8")[name]
            np.savez(file, **turned_gates(bundle, random_frames(bundle), num_used))  # type: ignore[arg-type]
        with np.load(file) as arrays:
            return dict(arrays)

    def skipping(self, name: str) -> Bundle:
        """The int8 bundle in which as many tokens skip their second expert as in the demo model; made once."""
        share = self.lever["tokens"]
        folder = self.artefacts[name].folder / f"int8-skip-{share:.3f}"
        if not folder.is_dir():
            self.progress(f"{name}: int8, {share:.0%} of tokens skip their second expert")
            bundle = self.bundles("int8")[name]
            weights = second_shares(bundle, random_frames(bundle), self.gates(name, EVEN))
            limit = round(float(np.quantile(weights, share)), 4)
            quantize_bundle(self.artefacts[name].bundle("fp32"), folder, recipe("int8", skip_expert_below=limit))
        return Bundle.open(folder, verify=False)

    def skipped(self) -> dict[str, Any]:
        """What the lever is, and what it does here: `below`, and the share of `tokens` by routing; none without."""
        for name in self.artefacts if self.lever else ():
            if has_experts(name):
                bundle = self.skipping(name)
                below = float(bundle.manifest.quantization["skip_expert_below"])
                weights = {
                    title: second_shares(bundle, random_frames(bundle), self.gates(name, title))
                    for title in (EVEN, AS_DEMO)
                }
                tokens = {title: float((found < below).mean()) for title, found in weights.items()}
                return {DEMO: self.lever, "below": below, "tokens": tokens}
        return {}

    def routings(self) -> dict[str, Mapping[str, Any]]:
        """Experts that chunks touch: in the demo model, and in another with its own routers and with turned ones."""
        found = {DEMO: self.demo}
        for name, bundle in self.bundles("int8").items():
            if has_experts(name):
                found[OWN] = _means(routing(bundle, utterance(bundle), {}))
                for title in (EVEN, AS_DEMO):
                    found[title] = _means(routing(bundle, random_frames(bundle), self.gates(name, title)))
        return found


def best_lever(levers: Mapping[str, Any], cost_limit: float) -> dict[str, float]:
    """The limit below which the demo model skips most experts among those that cost few enough words.

    Args:
        levers: results of `levers`; none are fine.
        cost_limit: errors more than without skipped experts, of these, with full context.

    Returns:
        `below`, the limit; `tokens`, the share that skips an expert; `cost`, as `cost_limit` is meant. Empty: none.
    """
    settings = [item for item in levers.get("settings", ()) if item["mode"] == Mode().name]
    errors = {item["skip_below"]: item["words"]["all"]["num_errors"] for item in settings}
    costs = {below: (number - errors[0.0]) / errors[0.0] for below, number in errors.items() if below}
    below = max((limit for limit, cost in costs.items() if cost <= cost_limit), default=None)
    if below is None:
        return {}
    return {"below": below, "tokens": levers["skipped"][f"{below:g}"], "cost": costs[below]}


def has_experts(name: str) -> bool:
    """Whether a preset's encoder has any."""
    return "n_expert" in PRESETS[name]["encoder_conf"]


def demo_routing() -> dict[str, Any]:
    """Experts that chunks of people's speech touch in the demo model, and which `bundle` that is."""
    bundle = Bundle.open(DEMO_FOLDER)
    rate = bundle.manifest.features.sample_rate
    modes = [Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS)]
    (found,) = measure_experts(bundle, [read_audio(file, rate) for file in clips()], modes).values()
    return {**_means(found), **of_bundle(DEMO_FOLDER)}


def _means(summary: Mapping[str, Any]) -> dict[str, float]:
    return {
        "num_experts": summary["num_experts"],
        "touched": summary["touched"]["mean"],
        "load_entropy": summary["load_entropy"]["mean"],
    }


def measure(cell: Cell, bench: Bench, repetitions: int | None = None) -> dict[str, Any]:
    """What one cell holds, by model: of a start what `measure_footprint` reports, else the seconds of every round.

    Args:
        cell: the setting.
        bench: the models; all of them are loaded at once, but for a start.
        repetitions: rounds; None: what is usual for the cell.
    """
    if cell.mode == "start":
        bench.free()
        rounds, bundles = repetitions or NUM_STARTS, bench.bundles(cell.precision)
        rate = next(iter(bundles.values())).manifest.features.sample_rate
        with tempfile.TemporaryDirectory() as folder:
            audio = write_wav(Path(folder) / "speech.wav", speech(UTTERANCE_S, rate), rate)
            return measure_footprint(bundles, audio, num_threads=cell.num_threads, repetitions=rounds)
    if cell.mode in BOUNDS:
        bench.free()
        return _measure_bound(cell, bench, repetitions or NUM_BOUNDS)
    bundles = bench.bundles(cell.precision)
    cases = {
        case: _timed(one_round(cell.mode, model, random_frames(bundles[case.partition("/")[0]])))
        for case, model in bench.models(cell.precision, cell.num_threads).items()
        if cell.mode != "second-pass" or "/" not in case  # which differ in the encoder alone
    }
    seconds = interleaved(cases, repetitions or REPETITIONS[cell.precision])
    return {name: {"seconds": values} for name, values in seconds.items()}


def _measure_bound(cell: Cell, bench: Bench, repetitions: int) -> dict[str, Any]:
    """Time and bound of each part of the encoder, as `bound.compare` tells, of all models but the large one."""
    bundles = {name: bundle for name, bundle in bench.bundles(cell.precision).items() if name != LARGE}
    instruments = {name: Instrument(bundle, num_threads=cell.num_threads) for name, bundle in bundles.items()}
    footprints = [sum(file.size for file in bundle.manifest.files.values()) for bundle in bundles.values()]
    rates = measure_rates(footprints, cell.num_threads, repetitions=repetitions, progress=bench.progress)
    rate = next(iter(bundles.values())).manifest.features.sample_rate
    samples = speech(BOUND_S[cell.mode], rate)
    entries = measure_bound(instruments, samples, BOUNDS[cell.mode], rates, repetitions=repetitions)
    return {entry["bundle"]: entry for entry in entries}


def _timed(run: Callable[[], object]) -> Callable[[], float]:
    """The same, telling how long it took."""

    def timed() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return timed


def run(
    root: Path,
    results: Path,
    *,
    models: Sequence[str] = MODELS,
    cells: Sequence[Cell] | None = None,
    at_most: int | None = None,
    repetitions: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what the results lack, and write them after every cell.

    Args:
        root: folder of the bundles; models and routers that are missing there are made.
        results: JSON file, which may hold cells already.
        models: presets of `random_checkpoint`, at most one of them with experts.
        cells: settings; None: all.
        at_most: stop after so many new cells.
        repetitions: rounds of a cell; None: what is usual.
        progress: called with a line for each step.

    Raises:
        ValueError: the results are of other models or another machine: ratios between machines say nothing.
    """
    content = _opened(results, models)
    lever = best_lever(read_json(LEVERS), COST_LIMIT)
    is_same = of_bundle(DEMO_FOLDER).items() <= content["routings"].get(DEMO, {}).items()
    if not is_same or content["skipping"].get(DEMO, {}) != lever:  # other cases by the same names
        content["cells"] = {key: cell for key, cell in content["cells"].items() if not _is_as_demo(cell)}
    missing = [cell for cell in cells or all_cells() if cell.key not in content["cells"]][:at_most]
    if missing:
        bench, content["routings"], content["skipping"] = prepare(root, models, progress=progress)
        content["exports"] = {name: item.export for name, item in bench.artefacts.items() if item.export}
    for cell in missing:
        progress(cell.key)
        content["cells"][cell.key] = measure(cell, bench, repetitions)
        write_json(results, recorded(content))
    return content


def _is_as_demo(cell: Mapping[str, Any]) -> bool:
    return any("/" in case for case in cell)


def prepare(
    root: Path, models: Sequence[str], *, progress: Callable[[str], None] = lambda _: None
) -> tuple[Bench, dict[str, Mapping[str, Any]], dict[str, Any]]:
    """What needs no quiet machine: the models, their routers, what these do, and what skipping experts does.

    Args:
        root: where it is kept for the next time, as long as the demo model stays the same.
        models: presets of `random_checkpoint`.
        progress: called with a line for each step.
    """
    artefacts = [make_artefact(name, root, parity=name == MIXTURE, progress=progress) for name in models]
    file, skip_file = root / "routings.json", root / "skipping.json"
    routings, skipped = read_json(file), read_json(skip_file)
    is_known = of_bundle(DEMO_FOLDER).items() <= routings.get(DEMO, {}).items()
    bench = Bench(artefacts, routings[DEMO] if is_known else demo_routing(), progress)
    if not is_known:
        routings = bench.routings()
        write_json(file, routings)
    if not is_known or skipped.get(DEMO, {}) != bench.lever:
        skipped = bench.skipped()
        write_json(skip_file, skipped)
    return bench, routings, skipped


def _opened(results: Path, models: Sequence[str]) -> dict[str, Any]:
    """The content of the results so far."""
    parameters = {name: num_parameters(random_config(**PRESETS[name])) for name in models}
    content = resumed(results, {"parameters": parameters, "routings": {}, "skipping": {}, "exports": {}, "cells": {}})
    if content["parameters"] != parameters:
        raise ValueError(f"{results}: holds {content['parameters']}, expected {parameters}; name another file")
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m u2moe.benchmarks.full_size.measure", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="where the bundles lie, or are made")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file, continued if it is there")
    parser.add_argument("--prepare", action="store_true", help="make what is missing in FOLDER, and measure nothing")
    parser.add_argument("--at-most", type=int, metavar="CELLS", help="end after so many new cells")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cells whose name contains it, such as int8/1/")
    args = parser.parse_args(arguments)
    if args.prepare:
        prepare(args.folder, MODELS, progress=_print)
        return
    cells = [cell for cell in all_cells() if args.only in cell.key]
    content = run(args.folder, args.results, cells=cells, at_most=args.at_most, progress=_print)
    missing = [cell.key for cell in all_cells() if cell.key not in content["cells"]]
    print(f"{args.results}: missing {', '.join(missing)}" if missing else f"{args.results}: complete")


def _print(line: str) -> None:
    print(f"- {line}", flush=True)


if __name__ == "__main__":
    main()
