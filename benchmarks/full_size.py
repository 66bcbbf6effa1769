"""The paper's table at full size: a billion parameters in experts, beside dense networks of 225 million and a billion.

    python -m u2moe.benchmarks.full_size FOLDER --results full_size.json [--at-most 1]

FOLDER holds the bundles, random weights in WeNet's layout; those that are missing are made (`artefacts`). What is
measured is written to the results cell by cell, and a second run goes on where the first was stopped. A cell is one
setting of all models in turn; `--at-most 1` ends after one, for machines that are quiet only now and then. The table
comes from the results alone (`tables`).

Time is that of encoder and CTC head, features and search left out: the search through random probabilities says
nothing of that through a trained model's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u2moe.benchmarks.artefacts import Artefact, make_artefact
from u2moe.benchmarks.experts import measure_experts
from u2moe.benchmarks.footprint import measure_footprint
from u2moe.benchmarks.listening import Mode
from u2moe.benchmarks.machine import describe_machine
from u2moe.benchmarks.measurement import interleaved
from u2moe.benchmarks.utterances import (
    CHUNK_SIZE,
    NUM_LEFT_CHUNKS,
    clips,
    one_round,
    utterance,
)
from u2moe.export.random_checkpoint import PRESETS, num_parameters, random_config
from u2moe.runtime.audio import read_audio
from u2moe.runtime.bundle import Bundle
from u2moe.runtime.recognizer import DEMO_FOLDER

MODELS = ("dense-225m", "moe-1b", "dense-1b")
SMALL, MIXTURE, LARGE = MODELS
MODES = ("start", "streaming", "streaming-8", "full", "second-pass")
DEMO = "demo model"
NAMES = {SMALL: "Dense-225M", MIXTURE: "MoE-1B", LARGE: "Dense-1B"}
REPETITIONS = {"int8": 7, "fp32": 3}
NUM_STARTS = 2


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
    """All settings, those of the targets first."""
    return [
        Cell(precision=precision, num_threads=num_threads, mode=mode)
        for precision in ("int8", "fp32")
        for num_threads in (1, 2)
        for mode in MODES
    ]


def measure(cell: Cell, artefacts: Sequence[Artefact], repetitions: int | None = None) -> dict[str, Any]:
    """What one cell holds, by model: of a start what `measure_footprint` reports, else the seconds of every round.

    Args:
        cell: the setting.
        artefacts: the models; all of them are loaded at once, but for a start.
        repetitions: rounds; None: what is usual for the precision.
    """
    bundles = {item.name: item.bundle(cell.precision) for item in artefacts}
    if cell.mode == "start":
        opened = {name: Bundle.open(folder, verify=False) for name, folder in bundles.items()}
        rounds = repetitions or NUM_STARTS
        return measure_footprint(opened, clips()[0], num_threads=cell.num_threads, repetitions=rounds)
    cases: dict[str, Callable[[], float]] = {}
    for name, folder in bundles.items():
        bundle = Bundle.open(folder, verify=False)
        model = bundle.load(num_threads=cell.num_threads)
        cases[name] = _timed(one_round(cell.mode, model, utterance(bundle)))
    seconds = interleaved(cases, repetitions or REPETITIONS[cell.precision])
    return {name: {"seconds": values} for name, values in seconds.items()}


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
        root: folder of the bundles; models that are missing there are made.
        results: JSON file, which may hold cells already.
        models: presets of `random_checkpoint`.
        cells: settings; None: all.
        at_most: stop after so many new cells.
        repetitions: rounds of a cell; None: what is usual.
        progress: called with a line for each step.

    Raises:
        ValueError: the results are of other models or another machine: ratios between machines say nothing.
    """
    content = _opened(results, models)
    missing = [cell for cell in cells or all_cells() if cell.key not in content["cells"]][:at_most]
    artefacts = [make_artefact(name, root, progress=progress) for name in models] if missing else []
    content["experts"] |= {
        title: _experts(bundle, progress)
        for title, bundle in _with_experts(artefacts).items()
        if title not in content["experts"]
    }
    for cell in missing:
        progress(cell.key)
        content["cells"][cell.key] = measure(cell, artefacts, repetitions)
        content["machine"] = describe_machine()
        written = results.with_suffix(".partial")
        written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        written.replace(results)
    return content


def _with_experts(artefacts: Sequence[Artefact]) -> dict[str, Bundle]:
    """The bundles whose routing is shown: those of the models that have experts, and the demo model."""
    presets = [item for item in artefacts if "n_expert" in PRESETS[item.name]["encoder_conf"]]
    folders = {NAMES.get(item.name, item.name): item.bundle("int8") for item in presets}
    return {title: Bundle.open(folder, verify=False) for title, folder in {**folders, DEMO: DEMO_FOLDER}.items()}


def _experts(bundle: Bundle, progress: Callable[[str], None]) -> dict[str, Any]:
    """Experts that chunks of people's speech touch: mean over layers, and the entropy of their load."""
    modes = [Mode(chunk_size=CHUNK_SIZE, num_left_chunks=NUM_LEFT_CHUNKS)]
    rate = bundle.manifest.features.sample_rate
    found = measure_experts(bundle, [read_audio(file, rate) for file in clips()], modes, progress=progress)
    return {
        mode: {
            "num_experts": item["num_experts"],
            "touched": item["touched"]["mean"],
            "load_entropy": item["load_entropy"]["mean"],
        }
        for mode, item in found.items()
    }


def _opened(results: Path, models: Sequence[str]) -> dict[str, Any]:
    """The content of the results so far."""
    parameters = {name: num_parameters(random_config(**PRESETS[name])) for name in models}
    if not results.exists():
        return {"parameters": parameters, "machine": describe_machine(), "experts": {}, "cells": {}}
    content: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    if content["parameters"] != parameters:
        raise ValueError(f"{results}: holds {content['parameters']}, expected {parameters}; name another file")
    processor = describe_machine()["processor"]
    if content["machine"]["processor"] != processor:
        raise ValueError(f"{results}: measured on {content['machine']['processor']}, this is {processor}")
    return content


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m u2moe.benchmarks.full_size", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the bundles lie, or are made")
    parser.add_argument("--results", type=Path, required=True, help="JSON file, continued if it is there")
    parser.add_argument("--at-most", type=int, metavar="CELLS", help="end after so many new cells")
    parser.add_argument("--only", metavar="TEXT", default="", help="only cells whose name contains it, such as int8/1/")
    args = parser.parse_args(arguments)
    cells = [cell for cell in all_cells() if args.only in cell.key]
    content = run(
        args.folder, args.results, cells=cells, at_most=args.at_most, progress=lambda line: print(f"- {line}")
    )
    missing = sum(cell.key not in content["cells"] for cell in all_cells())
    print(f"{args.results}: {missing} cells are missing")


def _print(line: str) -> None:
    print(f"- {line}", flush=True)


if __name__ == "__main__":
    main()
