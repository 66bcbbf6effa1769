"""`u2moe corpus status`, `merge` and `score`: what was done, in one file, and how well."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from typing import Any

from u2moe.runtime.cli.terminal import print_result, tell
from u2moe.runtime.corpus.claims import Claims
from u2moe.runtime.corpus.results import merge, read_outcomes
from u2moe.runtime.corpus.run_folder import OutputFolder
from u2moe.runtime.corpus.score import GroupScore, Score, score

_NUM_CONFUSIONS = 10
_NUM_PROBLEMS = 20


def add_status(parser: argparse.ArgumentParser) -> None:
    """Show what is done, by whom the rest is being done, errors of utterances, and warnings about their audio."""
    parser.add_argument("output", metavar="OUT", help="folder of results")
    parser.set_defaults(run=run_status)


def add_merge(parser: argparse.ArgumentParser) -> None:
    """Write all results into one file."""
    parser.add_argument("output", metavar="OUT", help="folder of results")
    parser.add_argument(
        "file",
        metavar="FILE",
        help="one file with all rows, in the order of the list: .jsonl, .csv or .parquet",
    )
    parser.set_defaults(run=run_merge)


def add_score(parser: argparse.ArgumentParser) -> None:
    """Count word errors."""
    parser.add_argument("outputs", nargs="+", metavar="OUT", help="folders of results with transcripts in the list")
    parser.add_argument("--by", metavar="FIELD", help="speaker, length, or a field of the list, such as set")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="show the N utterances with most errors")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_score)


def run_status(args: argparse.Namespace) -> int:
    """Show what is done, and problems; exit code 1 while something is missing or has failed."""
    folder = OutputFolder(args.output)
    run = folder.description()
    blocks = folder.finished_blocks()
    num_done, total = sum(stop - start for start, stop in blocks.items()), folder.num_utterances
    print_result(f"{run.list_path} ({run.list_format}), model {run.model[:12]}\n")
    print_result(
        f"{num_done} of {'an unknown number of' if total is None else total} utterances, {len(blocks)} blocks\n"
    )
    for claim in Claims(folder.claims).held() if folder.claims is not None else []:
        state = "abandoned" if claim.is_void else f"renewed {claim.age_s:.0f} s ago"
        print_result(f"block {claim.number}: {claim.owner.host}, process {claim.owner.process}, {state}\n")
    num_failed = _show_problems(folder)
    return 0 if num_done == total and not num_failed else 1


def _show_problems(folder: OutputFolder) -> int:
    """Show the first warnings and the first errors; returns the number of utterances that failed."""
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
    return len(errors)


def run_merge(args: argparse.Namespace) -> int:
    """Merge all results into one file."""
    num_rows = merge(OutputFolder(args.output), args.file)
    tell(f"{args.file}: {num_rows} rows")
    return 0


def run_score(args: argparse.Namespace) -> int:
    """Show word errors."""
    folders = [OutputFolder(output) for output in args.outputs]
    found = score(itertools.chain.from_iterable(map(read_outcomes, folders)), by=args.by, num_worst=max(args.worst, 0))
    num_missing = [folder.num_missing() for folder in folders]
    if any(number != 0 for number in num_missing):
        tell("utterances are missing: this is the score of those that are there")
    print_result(json.dumps(_as_json(found), ensure_ascii=False) + "\n" if args.json else _as_text(found))
    return 0


def _as_json(found: Score) -> dict[str, Any]:
    return {
        "total": _group(found.total),
        "groups": {name: _group(group) for name, group in found.groups.items()},
        "worst": [dataclasses.asdict(utterance) for utterance in found.worst],
        "num_without_transcript": found.num_without_transcript,
        "num_failed": found.num_failed,
        "report": found.report.data(),
    }


def _group(group: GroupScore) -> dict[str, Any]:
    return {
        "num_utterances": group.num_utterances,
        "num_errors": group.num_errors,
        "num_words": group.num_words,
        "rate": round(group.rate, 6),
        "interval": [round(limit, 6) for limit in group.interval()],
    }


def _as_text(found: Score) -> str:
    lines = [_line(name, group) for name, group in {**found.groups, "all": found.total}.items()]
    report, confusions = found.report, found.report.data(_NUM_CONFUSIONS)["confusions"]
    lines.append(
        f"{report.num_insertions} insertions, {report.num_deletions} deletions, {report.num_substitutions} "
        f"substitutions in {report.num_wrong_texts} of {report.num_texts} utterances"
    )
    if confusions:
        pairs = (
            f"{pair['expected'] or '(nothing)'} > {pair['found'] or '(nothing)'} {pair['count']}" for pair in confusions
        )
        lines.append(f"most confused: {', '.join(pairs)}")
    lines += [f"{found.num_failed} failed, in whole or in part: their missing words count as errors"] * (
        found.num_failed > 0
    )
    lines += [f"{found.num_without_transcript} have no transcript"] * (found.num_without_transcript > 0)
    for utterance in found.worst:
        lines += [
            f"{utterance.key}: {utterance.num_errors} errors, {utterance.num_words} words",
            f"  - {utterance.reference}",
            f"  + {utterance.text}",
        ]
    return "".join(f"{line}\n" for line in lines)


def _line(name: str, group: GroupScore) -> str:
    low, high = group.interval()
    return (
        f"{name}: {group.rate:.2%} word errors (95 %: {low:.2%} to {high:.2%}), {group.num_words} words, "
        f"{group.num_utterances} utterances"
    )
