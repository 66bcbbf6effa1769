"""What do a billion parameters in experts cost, beside dense networks of 225 million and of a billion?

    python -m u2moe.benchmarks.studies.full_size FOLDER --prepare
    python -m u2moe.benchmarks.studies.full_size FOLDER [--results FILE] [--only int8/1/] [--at-most 1]

FOLDER holds the bundles of random weights (`random_models`); missing ones are created. Results are written cell by
cell, and a second run measures the missing ones; `--at-most 1` ends after one cell, for machines that are rarely idle.

Times are those of the encoder and CTC head on onnxruntime alone, without features and search: a search over random
probabilities says nothing about a trained model. Routers are adjusted so that tokens spread evenly, the worst case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.probe import Probe
from u2moe.benchmarks.instruments.statistics import Spread, interleaved, ratios, spread_of, timed
from u2moe.benchmarks.instruments.workload import (
    CHUNK_S,
    NUM_HYPOTHESES,
    NUM_STREAMS,
    UTTERANCE_S,
    audio_seconds,
    one_round,
    random_frames,
    utterance,
)
from u2moe.benchmarks.results.files import results_file, write_json
from u2moe.benchmarks.results.markdown import quartiles, short, table
from u2moe.benchmarks.results.provenance import recorded, resumed
from u2moe.benchmarks.results.targets import Target
from u2moe.benchmarks.studies.shared.encoders import (
    PARTS,
    START_HEADER,
    bound_ratio,
    bounds_of,
    parts_of,
    start_row,
    starts_of,
)
from u2moe.benchmarks.studies.shared.random_models import (
    FLOAT,
    LARGE,
    MIXTURE,
    MODELS,
    NAMES,
    SMALL,
    GateSettings,
    even_gates,
    has_experts,
    make_bundle,
    routing,
)
from u2moe.benchmarks.studies.shared.script import report, run_script, script_parser
from u2moe.export.random_checkpoint import PRESETS, num_parameters, random_config
from u2moe.runtime.model.settings import SessionSettings

TIMED = {
    "streaming": "streaming", "streaming-8": f"streaming, batch of {NUM_STREAMS}", "full": "full context",
    "second-pass": "second pass",
}  # fmt: skip
BOUNDS = {"bound-streaming": "streaming", "bound-full": "full"}
MODES = ("start", *TIMED, *BOUNDS)
PRECISIONS = {"int8": "int8", "fp32": FLOAT}
CELLS = [f"int8/1/{mode}" for mode in MODES]  # precision/threads/mode; those with targets first
CELLS += [f"{precision}/{mode}" for precision in ("int8/2", "fp32/1", "fp32/2") for mode in TIMED]
REPETITIONS, NUM_STARTS, NUM_BOUNDS = {"int8": 5, "fp32": 3}, 3, 5
OWN, EVEN = "own routers, speech", "even"

Results = Mapping[str, Any]


def measure(cell: str, root: Path, models: Sequence[str] = MODELS, repetitions: int | None = None) -> dict[str, Any]:
    """The content of a cell by model: of `starts_of` or `bounds_of`, or `seconds` of each round."""
    precision, threads, mode = cell.split("/")
    bundles = {name: make_bundle(name, PRECISIONS[precision], root, report) for name in models}
    if mode == "start":
        return starts_of(bundles, "onnxruntime", repetitions or NUM_STARTS)
    if mode in BOUNDS:
        plain = SessionSettings(kernels="onnxruntime")
        probes = {name: Probe(bundle, plain) for name, bundle in bundles.items() if name != LARGE}
        return bounds_of(probes, BOUNDS[mode], repetitions or NUM_BOUNDS, report)
    settings = {name: GateSettings(even_gates(name, root)) for name in models}  # must outlive the sessions
    cases = {}
    for name, bundle in bundles.items():
        model = bundle.load(SessionSettings(sess_options=settings[name].options(int(threads))))
        cases[name] = timed(one_round(mode, model, random_frames(bundle)))
    seconds = interleaved(cases, repetitions or REPETITIONS[precision])
    return {name: {"seconds": values} for name, values in seconds.items()}


def run(
    root: Path, results: Path, cells: Sequence[str], *, at_most: int | None = None, models: Sequence[str] = MODELS,
    repetitions: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the cells that the results lack, and write these after each; ValueError: they are of other models."""
    parameters = {name: num_parameters(random_config(**PRESETS[name])) for name in models}
    content = resumed(results, {"parameters": parameters, "routings": {}, "cells": {}})
    if content["parameters"] != parameters:
        raise ValueError(f"{results}: holds {content['parameters']}, expected {parameters}; name another file")
    for cell in [cell for cell in cells if cell not in content["cells"]][:at_most]:
        report(cell)
        content["cells"][cell] = measure(cell, root, models, repetitions)
        content["routings"] = content["routings"] or routings(root, models)
        write_json(results, recorded(content))
    return content


