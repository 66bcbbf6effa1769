"""The subcommand `bench`: parse the arguments, measure, print."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from u2moe.benchmarks.bench import compare
from u2moe.benchmarks.bench.costs import costs_picture, costs_table
from u2moe.benchmarks.bench.plan import PLANS, name_bundles, run_suite
from u2moe.benchmarks.bench.terminal import describe
from u2moe.runtime import AudioError, Bundle, DecodingOptions, SessionSettings
from u2moe.runtime.bundle_location import find_bundle
from u2moe.runtime.cli.options import add_declared, add_words, chosen_bundle, decoding_choice, providers_in
from u2moe.runtime.cli.outputs import try_to_write
from u2moe.runtime.corpus.lists import read_recordings
from u2moe.runtime.declarations import options_of
from u2moe.runtime.whole_file import write_text

_ABOUT = """Compare bundles on this machine: speed end to end and by stage, latency, load time, memory, experts, and the
time of each part of the network as a multiple of the least possible time. docs/bench.md explains each number."""


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe bench [BUNDLE...]`."""
    parser.description = _ABOUT
    about = "bundles to measure (default: demo, the demo model), or reports (.json) to show or compare"
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE|REPORT", help=about)
    parser.add_argument("--list", metavar="PATH", help="file of path<TAB>transcript lines, or folder of recordings")
    parser.add_argument("--quick", action="store_true", help="one thread, two modes, no real-time latency")
    about = "write the report as JSON; for NAME.json, also plot the costs as NAME.svg"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=about)
    experts = parser.add_argument_group("for experts")
    about = "measure only how the second bundle's tokens differ from the first's"
    experts.add_argument("--divergence", action="store_true", help=about)
    compare.add_limits(parser, experts)
    add_words(parser)
    add_declared(experts, DecodingOptions, options_of(DecodingOptions).keys() - {"chunk_size", "num_left_chunks"})
    experts.add_argument("--num-threads", metavar="N,N", help="numbers of threads (default: 1,2; with --quick: 1)")
    about = "encoder frames per chunk (default: 16,8,4; with --quick: 16)"
    experts.add_argument("--chunk-sizes", metavar="N,N", help=about)
    about = "rounds of each measurement (default: 5; with --quick: 4)"
    experts.add_argument("--repetitions", type=int, metavar="N", help=about)
    experts.add_argument("--providers", metavar="NAMES", help="onnxruntime execution providers, separated by commas")
    parser.set_defaults(run=run_bench, failed=2)


def run_bench(args: argparse.Namespace) -> int:
    """Measure the bundles, read the reports, print the results, and write the requested files."""
    reports = [Path(name) for name in args.bundles if name.endswith(".json")]
    folders = [name for name in args.bundles if not name.endswith(".json")]
    if len(reports) > (1 if folders else 2):
        raise ValueError("compare at most two reports, or bundles with one report")
    limits = {name: value for name in compare.LIMITS if (value := getattr(args, f"most_{name}")) is not None}
    if args.divergence:
        if len(folders) != 2 or reports or limits:
            raise ValueError("--divergence needs two bundles and accepts no reports or limits")
        return _diverge(args, *map(Bundle.open, map(find_bundle, folders)))
    read = [compare.read_report(file) for file in reports]
    if limits and len(folders) + len(reports) < 2:
        raise ValueError(f"{compare.FLAGS[next(iter(limits))]} needs two bundles or reports")
    if args.output:  # fail before the long measurement
        args.output.parent.mkdir(parents=True, exist_ok=True)
        try_to_write(args.output)
    report = _measure(args, folders, limits) if folders or not read else read.pop(0)
    earlier = read[0] if read else None
    if earlier is not None or len(report["bundles"]) > 1:
        print(compare.time_ratio(report, earlier)[0])
    costs = costs_table(report) if "costs" in report else []  # reports of earlier versions have none
    print(*costs, "", describe(report), sep="\n", flush=True)
    if args.output:
        write_text(args.output, json.dumps(report, indent=1) + "\n")
        if costs and args.output.suffix == ".json":
            write_text(args.output.with_suffix(".svg"), costs_picture(report))
    if earlier is not None:
        print(f"\nAgainst {reports[-1]}", *compare.compare_reports(earlier, report), sep="\n")
    found = list(compare.verdicts(limits, report, earlier))
    failed = [text for holds, text in found if not holds]
    if found:
        print("\nlimits", *(text for _, text in found), sep="\n")
        print(f"failed: {'; '.join(failed)}" if failed else "passed: all limits met")
    return 1 if failed else 0


def _diverge(args: argparse.Namespace, one: Bundle, two: Bundle) -> int:
    from u2moe.quantize.changes import describe_changes, what_changes
    from u2moe.quantize.recordings import read_features

    if one.manifest.features != two.manifest.features or one.manifest.text != two.manifest.text:
        raise ValueError(f"{two.path}: features or vocabulary differ from those of {one.path}")
    files = [item.path for item in read_recordings(args.list or find_bundle(None) / "clips" / "transcripts.txt")]
    heard = read_features(one, files, sys.maxsize)
    if not heard:
        raise AudioError(f"{files[0]} and all other recordings are too short for the encoder")
    changes = what_changes((one.load(), two.load()), [frames for _, frames in heard], [file for file, _ in heard])
    print(f"{two.path} compared with {one.path}", *describe_changes(changes), sep="\n")
    if args.output:
        write_text(args.output, json.dumps(changes, indent=1) + "\n")
    return 0


def _measure(args: argparse.Namespace, names: list[str], limits: Mapping[str, float]) -> dict[str, Any]:
    paths = [find_bundle(name) for name in names] or [chosen_bundle(None, "bench BUNDLE")]
    options, hotwords = decoding_choice(args, paths[0])
    threads, chunk_sizes = _numbers("--num-threads", args.num_threads), _numbers("--chunk-sizes", args.chunk_sizes)
    changes = {"threads": threads, "chunk_sizes": chunk_sizes, "repetitions": args.repetitions}
    changes = {name: value for name, value in changes.items() if value is not None}
    plan = dataclasses.replace(PLANS["quick" if args.quick else "default"], **changes)
    recordings = read_recordings(args.list or find_bundle(None) / "clips" / "transcripts.txt")
    compare.check_measurable(limits, plan.repetitions, [recording.transcript for recording in recordings])
    bundles = {name: Bundle.open(path) for name, path in name_bundles(paths).items()}
    settings = SessionSettings(providers=providers_in(args))
    return run_suite(bundles, recordings, plan, settings=settings, options=options, hotwords=hotwords)


def _numbers(option: str, value: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(dict.fromkeys(int(number) for number in value.split(","))) if value else None
    except ValueError as error:
        raise ValueError(f"{option} must be numbers separated by commas, got {value!r}") from error
