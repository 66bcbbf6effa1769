"""`u2moe transcribe`: files, folders and pipes, one at a time; a failure of one does not stop the others."""

from __future__ import annotations

import argparse
import hashlib
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from u2moe.runtime.audio.raw import ENCODINGS
from u2moe.runtime.cli.inputs import Input, find_inputs
from u2moe.runtime.cli.options import Subparsers, add_channel, add_decoding, given_options, make_recognizer, named_path
from u2moe.runtime.cli.outputs import TranscriptFolder
from u2moe.runtime.cli.recognition import Recognition
from u2moe.runtime.cli.results import Results
from u2moe.runtime.cli.terminal import ProgressBar, complain, show_progress, tell
from u2moe.runtime.corpus.rows import options_as_json
from u2moe.runtime.corpus.sources import Sources
from u2moe.runtime.decoding.vad import VoiceActivityDetector
from u2moe.runtime.errors import U2moeError
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.text.formats import FORMATS
from u2moe.runtime.text.word_errors import WordErrorReport


def add_transcribe(subparsers: Subparsers) -> None:
    """`u2moe transcribe [FILES...]`."""
    parser = subparsers.add_parser(
        "transcribe",
        help="recognise audio files",
        description="Recognise audio files (WAV, FLAC, MP3, Ogg and more, any sample rate and number of channels). By "
        "default, uses the demo model and its clips. The text of a single file is printed segment by segment as it "
        "is recognised.",
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=named_path,
        metavar="FILE",
        help="audio files, media files, folders, pipes; -: standard input",
    )
    _add_audio(parser)
    parser.add_argument("--stream", action="store_true", help="recognise chunk by chunk and show partial results")
    parser.add_argument(
        "--vad",
        action="store_true",
        help="recognise only where silero VAD finds speech (pip install --no-deps silero-vad)",
    )
    parser.add_argument("--vad-model", type=Path, metavar="FILE", help="like --vad, with this ONNX file of silero VAD")
    add_decoding(parser, chunk_size="full context; with --stream as in training, or 16")
    parser.add_argument("-f", "--format", choices=FORMATS, default="txt", help="json: one object per line")
    parser.add_argument(
        "--json-lines",
        action="store_true",
        help="for programs: a JSON object on a line for each segment as it is found, each partial result (--stream), "
        "and the end of each recording",
    )
    parser.add_argument(
        "-o",
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write one file per recording, in the folders of the recordings, except those already made with the same "
        "model and options",
    )
    parser.add_argument("--overwrite", action="store_true", help="with -o: write all files, replacing existing ones")
    parser.set_defaults(run=partial(run_transcribe, parser=parser))


def _add_audio(parser: argparse.ArgumentParser) -> None:
    """Options about where the audio is."""
    parser.add_argument(
        "--manifest",
        action="append",
        metavar="FILE",
        help="recordings of a list (path and transcript with a tab between them, WeNet's data.list, and others); word "
        "errors are counted where there are transcripts; may be repeated",
    )
    add_channel(parser)
    parser.add_argument(
        "--track", type=int, metavar="N", help="use this audio track of a media file, from 0 (default: the default one)"
    )
    parser.add_argument("--raw", choices=ENCODINGS, help="files are samples without a header, read as they come")
    parser.add_argument("--rate", type=float, metavar="HZ", help="with --raw: the sample rate")
    parser.add_argument("--raw-channels", type=int, metavar="N", help="with --raw: number of channels (default: 1)")