def routings(root: Path, models: Sequence[str] = MODELS) -> dict[str, Mapping[str, float]]:
    """Experts that chunks use with the random routers on speech, and with the adjusted ones."""
    (name,) = (name for name in models if has_experts(name))
    bundle = make_bundle(name, "int8", root)
    even = routing(bundle, random_frames(bundle), even_gates(name, root))
    return {OWN: routing(bundle, utterance(bundle), {}), EVEN: even}


def cell_of(results: Results, mode: str, precision: str = "int8/1") -> Mapping[str, Any]:
    """The measurements in one setting, by model; empty if there are none."""
    found: Mapping[str, Any] = results["cells"].get(f"{precision}/{mode}", {})
    return found


def spread(cell: Mapping[str, Any], mode: str, model: str) -> Spread:
    """Median and quartiles of a cell's real-time factor; for the second pass, of its seconds."""
    scale = 1.0 if mode == "second-pass" else audio_seconds(mode)
    return Spread.of([value / scale for value in cell[model]["seconds"]])


def ratio(cell: Mapping[str, Any], model: str, other: str) -> Spread:
    """Ratio of the time of `model` to that of `other`, of rounds."""
    return ratios(cell[model]["seconds"], cell[other]["seconds"])


def values(results: Results) -> dict[str, str]:
    """What pages show: tables of times, bounds and starts, ratios, and what limits a chunk."""
    starts = [[f"{NAMES[name]}, int8", *start_row(item)] for name, item in cell_of(results, "start").items()]
    found = {"table": _times(results), "bounds": _bounds(results)}
    found["starts"] = table(("fresh process, one thread", *START_HEADER), starts)
    found |= {name: f"{number / 1e6:.0f}" for name, number in results["parameters"].items()}
    for mode in ("streaming", "streaming-8", "full"):
        if cell := cell_of(results, mode):
            found[f"{mode}.even"] = f"{ratio(cell, MIXTURE, SMALL).median:.2f}"
            found[f"{mode}.dense_1b"] = f"{ratio(cell, LARGE, MIXTURE).median:.2f}"
    for name, title in (("own", OWN), ("even", EVEN)):
        found[f"touched.{name}"] = f"{results['routings'][title]['touched']:.1f}"
    bound, full = cell_of(results, "bound-streaming")[MIXTURE], cell_of(results, "bound-full")
    parts = parts_of(bound)
    touched = results["routings"][EVEN]["touched"] / results["routings"][OWN]["touched"]
    read_s = parts["feed_forward"]["read_s"] * touched * CHUNK_S / bound["audio_s"]
    dense, mixture = (sum(part["arithmetic_s"] for part in parts_of(full[name]).values())
                      for name in (SMALL, MIXTURE))  # fmt: skip
    chunk_s = spread(cell_of(results, "streaming"), "streaming", MIXTURE).median * CHUNK_S
    return {
        **found,
        "read_ms": f"{1e3 * read_s:.0f}",
        "chunk_ms": f"{1e3 * chunk_s:.0f}",
        "read_rate": f"{bound['rates']['read'] / 1e9:.0f}",
        "arithmetic": f"{mixture / dense:.2f}",
    }


def _times(results: Results) -> str:
    pairs = {(MIXTURE, SMALL): "MoE-1B / Dense-225M", (MIXTURE, LARGE): "MoE-1B / Dense-1B"}
    rows = []
    for key, cell in sorted(results["cells"].items(), key=lambda item: CELLS.index(item[0])):
        precision, threads, mode = key.split("/")
        if mode in TIMED:
            digits, unit = (3, " s") if mode == "second-pass" else (4, "")
            times = [quartiles(spread(cell, mode, name), digits) + unit for name in NAMES]
            shares = [quartiles(ratio(cell, *pair)) for pair in pairs]
            rows.append([f"{precision}, {TIMED[mode]}", threads, *times, *shares])
    return table(("", "threads", *NAMES.values(), *pairs.values()), rows)


