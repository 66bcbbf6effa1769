"""How many live speakers does `u2moe serve` sustain, compared with sherpa-onnx's server with the same weights?

    python -m u2moe.benchmarks.studies.serving FOLDER [--bundle BUNDLE] [--name NAME] [--cores 0] [--alone]
        [--search-graph FILE]

docs/results/serving.md explains the method. Servers run on --cores: start this script with `taskset` on other cores.
Each result is saved immediately, and later runs do not measure it again. FOLDER keeps sherpa-onnx and its graphs.
"""

import argparse
import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from u2moe.benchmarks.instruments.statistics import percentiles, show_progress
from u2moe.benchmarks.results.files import record, resumed
from u2moe.benchmarks.results.markdown import Target, table
from u2moe.benchmarks.studies.shared import load
from u2moe.benchmarks.studies.shared.load import OURS, OURS_NATIVE, THEIRS, Key, Received, RunningServer
from u2moe.benchmarks.studies.shared.script import script, study_parser
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.model.native import CPU, choose_kernels

STREAMS = (64, 96, 128, 160, *range(192, 321, 16))
Server = contextlib.AbstractContextManager[RunningServer]
KERNELS = {OURS: "onnxruntime", OURS_NATIVE: "native"}
LIMIT_S = 0.3  # maximum p95 of the delays of partial and final results, in seconds
MOST_MISSING = 0.01  # Maximum share of missing results. A late result is missing if a newer one replaces it.
RATIOS = {OURS: 1.5, OURS_NATIVE: 2.0}  # minimum ratio of sustained speakers, our server / sherpa-onnx's
_KEYS = {"ours": OURS, "native": OURS_NATIVE, "theirs": THEIRS, "theirs_with_model": load.THEIRS_WITH_MODEL}
CROWD = 4
_NUM_TRIES = 2  # Maximum number of tries for each number of speakers. The last try is kept.
_NUM_ROUNDS = 3  # rounds, at capacity and with a crowd; the one with the median ratio is kept
MOST_SLOWER = 1.2  # maximum latency of accepted speakers with a crowd, divided by their latency without one


def measure(
    server: RunningServer, buffers: Sequence[bytes], count: int, first: dict[Key, int], num_slots: int | None = None
) -> dict[str, Any]:
    """Measure `count` simultaneous speakers; see `speak_together`."""
    before = load.cpu_s(server.pid)
    received = asyncio.run(load.speak_together(server.url, buffers, count, first, num_slots=num_slots))
    spoken_s = (count - received.num_refused) * len(buffers) * load.BUFFER_S
    per_second = (load.cpu_s(server.pid) - before) / spoken_s if spoken_s else None
    return {"streams": count, "cpu_per_audio_s": per_second, **summary(received)}


def summary(received: Received) -> dict[str, Any]:
    """Summarise results: percentiles of delays in seconds, share of missing results, refusals, and failures."""
    found = {"partial": received.partials, "final": received.finals, "sending_lag": received.lags}
    num_found, failures = len(received.partials) + len(received.finals), received.failures
    return {
        **{name: percentiles(values) if values else None for name, values in found.items()},
        "missing": 1 - num_found / received.num_expected if received.num_expected else 0.0,
        "num_refused": received.num_refused, "failures": failures[:5], "num_failed": len(failures),
    }  # fmt: skip


def ours(args: argparse.Namespace, name: str, capacity: int | None) -> Server:
    """Run our server with the given capacity. None: the server measures its capacity."""
    return load.our_server(args.bundle, capacity=capacity, cores=args.cores, kernels=KERNELS[name])


