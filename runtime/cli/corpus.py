"""`u2moe corpus`: a corpus on this machine, or on a Ray cluster; and `status`, `merge` and `score` of its results."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable

from u2moe.runtime.cli.corpus_results import add_merge, add_score, add_status
from u2moe.runtime.cli.options import CommandParser, Subparsers, add_channel, add_decoding, model_choice
from u2moe.runtime.cli.terminal import complain, show_progress, tell
from u2moe.runtime.corpus.blocks import Shard
from u2moe.runtime.corpus.lists import FORMATS, ListOptions
from u2moe.runtime.corpus.runner import CorpusOptions, RunProgress, run_corpus

_LINE_S = 300.0
_ACTIONS = {"status": add_status, "merge": add_merge, "score": add_score}


def add_corpus(subparsers: Subparsers) -> None:
    """`u2moe corpus LIST OUT`, and `u2moe corpus status`, `merge` and `score`."""
    parser: CommandParser = subparsers.add_parser(
        "corpus",
        help="recognise a corpus, each utterance exactly once",
        description="Recognise the utterances of a list. Results are written in blocks; a second run does what is\n"
        "missing. Any number of machines may work on one folder. Of its results:\n\n"
        "  u2moe corpus status OUT      what is done, what is missing, and what failed\n"
        "  u2moe corpus merge OUT FILE  all rows in one file\n"
        "  u2moe corpus score OUT       word errors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats of lists:\n" + "".join(f"  {name:8} {FORMATS[name].description}\n" for name in FORMATS),
    )
    for name, add_action in _ACTIONS.items():
        add_action(parser.add_action(name, add_action.__doc__))
    parser.add_argument("list", metavar="LIST", help="list, folder or URL")
    parser.add_argument("output", metavar="OUT", help="folder of the results, or a URL such as s3://bucket/name")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores that may be used)")
    parser.add_argument("--retry-failed", action="store_true", help="do blocks with failed utterances again")
    experts = add_decoding(parser, chunk_size="full context")
    experts.add_argument("--root", metavar="DIR", help="paths are relative to this folder (default: the list's)")
    experts.add_argument("--allow-pipes", action="store_true", help='run entries that are shell commands (end in "|")')
    add_channel(experts)
    experts.add_argument(
        "--block-size", type=int, default=256, metavar="N", help="utterances written at once (default: 256)"
    )
    experts.add_argument(
        "--shard", type=_shard, default=Shard(), metavar="I/N", help="only blocks I, I + N, I + 2 N, ..."
    )
    experts.add_argument(
        "--ray", metavar="ADDRESS", help='run on this Ray cluster; "auto": the one found here, "local": this machine'
    )
    parser.set_defaults(run=run_corpus_command)


def _shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_corpus_command(args: argparse.Namespace) -> int:
    """Recognise what is missing; failed utterances are counted, and the exit code tells of them."""
    run: Callable[..., RunProgress] = run_corpus
    if args.ray is not None:
        from u2moe.runtime.corpus.ray import run_on_ray  # noqa: PLC0415 - an extra

        run = functools.partial(run_on_ray, address=args.ray)
    return report(run(args.list, args.output, model_choice(args), corpus_options(args), on_progress=_Display().show))


def corpus_options(args: argparse.Namespace) -> CorpusOptions:
    """How the corpus is read, divided and written."""
    return CorpusOptions(
        list_options=ListOptions(root=args.root, allow_pipes=args.allow_pipes, channel=args.channel),
        block_size=args.block_size,
        shard=args.shard,
        num_workers=args.workers,
        retry_failed=args.retry_failed,
    )


def report(progress: RunProgress) -> int:
    """Say what was done; returns the exit code."""
    hours, speed = progress.seconds / 3600, progress.seconds / max(progress.elapsed_s, 1e-9)
    tell(
        f"{progress.num_done} utterances, {hours:.2f} hours of audio in {progress.elapsed_s:.1f} s "
        f"({speed:.0f} times real time); {progress.num_before} were there before"
    )
    if progress.num_elsewhere:
        tell(f"{progress.num_elsewhere} are being recognised by other processes")
    if progress.num_deaths:
        tell(f"{progress.num_deaths} worker processes died and were replaced")
    if progress.num_warned:
        tell(
            f"{progress.num_warned} of {progress.num_done} utterances have warnings about their audio: "
            "'u2moe corpus status OUT' shows them"
        )
    if progress.num_failed:
        complain(f"{progress.num_failed} of {progress.num_done} utterances failed: their rows have an error")
    return 1 if progress.num_failed else 0


def describe_progress(progress: RunProgress) -> str:
    """How far a run is: "1200 of 20000, 43 times real time, 1:10:05 left"."""
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


class _Display:
    """Shows progress: on a terminal all the time, elsewhere (in the log of a job) a line now and then."""

    def __init__(self) -> None:
        self._kept = time.monotonic()

    def show(self, progress: RunProgress) -> None:
        is_due = time.monotonic() - self._kept > _LINE_S
        if is_due:
            self._kept = time.monotonic()
        if is_due and not sys.stderr.isatty():
            tell(describe_progress(progress))
        show_progress(describe_progress(progress))