def run_transcribe(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Recognise every recording; failures are reported, and the rest continues."""
    if args.json_lines and (given := given_options(args, parser, ("format", "output_dir"))):
        raise ValueError(f"--json-lines is a format of its own, for stdout: leave out {' and '.join(given)}")
    _check(args)
    with Sources() as sources:
        inputs, num_failed = find_inputs(args, sources)
        return _recognize(args, inputs, num_failed)


def _recognize(args: argparse.Namespace, inputs: list[Input], num_failed: int) -> int:
    num_asked = len(inputs) + num_failed
    if args.output_dir is None and not FORMATS[args.format].can_be_joined and len(inputs) > 1:
        raise ValueError(f"{args.format} of several files needs --output-dir: one output would be many files")
    outputs = TranscriptFolder(args.output_dir, args.format, inputs) if args.output_dir else None
    recognizer = make_recognizer(args)
    vad = VoiceActivityDetector(args.vad_model) if _has_vad(args) else None
    made_by = _made_by(args, recognizer) if outputs else None
    todo = _missing(outputs, inputs, made_by) if outputs and not args.overwrite else inputs
    recognition = Recognition(recognizer=recognizer, vad=vad, is_stream=args.stream)
    results = Results(args=args, outputs=outputs, made_by=made_by, is_single=len(inputs) == 1)
    errors = _errors_before(outputs, inputs, todo)
    bar = ProgressBar([item.file or Path(item.name) for item in todo])
    for number, item in enumerate(todo):
        bar.begin(number)
        try:
            transcript, is_interrupted = recognition.transcript(
                item, bar.show, found=partial(results.show, item), partial=partial(results.show_partial, item)
            )
            show_progress("")
            results.write(item, transcript)
        except (U2moeError, UnicodeError) as error:
            results.fail(item, str(error))
            num_failed += 1
            if item.transcript is not None:
                errors.add(item.transcript, "")
            continue
        if item.transcript is not None:
            errors.add(item.transcript, transcript.text)
        if transcript.error is not None:
            complain(transcript.error)
            num_failed += 1
        if is_interrupted:
            return 128 + signal.SIGINT
    results.score(errors)
    if num_failed:
        complain(f"{num_failed} of {num_asked} files failed")
    return 1 if num_failed else 0


def _errors_before(outputs: TranscriptFolder | None, inputs: list[Input], todo: list[Input]) -> WordErrorReport:
    """Word errors of transcripts that are there already."""
    errors, skipped, places = WordErrorReport(), 0, {item.place for item in todo}
    for item in inputs:
        if outputs and item.transcript is not None and item.place not in places:
            text = outputs.text_of(item)
            if text is None:
                skipped += 1
            else:
                errors.add(item.transcript, text)
    if skipped:
        tell(f"word errors leave out {skipped} that are already there: -f txt and json include them")
    return errors


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other or would have no effect."""
    if _has_vad(args) and args.stream:
        raise ValueError("--vad needs whole recordings: leave out --stream")
    if args.left_chunks is not None and args.chunk_size is None and not args.stream:
        raise ValueError("--left-chunks needs --chunk-size or --stream: full context has no chunks")
    if args.overwrite and args.output_dir is None:
        raise ValueError("--overwrite needs --output-dir")
    if args.raw and args.rate is None:
        raise ValueError("--raw needs --rate: nothing else tells the sample rate")
    if args.raw and args.manifest:
        raise ValueError("--raw is for files: a manifest lists files with headers")
    for name in ("rate", "raw_channels"):
        if getattr(args, name) is not None and not args.raw:
            raise ValueError(f"--{name.replace('_', '-')} needs --raw: other files have headers")


def _has_vad(args: argparse.Namespace) -> bool:
    return args.vad or args.vad_model is not None


def _made_by(args: argparse.Namespace, recognizer: Recognizer) -> dict[str, Any]:
    """Everything that affects a transcript besides its recording."""

    def digest(file: Path | None) -> str | None:
        return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()

    options = options_as_json(recognizer.options)
    language_model = options.pop("language_model")
    made_by = {
        "model": recognizer.bundle.fingerprint,
        "providers": recognizer.model.providers,
        "options": options,
        "hotwords": digest(args.hotwords),
        "vad": digest(args.vad_model) or args.vad,
        "stream": args.stream,
        "channel": args.channel,
        **{name: getattr(args, name) for name in ("track", "raw", "rate", "raw_channels") if getattr(args, name)},
    }
    if language_model is not None:
        made_by["language_model"] = language_model
    return made_by


def _missing(outputs: TranscriptFolder, inputs: list[Input], made_by: Any) -> list[Input]:
    """Recordings to recognise: those without a transcript, or with one made in another way."""
    states = [outputs.state_of(item, made_by) for item in inputs]
    counts = Counter(states)
    if counts["done"]:
        tell(f"{counts['done']} of {len(inputs)} are already in {outputs.folder}")
    if counts["outdated"]:
        tell(
            f"{counts['outdated']} in {outputs.folder} are of another model, other options or changed recordings: "
            "written again"
        )
    if counts["foreign"]:
        tell(
            f"{counts['foreign']} in {outputs.folder} were not written by u2moe, or edited since: kept "
            "(--overwrite replaces them)"
        )
    return [item for item, state in zip(inputs, states, strict=True) if state in ("missing", "outdated")]
