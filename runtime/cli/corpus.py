"""`u2moe corpus`: recognition on this machine or a Ray cluster, and the actions `status`, `merge` and `score`."""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from u2moe.runtime.cli.options import CommandParser, add_declared, add_decoding, declared_in, model_choice
from u2moe.runtime.cli.terminal import complain, print_result, show_progress, tell
from u2moe.runtime.corpus.entry import Shard
from u2moe.runtime.corpus.lists import FORMATS, ListOptions
from u2moe.runtime.corpus.results import GroupScore, Score, merge, read_outcomes, score
from u2moe.runtime.corpus.run_folder import Claims, OutputFolder
from u2moe.runtime.corpus.runner import CorpusOptions, RunProgress, run_corpus

_NUM_CONFUSIONS, _NUM_PROBLEMS = 10, 20
_BASIC = {"num_workers", "retry_failed", "align"}


def add_corpus(parser: CommandParser) -> None:
    """Add `u2moe corpus LIST OUT`, and `u2moe corpus status`, `merge` and `score`."""
    parser.description = (
        "Recognise the utterances of a list. Results are written in blocks.\n"
        "Repeat the command to continue an interrupted run. Any number of machines may run it with the same OUT.\n"
        "Commands for the results:\n\n"
        "  u2moe corpus status OUT      show progress and errors\n"
        "  u2moe corpus merge OUT FILE  write all rows to one file\n"
        "  u2moe corpus score OUT       count word errors"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "formats of lists:\n" + "".join(f"  {name:8} {FORMATS[name].description}\n" for name in FORMATS)
    status = parser.add_action("status", "Show progress, active processes, errors and warnings.")
    status.add_argument("output", metavar="OUT", help="folder of results")
    status.set_defaults(run=run_status)
    merging = parser.add_action("merge", "Write all results to one file.")
    merging.add_argument("output", metavar="OUT", help="folder of results")
    about = "file (.jsonl, .csv or .parquet) for all rows, in the order of the list"
    merging.add_argument("file", metavar="FILE", help=about)
    merging.set_defaults(run=run_merge)
    scoring = parser.add_action("score", "Count word errors.")
    about = "folders of results; the lists must have transcripts"
    scoring.add_argument("outputs", nargs="+", metavar="OUT", help=about)
    about = "also show errors by this field: speaker, length, or another field of the list, such as 'set'"
    scoring.add_argument("--by", metavar="FIELD", help=about)
    scoring.add_argument("--worst", type=int, default=0, metavar="N", help="show the N utterances with the most errors")
    scoring.add_argument("--json", action="store_true", help="print JSON")
    scoring.set_defaults(run=run_score)
    parser.add_argument("list", metavar="LIST", help="list, folder or URL")
    parser.add_argument("output", metavar="OUT", help="folder for the results, or a URL such as s3://bucket/name")
    add_declared(parser, CorpusOptions, _BASIC)
    experts = add_decoding(parser, chunk_size="full context")
    add_declared(experts, ListOptions)
    add_declared(experts, CorpusOptions, {"block_size"})
    about = "recognise only blocks I, I + N, I + 2 N, ..."
    experts.add_argument("--shard", type=_shard, default=Shard(), metavar="I/N", help=about)
    about = 'run on this Ray cluster; "auto": an existing one, "local": this machine'
    experts.add_argument("--ray", metavar="ADDRESS", help=about)
    parser.set_defaults(run=run_corpus_command)


def _shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_corpus_command(args: argparse.Namespace) -> int:
    """Recognise the utterances that have no results yet. Return 1 if any utterance failed."""
    run: Callable[..., RunProgress] = run_corpus
    if args.ray is not None:
        from u2moe.runtime.corpus.ray import run_on_ray  # noqa: PLC0415 - an extra

        run = functools.partial(run_on_ray, address=args.ray)
    options = CorpusOptions(
        list_options=ListOptions(**declared_in(args, ListOptions)), shard=args.shard, **declared_in(args, CorpusOptions)
    )
    progress = run(args.list, args.output, model_choice(args), options, on_progress=_progress_display())
    hours, speed = progress.seconds / 3600, progress.seconds / max(progress.elapsed_s, 1e-9)
    tell(
        f"{progress.num_done} utterances, {hours:.2f} hours of audio in {progress.elapsed_s:.1f} s "
        f"({speed:.0f} times real time); {progress.num_before} were already done"
    )
    if progress.num_elsewhere:
        tell(f"{progress.num_elsewhere} are in progress in other processes")
    if progress.num_deaths:
        tell(f"{progress.num_deaths} worker processes died and were replaced")
    if progress.num_warned:
        warned = f"{progress.num_warned} of {progress.num_done} utterances have warnings"
        tell(f"{warned}: 'u2moe corpus status OUT' shows them")
    if progress.num_failed:
        complain(f"{progress.num_failed} of {progress.num_done} utterances failed: their rows have an error")
    return 1 if progress.num_failed else 0


def _progress_display() -> Callable[[RunProgress], None]:
    """Return a function that shows progress: always on a terminal, every few minutes elsewhere, as in a job's log."""
    shown = time.monotonic()

    def show(progress: RunProgress) -> None:
        nonlocal shown
        if sys.stderr.isatty():
            show_progress(_described(progress))
        elif time.monotonic() - shown > 300:
            shown = time.monotonic()
            tell(_described(progress))

    return show


def _described(progress: RunProgress) -> str:
    """Return the progress of a run as text, such as "1200 of 20000, 43 times real time, 1:10:05 left"."""
    done = progress.num_before + progress.num_recognized
    parts = [f"{done}" if progress.total is None else f"{done} of {progress.total}"]
    if progress.elapsed_s > 0:
        parts.append(f"{progress.seconds / progress.elapsed_s:.0f} times real time")
    if progress.total is not None and progress.num_recognized:
        left = round(progress.elapsed_s * max(progress.total - done, 0) / progress.num_recognized)
        parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    if progress.num_failed:
        parts.append(f"{progress.num_failed} failed")
    return ", ".join(parts)


def run_status(args: argparse.Namespace) -> int:
    """Show progress and problems. Return 1 if utterances are missing or have failed."""
    folder = OutputFolder(args.output)
    run = folder.description()
    blocks = folder.finished_blocks()
    num_done, total = sum(stop - start for start, stop in blocks.items()), folder.num_utterances
    print_result(f"{run.list_path} ({run.list_format}), model {run.model[:12]}\n")
    expected = "an unknown number of" if total is None else total
    print_result(f"{num_done} of {expected} utterances, {len(blocks)} blocks\n")
    for claim in Claims(folder.claims).held() if folder.claims is not None else []:
        state = "abandoned" if claim.is_void else f"renewed {claim.age_s:.0f} s ago"
        print_result(f"block {claim.number}: {claim.host}, process {claim.process}, {state}\n")
    warnings, errors = [], []
    for outcome in read_outcomes(folder):
        warnings += [f"{outcome.key}\twarning: {warning}\n" for warning in outcome.warnings]
        if outcome.error is not None:
            errors.append(f"{outcome.key}\t{outcome.error}\n")
    for lines, kind in ((warnings, "warnings"), (errors, "errors")):
        print_result("".join(lines[:_NUM_PROBLEMS]))
        if len(lines) > _NUM_PROBLEMS:
            print_result(f"and {len(lines) - _NUM_PROBLEMS} more {kind}\n")
    print_result(f"{len(errors)} failed\n")
    return 0 if num_done == total and not errors else 1


def run_merge(args: argparse.Namespace) -> int:
    """Write all results to one file."""
    tell(f"{args.file}: {merge(OutputFolder(args.output), args.file)} rows")
    return 0


def run_score(args: argparse.Namespace) -> int:
    """Show word errors of runs."""
    folders = [OutputFolder(output) for output in args.outputs]
    found = score(itertools.chain.from_iterable(map(read_outcomes, folders)), by=args.by, num_worst=max(args.worst, 0))
    if any(folder.num_missing() != 0 for folder in folders):
        tell("utterances are missing: this is the score of the others")
    content = {
        "total": _group(found.total),
        "groups": {name: _group(group) for name, group in found.groups.items()},
        "worst": [dataclasses.asdict(utterance) for utterance in found.worst],
        **{name: getattr(found, name) for name in ("num_without_transcript", "num_failed")},
        "report": found.report.data(),
    }
    print_result(json.dumps(content, ensure_ascii=False) + "\n" if args.json else _as_text(found))
    return 0


def _group(group: GroupScore) -> dict[str, Any]:
    counts = {name: getattr(group, name) for name in ("num_utterances", "num_errors", "num_words")}
    return {**counts, "rate": round(group.rate, 6), "interval": [round(limit, 6) for limit in group.interval()]}


def _as_text(found: Score) -> str:
    lines = []
    for name, group in {**found.groups, "all": found.total}.items():
        low, high = group.interval()
        rate = f"{group.rate:.2%} word errors (95 %: {low:.2%} to {high:.2%})"
        lines.append(f"{name}: {rate}, {group.num_words} words, {group.num_utterances} utterances")
    report, confusions = found.report, found.report.data(_NUM_CONFUSIONS)["confusions"]
    lines.append(
        f"{report.num_insertions} insertions, {report.num_deletions} deletions, {report.num_substitutions} "
        f"substitutions in {report.num_wrong_texts} of {report.num_texts} utterances"
    )
    if confusions:
        none = "(nothing)"
        pairs = (f"{each['expected'] or none} > {each['found'] or none} {each['count']}" for each in confusions)
        lines.append(f"most confused: {', '.join(pairs)}")
    if found.num_failed:
        lines.append(f"{found.num_failed} failed, in whole or in part: their missing words count as errors")
    if found.num_without_transcript:
        lines.append(f"{found.num_without_transcript} have no transcript")
    for utterance in found.worst:
        counts = f"{utterance.num_errors} errors, {utterance.num_words} words"
        lines += [f"{utterance.key}: {counts}", f"  - {utterance.reference}", f"  + {utterance.text}"]
    return "".join(f"{line}\n" for line in lines)
