"""`u2moe transcribe`: files, folders and pipes, one at a time; a failure of one does not stop the others."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u2moe.runtime.audio import find_audio, read_blocks
from u2moe.runtime.cli.options import Subparsers, add_decoding, make_recognizer
from u2moe.runtime.cli.outputs import OutputFolder
from u2moe.runtime.cli.terminal import ProgressBar, complain, print_json, print_result, show_progress
from u2moe.runtime.errors import AudioError, U2moeError
from u2moe.runtime.formats import FORMATS, format_transcript
from u2moe.runtime.recognizer import DEMO_FOLDER, Recognizer
from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.stream import Stream
from u2moe.runtime.vad import VoiceActivityDetector

_STREAM_BLOCK_S = 0.1
_STDIN = Path("/dev/stdin")
_INTERRUPTED = "interrupted; what was recognised is kept"


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
        "files", nargs="*", type=Path, metavar="FILE", help="audio files, folders, pipes; -: standard input"
    )
    parser.add_argument("--stream", action="store_true", help="recognise chunk by chunk and show partial results")
    parser.add_argument(
        "--vad",
        action="store_true",
        help="recognise only where silero VAD finds speech (pip install --no-deps silero-vad)",
    )
    parser.add_argument("--vad-model", type=Path, metavar="FILE", help="like --vad, with this ONNX file of silero VAD")
    parser.add_argument(
        "--channel",
        type=int,
        metavar="N",
        help="use only this channel, 0 for the left one (default: the average of all)",
    )
    add_decoding(parser, chunk_size="full context; with --stream as in training, or 16")
    parser.add_argument("-f", "--format", choices=FORMATS, default="txt", help="json: one object per line")
    parser.add_argument(
        "-o",
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write one file per recording, except those already made with the same model and options",
    )
    parser.add_argument("--overwrite", action="store_true", help="with -o: write all files, replacing existing ones")
    parser.set_defaults(run=run_transcribe)


def run_transcribe(args: argparse.Namespace) -> int:
    """Recognise every file; failures are reported, and the rest continues."""
    _check(args)
    files, num_failed = _find(args.files or [DEMO_FOLDER / "clips"])
    num_asked = len(files) + num_failed
    if args.output_dir is None and not FORMATS[args.format].can_be_joined and len(files) > 1:
        raise ValueError(f"{args.format} of several files needs --output-dir: one output would be many files")
    outputs = OutputFolder(args.output_dir, args.format, files) if args.output_dir else None
    recognizer = make_recognizer(args)
    vad = VoiceActivityDetector(args.vad_model) if _has_vad(args) else None
    made_by = _made_by(args, recognizer) if outputs else None
    todo = _missing(outputs, files, made_by) if outputs and not args.overwrite else files
    job = _Job(args=args, recognizer=recognizer, vad=vad, outputs=outputs, made_by=made_by, is_single=len(files) == 1)
    bar = ProgressBar(todo)
    for number, file in enumerate(todo):
        bar.begin(number)
        try:
            transcript, is_interrupted = job.recognize(file, bar.show)
            show_progress("")
            job.write(file, transcript)
        except (U2moeError, UnicodeError) as error:
            complain(str(error))
            num_failed += 1
            continue
        if transcript.error is not None:
            complain(transcript.error)
            num_failed += 1
        if is_interrupted:
            return 128 + signal.SIGINT
    if num_failed:
        complain(f"{num_failed} of {num_asked} files failed")
    return 1 if num_failed else 0


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other or would have no effect."""
    if _has_vad(args) and args.stream:
        raise ValueError("--vad needs whole recordings: leave out --stream")
    if args.left_chunks is not None and args.chunk_size is None and not args.stream:
        raise ValueError("--left-chunks needs --chunk-size or --stream: full context has no chunks")
    if args.overwrite and args.output_dir is None:
        raise ValueError("--overwrite needs --output-dir")


def _has_vad(args: argparse.Namespace) -> bool:
    return args.vad or args.vad_model is not None


def _find(paths: list[Path]) -> tuple[list[Path], int]:
    """Recordings at these paths, and the number of paths without any."""
    files, num_failed = [], 0
    for path in paths:
        try:
            files += find_audio([_STDIN if str(path) == "-" and os.name == "posix" else path])
        except AudioError as error:
            complain(str(error))
            num_failed += 1
    return files, num_failed