def starts(args: argparse.Namespace) -> dict[str, Callable[[], Server]]:
    """Return functions that start the servers, by the servers' names in the results."""
    names = [OURS, OURS_NATIVE] if choose_kernels("auto", [CPU]).native else [OURS]
    found: dict[str, Callable[[], Server]] = {name: partial(ours, args, name, max(args.streams)) for name in names}
    if not args.alone:
        theirs = partial(load.sherpa_server, args.bundle, args.folder, cores=args.cores)
        found[THEIRS] = theirs
        if args.search_graph:
            found[load.THEIRS_WITH_MODEL] = partial(theirs, search_graph=args.search_graph)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure servers at missing speaker counts until they fail, then ours with a crowd. Save each result."""
    content, model = resumed(args.results, {"cells": {}}), args.name or args.bundle.name
    cells, buffers = content["cells"], load.speech_buffers(args.seconds)

    def keep(name: str, cell: dict[str, Any]) -> None:
        cells[name] = {"seconds": args.seconds, **cell}
        record(args.results, content)

    for server, start in starts(args).items():
        counts = {f"{model}/{server}/{count}": count for count in args.streams}
        if todo := [name for name in counts if name not in cells]:
            with start() as running:
                first = load.results_alone(running.url, buffers)
                for name in todo:
                    for _ in range(_NUM_TRIES):
                        show_progress(name)
                        keep(name, measure(running, buffers, counts[name], first))
                        if is_held(cells[name]):
                            break
                    if not is_held(cells[name]):
                        break
    crowd = f"{model}/crowd"
    if crowd not in cells:
        with ours(args, OURS, None) as running:
            capacity = running.capacity or 1
            show_progress(f"{crowd}: {capacity} and {CROWD * capacity} speakers")
            first = load.results_alone(running.url, buffers)
            counts = {"alone": capacity, "crowded": CROWD * capacity}
            rounds = [
                {kind: measure(running, buffers, count, first, num_slots=capacity) for kind, count in counts.items()}
                for _ in range(_NUM_ROUNDS)
            ]
            keep(crowd, {"capacity": capacity, **sorted(rounds, key=slowdown)[_NUM_ROUNDS // 2]})
    return content


def is_held(cell: Mapping[str, Any]) -> bool:
    """Return whether enough results arrived in time, without failures."""
    late = any(cell[kind] and cell[kind]["p95"] > LIMIT_S for kind in ("partial", "final"))
    return cell["partial"] is not None and not late and not cell["num_failed"] and cell["missing"] <= MOST_MISSING


def slowdown(crowd: Mapping[str, Any]) -> float:
    """Return the p95 latency of partial results with the crowd, divided by the latency without the crowd."""
    return float(crowd["crowded"]["partial"]["p95"] / crowd["alone"]["partial"]["p95"])


def held(cells: Mapping[str, Any], model: str, server: str) -> int:
    """Return the largest tested number of speakers such that the server sustained it and all smaller ones."""
    own = [cell for name, cell in cells.items() if name.startswith(f"{model}/{server}/")]
    sustained = itertools.takewhile(is_held, sorted(own, key=itemgetter("streams")))
    return max((cell["streams"] for cell in sustained), default=0)


def values(results: Mapping[str, Any]) -> dict[str, str]:
    """Return sustained numbers of speakers, and a table of the smallest, the largest sustained, and the next."""
    latencies = ("partial p50, p95, p99, ms", "final p50, p95, p99, ms")
    header = ("", "speakers", *latencies, "missing", "CPU ms per s of speech", "sustained")
    cells = results["cells"]
    rows = []
    for model, server in dict.fromkeys(tuple(name.split("/")[:2]) for name in cells):
        if server == "crowd":
            cell = cells[f"{model}/{server}"]
            pairs = {f"capacity {cell['capacity']}": cell["alone"], f"{CROWD} x capacity": cell["crowded"]}
            rows += [_row(f"{model}, {OURS}, {title}", part) for title, part in pairs.items()]
            continue
        own = {cell["streams"]: cell for name, cell in cells.items() if name.split("/")[:2] == [model, server]}
        most = held(cells, model, server)
        shown = sorted({min(own), most, *sorted(number for number in own if number > most)[:1]} & own.keys())
        rows += [_row(f"{model}, {server}", own[number]) for number in shown]
    found = {"table": table(header, rows)}
    for model in dict.fromkeys(name.split("/")[0] for name in cells):
        for key, server in _KEYS.items():
            found[f"{model}.{key}"] = str(held(cells, model, server))
    return found


def _row(title: str, cell: Mapping[str, Any]) -> tuple[str, ...]:
    def latency(kind: str) -> str:
        found = cell[kind]
        return ", ".join(f"{1000 * found[name]:.0f}" for name in ("p50", "p95", "p99")) if found else "none"

    processor = f"{1000 * cell['cpu_per_audio_s']:.1f}" if cell["cpu_per_audio_s"] else ""
    missing, is_in_time = f"{cell['missing']:.1%}", "yes" if is_held(cell) else "no"
    return title, str(cell["streams"]), latency("partial"), latency("final"), missing, processor, is_in_time


def targets(results: Mapping[str, Any]) -> Iterator[Target]:
    """Yield the limits: sustained speakers relative to sherpa-onnx's server, and slowdown with too many speakers."""
    cells = results["cells"]
    for model in dict.fromkeys(name.split("/")[0] for name in cells):
        peer = load.THEIRS_WITH_MODEL if held(cells, model, load.THEIRS_WITH_MODEL) else THEIRS
        theirs = held(cells, model, peer)
        for server in (OURS, OURS_NATIVE):
            if theirs and (most := held(cells, model, server)):
                title = f"sustained live speakers, {server} / server of {peer}, {model}"
                yield Target(name=title, found=most / theirs, limit=RATIOS[server], at_most=False)
        if crowd := cells.get(f"{model}/crowd"):
            title = f"p95 of partial results, {CROWD} x capacity / at capacity, {model}"
            yield Target(name=title, found=slowdown(crowd), limit=MOST_SLOWER, at_most=True)


@script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser("serving", __doc__)
    parser.add_argument("folder", type=Path, help="folder for sherpa-onnx's server and graphs")
    parser.add_argument("--bundle", type=Path, default=DEMO_FOLDER, help="folder of a bundle (default: the demo model)")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, metavar="N", help="numbers of live speakers")
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds of speech per speaker (default: 15)")
    parser.add_argument("--name", help="name of the model in the results (default: the name of the bundle's folder)")
    parser.add_argument("--search-graph", type=Path, help="language model for sherpa-onnx (default: greedy search)")
    parser.add_argument("--alone", action="store_true", help="do not measure sherpa-onnx's server")
    parser.add_argument("--cores", metavar="LIST", help="cores for the servers, in taskset's format (default: all)")
    args = parser.parse_args(arguments)
    print(values(run(args))["table"])
