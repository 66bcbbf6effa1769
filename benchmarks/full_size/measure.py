"""The paper's table at full size: a billion parameters in experts, beside dense networks of 225 million and a billion.

    python -m u2moe.benchmarks.full_size.measure FOLDER --prepare
    python -m u2moe.benchmarks.full_size.measure FOLDER [--results FILE] [--only int8/1/] [--at-most 1]

FOLDER holds the bundles, random weights in WeNet's layout; missing ones are created (`models`). Results are written
cell by cell, and a second run continues where the first was stopped. `--at-most 1` ends after one cell, for machines
that are rarely idle.

Times are those of the encoder and CTC head, without features and search: a search over random probabilities says
nothing about a trained model. Random routers are adjusted so that tokens spread evenly over all experts, the worst
case, and also so that chunks use as many experts as real speech does in the demo model (`even_routing`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.bound import measure_bound
from u2moe.benchmarks.bench.footprint import measure_footprint
from u2moe.benchmarks.full_size.cells import BOUND_S, BOUNDS, DEMO, LARGE, MIXTURE, MODELS, Cell, all_cells
from u2moe.benchmarks.full_size.models import make_artefact
from u2moe.benchmarks.full_size.networks import Networks, demo_routing
from u2moe.benchmarks.instruments.probe import Probe
from u2moe.benchmarks.instruments.rates import measure_rates
from u2moe.benchmarks.instruments.statistics import interleaved, timed
from u2moe.benchmarks.instruments.workload import UTTERANCE_S, one_round, random_frames, speech
from u2moe.benchmarks.peers.process import write_wav
from u2moe.benchmarks.results.files import read_json, results_file, write_json
from u2moe.benchmarks.results.provenance import of_bundle, recorded, resumed
from u2moe.benchmarks.script import report, run_script, script_parser
from u2moe.export.random_checkpoint import PRESETS, num_parameters, random_config
from u2moe.runtime.recognizer import DEMO_FOLDER

REPETITIONS = {"int8": 5, "fp32": 3}
NUM_STARTS, NUM_BOUNDS = 3, 5


def measure(cell: Cell, networks: Networks, repetitions: int | None = None) -> dict[str, Any]:
    """The content of one cell, by model: for a start the report of `measure_footprint`, else the seconds of each round.

    Args:
        cell: the setting.
        networks: the models; all are loaded at once, except for a start.
        repetitions: rounds; None: the default for the cell.
    """
    if cell.mode == "start":
        networks.free()
        rounds, bundles = repetitions or NUM_STARTS, networks.bundles(cell.precision)
        rate = next(iter(bundles.values())).manifest.features.sample_rate
        with tempfile.TemporaryDirectory() as folder:
            audio = write_wav(Path(folder) / "speech.wav", speech(UTTERANCE_S, rate), rate)
            return measure_footprint(
                bundles, audio, num_threads=cell.num_threads, kernels="onnxruntime", repetitions=rounds
            )
    if cell.mode in BOUNDS:
        networks.free()
        return _measure_bound(cell, networks, repetitions or NUM_BOUNDS)
    bundles = networks.bundles(cell.precision)
    cases = {
        case: timed(one_round(cell.mode, model, random_frames(bundles[case.partition("/")[0]])))
        for case, model in networks.models(cell.precision, cell.num_threads).items()
        if cell.mode != "second-pass" or "/" not in case  # the cases differ only in the encoder
    }
    seconds = interleaved(cases, repetitions or REPETITIONS[cell.precision])
    return {name: {"seconds": values} for name, values in seconds.items()}


def _measure_bound(cell: Cell, networks: Networks, repetitions: int) -> dict[str, Any]:
    """Time and bound of each part of the encoder, as `bound.compare` returns it, except for the large model."""
    bundles = {name: bundle for name, bundle in networks.bundles(cell.precision).items() if name != LARGE}
    probes = {
        name: Probe(bundle, num_threads=cell.num_threads, kernels="onnxruntime") for name, bundle in bundles.items()
    }
    footprints = [sum(file.size for file in bundle.manifest.files.values()) for bundle in bundles.values()]
    rates = measure_rates(footprints, cell.num_threads, repetitions=repetitions, progress=networks.progress)
    rate = next(iter(bundles.values())).manifest.features.sample_rate
    samples = speech(BOUND_S[cell.mode], rate)
    entries = measure_bound(probes, samples, BOUNDS[cell.mode], rates, repetitions=repetitions)
    return {entry["bundle"]: entry for entry in entries}


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
    """Measure the missing cells, and write the results after each.

    Args:
        root: folder of the bundles; missing models and routers are created.
        results: JSON file, which may already hold cells.
        models: presets of `random_checkpoint`, at most one of them with experts.
        cells: settings; None: all.
        at_most: stop after this many new cells.
        repetitions: rounds of a cell; None: the default.
        progress: called with a line for each step.

    Raises:
        ValueError: the results are from other models or another machine: ratios between machines are meaningless.
    """
    content = _opened(results, models)
    is_same = of_bundle(DEMO_FOLDER).items() <= content["routings"].get(DEMO, {}).items()
    if not is_same:  # other cases by the same names
        content["cells"] = {key: cell for key, cell in content["cells"].items() if not _is_as_demo(cell)}
    missing = [cell for cell in cells or all_cells() if cell.key not in content["cells"]][:at_most]
    if missing:
        networks, content["routings"] = prepare(root, models, progress=progress)
        content["exports"] = {name: item.export for name, item in networks.artefacts.items() if item.export}
    for cell in missing:
        progress(cell.key)
        content["cells"][cell.key] = measure(cell, networks, repetitions)
        write_json(results, recorded(content))
    return content


def _is_as_demo(cell: Mapping[str, Any]) -> bool:
    return any("/" in case for case in cell)


def prepare(
    root: Path, models: Sequence[str], *, progress: Callable[[str], None] = lambda _: None
) -> tuple[Networks, dict[str, Mapping[str, Any]]]:
    """Preparation that needs no idle machine: the models, their routers, and the effects of routing.

    Args:
        root: folder in which it is kept, as long as the demo model stays the same.
        models: presets of `random_checkpoint`.
        progress: called with a line for each step.
    """
    artefacts = [make_artefact(name, root, parity=name == MIXTURE, progress=progress) for name in models]
    file = root / "routings.json"
    routings = read_json(file)
    is_known = of_bundle(DEMO_FOLDER).items() <= routings.get(DEMO, {}).items()
    networks = Networks(artefacts, routings[DEMO] if is_known else demo_routing(), progress)
    if not is_known:
        routings = networks.routings()
        write_json(file, routings)
    return networks, routings


def _opened(results: Path, models: Sequence[str]) -> dict[str, Any]:
    """The content of the results so far."""
    parameters = {name: num_parameters(random_config(**PRESETS[name])) for name in models}
    content = resumed(results, {"parameters": parameters, "routings": {}, "exports": {}, "cells": {}})
    if content["parameters"] != parameters:
        raise ValueError(f"{results}: holds {content['parameters']}, expected {parameters}; name another file")
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("full_size.measure", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--results", type=Path, help="JSON file; continued if it exists")
    parser.add_argument("--prepare", action="store_true", help="create what is missing in FOLDER, and measure nothing")
    parser.add_argument("--at-most", type=int, metavar="CELLS", help="stop after this many new cells")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cells whose name contains it, such as int8/1/")
    args = parser.parse_args(arguments)
    if args.prepare:
        prepare(args.folder, MODELS, progress=report)
        return
    cells = [cell for cell in all_cells() if args.only in cell.key]
    results = args.results or results_file("full_size")
    content = run(args.folder, results, cells=cells, at_most=args.at_most, progress=report)
    missing = [cell.key for cell in all_cells() if cell.key not in content["cells"]]
    print(f"{results}: missing {', '.join(missing)}" if missing else f"{results}: complete")


if __name__ == "__main__":
    run_script(main)
