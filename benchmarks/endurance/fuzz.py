"""Do damaged files and odd options ever cause more than a documented error? Any number of inputs, each from a seed.

    python -m u2moe.benchmarks.endurance.fuzz BUNDLE AUDIO... [--configs TRAIN_YAML...] [--inputs audio=100000] [--idle]

Worker processes, one per kind, try the inputs with limits on time and memory: if an input ends a process, that is
counted, and a new process continues after it. Results are written regularly, and a second run continues where the first
was stopped. Exits with 1 on a failure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from u2moe.benchmarks.endurance.worker import GOOD, Worker, Workers
from u2moe.benchmarks.results.files import results_file, write_json
from u2moe.benchmarks.results.markdown import table
from u2moe.benchmarks.results.provenance import kernels_of, of_bundle, recorded, resumed
from u2moe.benchmarks.script import report, run_script, script_parser

NUM_INPUTS = {
    "audio": 100_000,
    "media": 10_000,
    "bundles": 10_000,
    "options": 10_000,
    "models": 10_000,
    "configs": 10_000,
}
TITLES = {
    "audio": "damaged audio files",
    "media": "damaged media files",
    "bundles": "damaged bundles",
    "options": "odd options and samples",
    "models": "damaged language models",
    "configs": "damaged train.yaml files",
}
_TURNS = 200
"""Number of turns between kinds, so that an interrupted run has tried some of each."""
_WRITE_S = 30.0
_NUM_REPORTED = 20


def fuzz(
    start: Callable[[str], Worker],
    results: Path,
    num_inputs: Mapping[str, int],
    *,
    about: Mapping[str, Any] | None = None,
    until: float | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Try inputs of all kinds that are not in the results yet.

    Args:
        start: starts a worker for a kind.
        results: JSON file, which may hold inputs already.
        num_inputs: total number of inputs of each kind.
        about: further content for the results.
        until: when to stop, by `time.monotonic`; None: when finished.
        progress: called with a line for each turn.

    Returns:
        kinds: for each, `num_inputs`; `outcomes`, the count of each outcome that is not a failure; `num_failed`, inputs
            that raised another error, made a library print, took too long, or ended the process; `failures`: "seed:
            what happened" for the first of these; `memory_mb`: [number of inputs, resident megabytes of the worker] for
            every turn.
    """
    content = resumed(results, {"kinds": {}})
    content |= about or {}
    kinds = {kind: content["kinds"].setdefault(kind, _nothing()) for kind in num_inputs}
    written = time.monotonic()
    with Workers(start) as workers:
        for turn in range(1, _TURNS + 1):
            for kind, found in kinds.items():
                memory_mb = None
                while found["num_inputs"] < num_inputs[kind] * turn // _TURNS and not _is_over(until):
                    outcome, memory_mb = workers.ask(kind, found["num_inputs"])
                    _count(found, outcome)
                    if time.monotonic() - written > _WRITE_S:
                        write_json(results, recorded(content))
                        written = time.monotonic()
                if memory_mb is not None:
                    found["memory_mb"].append([found["num_inputs"], memory_mb])
            if _is_over(until):
                break
            counts = ", ".join(f"{found['num_inputs']} {kind}" for kind, found in kinds.items())
            progress(f"{counts}; {sum(found['num_failed'] for found in kinds.values())} failed")
    write_json(results, recorded(content))
    return content


def _is_over(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until


def _nothing() -> dict[str, Any]:
    return {"num_inputs": 0, "outcomes": {}, "num_failed": 0, "failures": [], "memory_mb": []}


def _count(found: dict[str, Any], outcome: str) -> None:
    seed = found["num_inputs"]
    found["num_inputs"] += 1
    if outcome in GOOD:
        found["outcomes"][outcome] = found["outcomes"].get(outcome, 0) + 1
        return
    found["num_failed"] += 1
    if len(found["failures"]) < _NUM_REPORTED:
        found["failures"].append(f"{seed}: {outcome}")


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """What pages show: a row for each kind, each failure, how many there were of both, and the kernels in use."""
    header = ("inputs", "tried", "refused with a documented error", "used in part", "used", "anything else",
              "memory after a tenth, at the end")  # fmt: skip
    rows, failures = [], []
    for kind, found in results["kinds"].items():
        if not found["num_inputs"]:
            continue
        memory = [megabytes for _, megabytes in found["memory_mb"]]
        counts = (f"{found['outcomes'].get(name, 0):,}" for name in ("refused", "partly", "accepted"))
        grown = f"{memory[len(memory) // 10]:.0f}, {memory[-1]:.0f} MB" if memory else ""
        title = TITLES.get(kind, kind)
        rows.append((title, f"{found['num_inputs']:,}", *counts, found["num_failed"], grown))
        failures += [f"- {title}, `{failure}`" for failure in found["failures"]]
    return {
        "table": "\n\n".join([table(header, rows), *(["\n".join(failures)] if failures else [])]),
        "tried": f"{sum(found['num_inputs'] for found in results['kinds'].values()):,}",
        "failed": str(sum(found["num_failed"] for found in results["kinds"].values())),
        "kernels": kernels_of(results),
    }


def _counts(pairs: Sequence[str], known: Mapping[str, int]) -> dict[str, int]:
    """Numbers of inputs from pairs such as "audio=1000"; the default for other kinds."""
    found = dict(known)
    for pair in pairs:
        kind, _, number = pair.partition("=")
        if kind not in known or not number.isdecimal():
            raise ValueError(f"--inputs: expected KIND=NUMBER with a kind of {', '.join(known)}, got {pair!r}")
        found[kind] = int(number)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = script_parser("endurance.fuzz", __doc__)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("audio", type=Path, nargs="+", help="audio files, and folders of them")
    parser.add_argument(
        "--configs", type=Path, nargs="+", default=[], help="train.yaml files (default: none are tried)"
    )
    parser.add_argument("--inputs", nargs="+", default=[], metavar="KIND=NUMBER", help=f"default: {NUM_INPUTS}")
    parser.add_argument("--results", type=Path, help="JSON file, continued if it is there")
    parser.add_argument("--minutes", type=float, help="stop after this time; another run continues")
    parser.add_argument("--idle", action="store_true", help="use only idle processors (SCHED_IDLE, Linux)")
    args = parser.parse_args(arguments)
    if args.idle:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    known = {kind: number for kind, number in NUM_INPUTS.items() if kind != "configs" or args.configs}
    sources = ["--audio", *map(str, args.audio), "--configs", *map(str, args.configs)]

    def start(kind: str) -> Worker:
        return Worker(["-m", "u2moe.benchmarks.endurance.worker", kind, str(args.bundle), *sources])

    content = fuzz(
        start,
        args.results or results_file("fuzz"),
        _counts(args.inputs, known),
        about=of_bundle(args.bundle),
        until=time.monotonic() + 60 * args.minutes if args.minutes else None,
        progress=report,
    )
    shown = values(content)
    print(shown["table"])
    return int(shown["failed"] != "0")


if __name__ == "__main__":
    run_script(main)
