"""`u2moe align`: find the times of words in recordings of known texts, and where text and audio differ."""

import argparse
from collections.abc import Callable
from pathlib import Path

from u2moe.runtime.cli.inputs import Input, add_channel
from u2moe.runtime.cli.options import add_declared, add_model, add_session
from u2moe.runtime.cli.outputs import Output, add_output
from u2moe.runtime.cli.terminal import warn
from u2moe.runtime.cli.transcribe import named_path, run_each
from u2moe.runtime.decoding.alignment import MIN_SCORE
from u2moe.runtime.errors import AlignmentError
from u2moe.runtime.options import NONE, DecodingOptions
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Alignment
from u2moe.runtime.text.formats import FORMATS

WORDS = "ctm"
"""The default format: one line for each word."""
_MOST_WARNINGS = 10


def add_align(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe align FILES...`."""
    parser.description = (
        "Find when the words of a text are spoken in its recording, for subtitles, editing and "
        "training. Words that do not fit the recording are reported. For lists of recordings, use "
        "'u2moe corpus --align'."
    )
    parser.add_argument("files", nargs="+", type=named_path, metavar="FILE", help="audio files, media files, folders")
    about = (
        "text of the recording, or folder of texts, in UTF-8 (default: talk.txt next to talk.wav). A sentence "
        "ends at '.', '!', '?' or a line end; write numbers as words"
    )
    parser.add_argument("--text", type=named_path, metavar="PATH", help=about)
    add_output(parser, FORMATS, WORDS)
    about = f"report as misfits the words whose score (0 to 1) is below this (default: {MIN_SCORE})"
    parser.add_argument("--min-score", type=float, default=MIN_SCORE, metavar="X", help=about)
    add_model(parser)
    experts = parser.add_argument_group("for experts")
    add_declared(experts, DecodingOptions, {"chunk_size", "num_left_chunks"}, chunk_size="full context")
    add_session(experts)
    add_channel(experts)
    parser.set_defaults(run=run_align, raw=None, hotwords=Path(NONE), grammar=None, lm=NONE, format_text=None)


def run_align(args: argparse.Namespace) -> int:
    """Align every recording with its text."""
    if args.text is not None and not args.text.is_dir() and (len(args.files) > 1 or args.files[0].is_dir()):
        raise ValueError(f"{args.text}: is one text for several recordings: name a folder of texts")
    return run_each(args, WORDS, lambda *recording: _alignment(args, *recording))


def _alignment(
    args: argparse.Namespace, recognizer: Recognizer, item: Input, output: Output, on_progress: Callable[[float], None]
) -> tuple[Alignment, bool]:
    """Align a recording, and show the warnings. Return the alignment, and False: Ctrl-C never leaves a partial one."""
    file = args.text or item.file.with_suffix(".txt")
    file = file / f"{item.place}.txt" if file.is_dir() else file
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AlignmentError(f"{item.name}: its text {file} cannot be read: {reason}") from error
    try:
        alignment = recognizer.align(
            item.audio, text, min_score=args.min_score, on_progress=on_progress, channel=item.channel, track=item.track
        )
    except AlignmentError as error:
        raise AlignmentError(f"{item.name} with {file}: {error}") from error
    for segment in alignment.segments:
        output.segment(item, segment)
    for warning in alignment.warnings[:_MOST_WARNINGS]:
        warn(f"{item.name}: {warning}")
    if len(alignment.warnings) > _MOST_WARNINGS:
        warn(f"{item.name}: and {len(alignment.warnings) - _MOST_WARNINGS} more warnings; -f json contains all")
    return alignment, False