def _made_by(args: argparse.Namespace, recognizer: Recognizer) -> dict[str, Any]:
    """Everything that affects a transcript besides its recording."""

    def digest(file: Path | None) -> str | None:
        return None if file is None else hashlib.sha256(file.read_bytes()).hexdigest()

    options = recognizer.options
    made_by = {
        "model": recognizer.bundle.fingerprint,
        "providers": recognizer.model.providers,
        "options": dataclasses.asdict(dataclasses.replace(options, language_model=None)),
        "hotwords": digest(args.hotwords),
        "vad": digest(args.vad_model) or args.vad,
        "stream": args.stream,
        "channel": args.channel,
    }
    if options.language_model is not None:
        made_by["language_model"] = options.language_model.digest
    return made_by


def _missing(outputs: OutputFolder, files: list[Path], made_by: Any) -> list[Path]:
    """Recordings to recognise: those without a transcript, or with one made in another way."""
    states = {file: outputs.state_of(file, made_by) for file in files}
    counts = Counter(states.values())
    if counts["done"]:
        show_progress(f"{counts['done']} of {len(files)} are already in {outputs.folder}", keep=True)
    if counts["outdated"]:
        show_progress(
            f"{counts['outdated']} in {outputs.folder} are of another model, other options or changed recordings: "
            "written again",
            keep=True,
        )
    if counts["foreign"]:
        show_progress(
            f"{counts['foreign']} in {outputs.folder} were not written by u2moe, or edited since: kept "
            "(--overwrite replaces them)",
            keep=True,
        )
    return [file for file in files if states[file] in ("missing", "outdated")]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Recognises recordings one at a time, and writes their transcripts."""

    args: argparse.Namespace
    recognizer: Recognizer
    vad: VoiceActivityDetector | None
    outputs: OutputFolder | None
    made_by: Any
    is_single: bool

    @property
    def prints_segments(self) -> bool:
        """Whether segments are printed as they are found."""
        return self.is_single and self.outputs is None and self.args.format == "txt"

    def recognize(self, file: Path, on_progress: Callable[[float], None]) -> tuple[Transcript, bool]:
        """A transcript, and whether Ctrl-C interrupted it: it then has everything recognised before."""
        segments: list[Result] = []
        seconds, error = 0.0, None

        def progressed(done: float) -> None:
            nonlocal seconds
            seconds = done
            on_progress(done)

        def found(segment: Result) -> None:
            segments.append(segment)
            if self.prints_segments:
                show_progress("")
                print_result(f"{segment.text}\n")

        try:
            if self.args.stream:
                self._stream(file, progressed, found)
            else:
                for segment in self.recognizer.segments(
                    file, vad=self.vad, channel=self.args.channel, on_progress=progressed
                ):
                    found(segment)
        except KeyboardInterrupt:
            return Transcript.of(segments, seconds, AudioError(f"{file}: {_INTERRUPTED}")), True
        except AudioError as damage:
            if seconds == 0:
                raise
            error = damage
        if self.prints_segments and not segments:
            print_result("\n")
        return Transcript.of(segments, seconds, error), False

    def _stream(self, file: Path, on_progress: Callable[[float], None], found: Callable[[Result], None]) -> None:
        """Recognise a file as if it were live, showing partial results on stderr."""
        stream = self.recognizer.create_stream()
        sample_rate = self.recognizer.bundle.manifest.features.sample_rate
        shown = ""
        try:
            for block in read_blocks(file, sample_rate, _STREAM_BLOCK_S, channel=self.args.channel):
                stream.accept_waveform(sample_rate, block)
                self._decode(stream, found)
                on_progress(stream.duration)
                text = stream.get_result().text
                if text != shown:
                    shown = text
                    show_progress(text, keep=True)
        except (AudioError, KeyboardInterrupt):
            with contextlib.suppress(U2moeError):  # keep what was recognised so far
                stream.input_finished()
                self._decode(stream, found)
            raise
        stream.input_finished()
        self._decode(stream, found)

    def _decode(self, stream: Stream, found: Callable[[Result], None]) -> None:
        self.recognizer.decode_streams([stream])
        for segment in stream.take_segments():
            found(segment)

    def write(self, file: Path, transcript: Transcript) -> None:
        """Write a transcript to its file; an incomplete one never replaces a complete one."""
        if self.prints_segments:
            return
        name = str(file)
        content = format_transcript(transcript, self.args.format, name=name)
        if self.outputs is not None and transcript.complete:
            self.outputs.write(file, content, self.made_by)
        elif self.outputs is not None:
            partial = self.outputs.write_partial(file, content)
            show_progress(f"{file}: not complete: {partial}", keep=True)
        elif self.args.format == "txt":
            print_result(f"{file}\t{transcript.text}\n")
        elif self.args.format == "json":
            print_json(content)
        else:
            print_result(content)