def _bounds(results: Results) -> str:
    """Milliseconds of the encoder's parts, for a chunk or for ten seconds, and their ratios to the bounds."""
    columns = [(mode, name, entry) for mode in BOUNDS for name, entry in cell_of(results, mode).items()]
    titles = [f"{NAMES[name]}, {'streaming' if mode == 'bound-streaming' else 'full context'}"
              for mode, name, _ in columns]  # fmt: skip
    scales = [1e3 * (CHUNK_S / entry["audio_s"] if mode == "bound-streaming" else 1) for mode, _, entry in columns]

    def shown(part: Mapping[str, Any], scale: float) -> str:
        return short(scale * part["seconds"]) + (f", {part['ratio']:.2f}" if part["ratio"] else "")

    parts = [parts_of(entry) for *_, entry in columns]
    rows = [
        [part.replace("_", " "), *(shown(own[part], scale) for own, scale in zip(parts, scales, strict=True))]
        for part in PARTS
    ]
    whole = [
        f"{quartiles(spread_of(entry['stages']['encoder'], scale), 1)}, {bound_ratio(entry).median:.2f}"
        for (*_, entry), scale in zip(columns, scales, strict=True)
    ]
    return table(("part", *titles), [*rows, ["whole", *whole]])


def targets(results: Results) -> Iterator[Target]:
    """The limits for int8 on one thread, of all cells that were measured."""
    for mode, limit in (("streaming", 2.1), ("streaming-8", 2.1), ("full", 1.55)):
        if cell := cell_of(results, mode):
            name = f"RTF of MoE-1B / Dense-225M, {TIMED[mode]}, even routing"
            yield Target(name=name, found=ratio(cell, MIXTURE, SMALL), limit=limit, at_most=True)
    if cell := cell_of(results, "full"):
        name = "RTF of Dense-1B / MoE-1B, full context"
        yield Target(name=name, found=ratio(cell, LARGE, MIXTURE), limit=2.5, at_most=False)
    for mode, title in (("bound-streaming", "streaming"), ("bound-full", "full context")):
        if cell := cell_of(results, mode):
            name = f"encoder of MoE-1B / its bound, {title}"
            yield Target(name=name, found=bound_ratio(cell[MIXTURE]), limit=1.5, at_most=True)
    if cell := cell_of(results, "second-pass"):
        found = Spread.of([1e3 * seconds for seconds in cell[MIXTURE]["seconds"]])
        name = f"second pass of MoE-1B, {UTTERANCE_S:g} s, {NUM_HYPOTHESES} hypotheses"
        yield Target(name=name, found=found, limit=200, at_most=True, unit=" ms")
    alone, together = cell_of(results, "streaming"), cell_of(results, "streaming-8")
    if alone and together:  # of two cells: the widest range that their quartiles allow
        one, eight = spread(alone, "streaming", MIXTURE), spread(together, "streaming-8", MIXTURE)
        low, high = one.low / eight.high, one.high / eight.low
        found = Spread(median=one.median / eight.median, low=low, high=high, count=one.count)
        name = f"throughput of {NUM_STREAMS} streams of MoE-1B in a batch / one"
        yield Target(name=name, found=found, limit=1.4, at_most=False)
    for name, item in cell_of(results, "start").items():
        limit = 1.15 * item["disk"]["files"] / 1e6 + 300  # megabytes
        start, peak = spread_of(item["start_s"]), spread_of(item["peak_bytes"], 1e-6)
        yield Target(name=f"{NAMES[name]}: check and load", found=start, limit=3, at_most=True, unit=" s")
        yield Target(name=f"{NAMES[name]}: peak memory", found=peak, limit=limit, at_most=True, unit=" MB")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = script_parser("studies.full_size", __doc__)
    parser.add_argument("folder", type=Path, help="folder of the bundles, created if missing")
    parser.add_argument("--results", type=Path, help="JSON file; continued if it exists")
    parser.add_argument("--prepare", action="store_true", help="create what is missing in FOLDER, and measure nothing")
    parser.add_argument("--at-most", type=int, metavar="CELLS", help="stop after this many new cells")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cells whose name contains it, such as int8/1/")
    args = parser.parse_args(arguments)
    for name in MODELS if args.prepare else ():
        make_bundle(name, "int8", args.folder, report)
        even_gates(name, args.folder)
    if not args.prepare:
        cells = [cell for cell in CELLS if args.only in cell]
        found = run(args.folder, args.results or results_file("full_size"), cells, at_most=args.at_most)["cells"]
        print("missing:", ", ".join(cell for cell in CELLS if cell not in found) or "nothing")


if __name__ == "__main__":
    run_script(main)
