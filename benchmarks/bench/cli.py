"""The sub-command bench: parse, one call, print."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench.compare import compare_reports, read_report
from u2moe.benchmarks.bench.plan import PLANS, Plan, name_bundles, run_suite
from u2moe.benchmarks.bench.plots import draw, require_matplotlib
from u2moe.benchmarks.bench.terminal import describe
from u2moe.runtime import Bundle
from u2moe.runtime.audio.folders import find_audio
from u2moe.runtime.cli.options import given_options
from u2moe.runtime.cli.outputs import try_to_write
from u2moe.runtime.corpus.lists import Recording, read_recordings
from u2moe.runtime.model.settings import DEFAULT_PROVIDER, SessionSettings
from u2moe.runtime.places import DEMO_FOLDER
from u2moe.runtime.whole_file import write_text

Subparsers = Any  # argparse has no public name for it


def add_bench(subparsers: Subparsers) -> None:
    """`u2moe bench [BUNDLE...]`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure bundles on this machine",
        description="Measure bundles on this machine, side by side in one run: speed end to end and where the time "
        "goes, latency in real time, loading and memory, experts, and how close each part is to the machine's bound. "
        "docs/bench.md explains each number.",
    )
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE", help="folders (default: the demo model)")
    parser.add_argument("--audio", type=Path, nargs="+", metavar="FILE", help="audio files or folders")
    parser.add_argument("--list", metavar="TSV", help="lines of path<TAB>transcript, for word error rates")
    parser.add_argument("--quick", action="store_true", help="one thread, two modes, nothing in real time")
    parser.add_argument("--threads", metavar="N,N", help="numbers of threads (default: 1,2; with --quick 1)")
    parser.add_argument(
        "--chunk-sizes", metavar="N,N", help="encoder frames per chunk (default: 16,8,4; with --quick 16)"
    )
    parser.add_argument(
        "--paced", type=float, metavar="SECONDS", help="audio to recognise in real time (default: 10; with --quick 0)"
    )
    parser.add_argument(
        "--repetitions", type=int, metavar="N", help="rounds of each measurement (default: 5; with --quick 3)"
    )
    parser.add_argument("--providers", metavar="NAMES", help="onnxruntime execution providers, separated by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw it as PNG; needs matplotlib")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier report: show what changed")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="measure nothing: show, draw or compare this report"
    )
    parser.set_defaults(run=partial(run_bench, parser=parser))


def run_bench(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Measure, print the tables, and write the requested files."""
    earlier = read_report(args.compare) if args.compare else None
    if args.plots:
        require_matplotlib()
    if args.report and (given := _measuring(args, parser)):
        raise ValueError(f"--report measures nothing, so that {', '.join(given)} has no use")
    for folder in filter(None, (args.plots, args.json and args.json.parent)):
        _make(folder)  # before anything is measured
    try_to_write(args.json)
    report = read_report(args.report) if args.report else _measure(args)
    print(describe(report), flush=True)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    if args.plots:
        for file in draw(report, args.plots):
            print(f"wrote {file}")
    if earlier is not None:
        print(f"\nAgainst {args.compare}\n{compare_reports(earlier, report)}")
    return 0


def _measuring(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Names of the options that say what to measure, or how, and were given."""
    names = ("audio", "list", "quick", "threads", "chunk_sizes", "paced", "repetitions", "providers")
    return [*(["BUNDLE"] if args.bundles else []), *given_options(args, parser, names)]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be created: {error.strerror}") from error


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    return run_suite(
        {name: Bundle.open(path) for name, path in name_bundles(args.bundles or [DEMO_FOLDER]).items()},
        _recordings(args),
        _plan(args),
        settings=SessionSettings(providers=args.providers.split(",") if args.providers else (DEFAULT_PROVIDER,)),
        progress=lambda line: print(f"- {line}", file=sys.stderr, flush=True),
    )


def _plan(args: argparse.Namespace) -> Plan:
    changes = {
        "threads": _numbers("--threads", args.threads),
        "chunk_sizes": _numbers("--chunk-sizes", args.chunk_sizes),
        "paced_s": args.paced,
        "repetitions": args.repetitions,
    }
    plan = PLANS["quick" if args.quick else "default"]
    return dataclasses.replace(plan, **{name: value for name, value in changes.items() if value is not None})


def _numbers(option: str, value: str | None) -> tuple[int, ...] | None:
    """The numbers of an option, without duplicates."""
    try:
        return tuple(dict.fromkeys(int(number) for number in value.split(","))) if value else None
    except ValueError as error:
        raise ValueError(f"{option} must be numbers separated by commas, got {value!r}") from error


def _recordings(args: argparse.Namespace) -> list[Recording]:
    recordings = read_recordings(args.list) if args.list else []
    if args.audio:
        recordings += [Recording(path=path, transcript="") for path in find_audio(args.audio)]
    return recordings or read_recordings(DEMO_FOLDER / "clips" / "transcripts.txt")
