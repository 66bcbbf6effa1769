"""The command `u2moe`: parse, one call, print. Sub-commands of other packages are imported when asked for."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from u2moe.runtime.audio import duration_of, find_audio, read_blocks
from u2moe.runtime.context import parse_hotwords
from u2moe.runtime.decoding import SEARCHES, DecodingOptions
from u2moe.runtime.endpoint import EndpointConfig
from u2moe.runtime.errors import AudioOverflowError, U2moeError
from u2moe.runtime.formats import FORMATS, format_transcript
from u2moe.runtime.microphone import Microphone, input_devices
from u2moe.runtime.recognizer import DEMO_FOLDER, Recognizer
from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.transcriber import Transcriber
from u2moe.runtime.vad import VoiceActivityDetector

if TYPE_CHECKING:
    from collections.abc import Sequence

Subparsers = Any  # argparse has no public name for it

OTHER_COMMANDS = {
    "export": ("u2moe.export.cli", "add_export", "turn a WeNet checkpoint into a bundle of ONNX graphs"),
    "validate": ("u2moe.export.cli", "add_validate", "check a bundle, and its parity with a checkpoint"),
    "inspect": ("u2moe.quantize.cli", "add_inspect", "show what is in a bundle"),
    "quantize": ("u2moe.quantize.cli", "add_quantize", "make a smaller, faster bundle"),
    "serve": ("u2moe.runtime.server.cli", "add_serve", "a server for the clients that people have"),
    "bench": ("u2moe.benchmarks.bench.cli", "add_bench", "measure bundles on this machine"),
}
"""Module, function and help of each sub-command that lives in another package."""
EXTRAS = {
    "torch": "export", "onnx": "export", "onnx_ir": "export", "yaml": "export", "matplotlib": "plots",
    "python_multipart": "server", "starlette": "server", "uvicorn": "server", "websockets": "server",
}  # fmt: skip
"""The extra that brings each package which only some sub-commands need."""

_STREAM_BLOCK_S = 0.1
_BAR_WIDTH = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 good, 1 something failed, 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(arguments[0] if arguments else None).parse_args(arguments)
        code: int = args.run(args)
    except KeyboardInterrupt:
        _progress("")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has gone: so do we, without python's own complaint at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        remedy = f": pip install 'u2moe[{extra}]'" if extra else ", not installed here"
        _complain(f"'u2moe {arguments[0]}' needs the Python package {error.name}{remedy}")
        return 1
    except (U2moeError, ValueError, OSError) as error:  # of the system: a full disk, a folder that may not be written
        _progress("")
        _complain(str(error))
        return 1
    return code


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="u2moe", description="U2++ Mixture-of-Experts speech recognition with onnxruntime."
    )
    parser.add_argument("--version", action="version", version=f"u2moe {version('u2moe')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_transcribe(subparsers)
    add_listen(subparsers)
    for name, (module, function, summary) in OTHER_COMMANDS.items():
        if name == command:
            getattr(importlib.import_module(module), function)(subparsers)
        else:
            subparsers.add_parser(name, help=summary, add_help=False)
    return parser


def add_transcribe(subparsers: Subparsers) -> None:
    """`u2moe transcribe [FILES...]`."""
    parser = subparsers.add_parser(
        "transcribe",
        help="recognise audio files",
        description="Recognise audio files (WAV, FLAC, MP3, Ogg and more, any rate and channel count). Without files "
        "the clips that come with the package, without --model the model that comes with it.",
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="audio files, and folders of them")
    parser.add_argument("--stream", action="store_true", help="recognise chunk by chunk and show partial results")
    parser.add_argument(
        "--vad",
        action="store_true",
        help="recognise only where silero VAD hears speech (pip install --no-deps silero-vad)",
    )
    parser.add_argument("--vad-model", type=Path, metavar="FILE", help="the same with this ONNX file of silero VAD")
    _add_decoding(parser)
    parser.add_argument("-f", "--format", choices=FORMATS, default="txt", help="json: one object per line")
    parser.add_argument(
        "-o", "--output-dir", type=Path, metavar="DIR", help="write one file per recording, except those already there"
    )
    parser.set_defaults(run=run_transcribe)


def add_listen(subparsers: Subparsers) -> None:
    """`u2moe listen`."""
    parser = subparsers.add_parser(
        "listen",
        help="recognise what a microphone hears",
        description="Recognise what a microphone hears until Ctrl-C: partial results on stderr, final ones on stdout. "
        "Needs sounddevice: pip install 'u2moe[microphone]'.",
    )
    parser.add_argument("--device", metavar="NAME", help="number or a part of the name (default: the system's choice)")
    parser.add_argument("--list-devices", action="store_true", help="print the microphones and end")
    _add_decoding(parser)
    parser.add_argument("-f", "--format", choices=("txt", "json"), default="txt", help="json: one segment per line")
    parser.set_defaults(run=run_listen)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="BUNDLE", help="folder of a bundle")
    parser.add_argument("--chunk-size", type=int, metavar="N", help="encoder frames per chunk (default: full context)")
    parser.add_argument("--left-chunks", type=int, default=-1, metavar="N", help="chunks of left context (-1: all)")
    parser.add_argument("--search", choices=SEARCHES, help="default: attention_rescoring where there is a decoder")
    parser.add_argument("--beam-size", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--ctc-weight", type=float, metavar="X", help="of the first pass (default: from the bundle)")
    parser.add_argument("--reverse-weight", type=float, metavar="X", help="of the right-to-left decoder, 0 to 1")
    parser.add_argument("--providers", metavar="NAMES", help="onnxruntime execution providers, separated by commas")
    parser.add_argument("--num-threads", type=int, metavar="N", help="threads within one operator (default: 1)")
    parser.add_argument("--hotwords", type=Path, metavar="FILE", help='phrases to prefer, one per line ("NAME :2.5")')


def _recognizer(args: argparse.Namespace) -> Recognizer:
    return Recognizer.from_pretrained(
        args.model,
        providers=args.providers.split(",") if args.providers else None,
        num_threads=args.num_threads,
        options=DecodingOptions(
            search=args.search,
            beam_size=args.beam_size,
            ctc_weight=args.ctc_weight,
            reverse_weight=args.reverse_weight,
            chunk_size=args.chunk_size,
            num_left_chunks=args.left_chunks,
            endpoint=EndpointConfig(),
        ),
        hotwords=_read_hotwords(args.hotwords) if args.hotwords else None,
    )


def run_transcribe(args: argparse.Namespace) -> int:
    """Recognise every file; one that fails is reported, and the rest done."""
    files = find_audio(args.files or [DEMO_FOLDER / "clips"])
    outputs = _outputs(files, args.format, args.output_dir)
    has_vad = args.vad or args.vad_model is not None
    if has_vad and args.stream:
        raise ValueError("--vad is for recordings as a whole: leave out --stream")
    todo = [(file, output) for file, output in zip(files, outputs, strict=True) if not (output and output.exists())]
    if len(todo) < len(files):
        _progress(f"{len(files) - len(todo)} of {len(files)} are already in {args.output_dir}", keep=True)
    recognizer = _recognizer(args)
    vad = VoiceActivityDetector(args.vad_model) if has_vad else None
    bar = _Bar([file for file, _ in todo])
    failed = 0
    for number, (file, output) in enumerate(todo):
        bar.begin(number)
        try:
            if args.stream:
                transcript = _stream(recognizer, file)
            else:
                transcript = recognizer.transcribe(file, vad=vad, on_progress=bar.show)
        except U2moeError as error:
            _progress("")
            _complain(str(error))
            failed += 1
            continue
        _progress("")
        if output:
            _write(output, format_transcript(transcript, args.format, name=str(file)))
        elif args.format == "txt":
            print(f"{file}\t{transcript.text}" if len(files) > 1 else transcript.text, flush=True)
        else:
            print(format_transcript(transcript, args.format, name=str(file)), end="", flush=True)
    if failed:
        _complain(f"{failed} of {len(files)} files failed")
    return 1 if failed else 0


def run_listen(args: argparse.Namespace) -> int:
    """Recognise a microphone until Ctrl-C, to the end of what was said."""
    if args.list_devices:
        for number, name in input_devices():
            print(f"{number}\t{name}")
        return 0
    recognizer = _recognizer(args)
    recognizer.warm_up()
    device = int(args.device) if args.device and args.device.isdecimal() else args.device

    def on_final(segment: Result) -> None:
        _progress("")
        line = segment.text if args.format == "txt" else json.dumps(dataclasses.asdict(segment), ensure_ascii=False)
        print(line, flush=True)

    def on_error(error: Exception) -> None:
        if not isinstance(error, AudioOverflowError):
            raise error
        _progress("")
        _complain(str(error))

    transcriber = Transcriber(
        recognizer, on_partial=lambda result: _progress(result.text, keep=True), on_final=on_final, on_error=on_error
    )
    with transcriber, contextlib.closing(Microphone(transcriber, device=device)) as microphone:
        _progress("listening, Ctrl-C ends", keep=True)
        with contextlib.suppress(KeyboardInterrupt):
            microphone.start()
            while microphone.is_active:
                time.sleep(0.1)
    _progress("")
    return 0


def _outputs(files: list[Path], file_format: str, folder: Path | None) -> list[Path] | list[None]:
    """Where the transcript of each file goes; None: to stdout."""
    if folder is None:
        if not FORMATS[file_format].can_be_joined and len(files) > 1:
            raise ValueError(f"{file_format} of several files needs --output-dir: one output would be many files")
        return [None] * len(files)
    outputs = [folder / f"{file.stem}.{file_format}" for file in files]
    for output, count in Counter(outputs).items():
        if count > 1:
            raise ValueError(f"{count} files would be written to {output}: rename them, or recognise them apart")
    folder.mkdir(parents=True, exist_ok=True)
    return outputs


def _write(file: Path, content: str) -> None:
    """All or nothing, so that whatever is there is whole when an interrupted run is begun again."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(content, encoding="utf-8", newline="\n")
    part.replace(file)


def _read_hotwords(file: Path) -> list[str | tuple[str, float]]:
    try:
        return parse_hotwords(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _stream(recognizer: Recognizer, file: Path) -> Transcript:
    """Recognise a file as if it were heard, showing on stderr how the text grows."""
    stream = recognizer.create_stream()
    sample_rate = recognizer.bundle.manifest.features.sample_rate
    segments, shown = [], ""
    for block in read_blocks(file, sample_rate, _STREAM_BLOCK_S):
        stream.accept_waveform(sample_rate, block)
        recognizer.decode_streams([stream])
        segments += stream.take_segments()
        text = stream.get_result().text
        if text != shown:
            shown = text
            _progress(text, keep=True)
    stream.input_finished()
    recognizer.decode_streams([stream])
    return Transcript.of([*segments, *stream.take_segments()], stream.duration)


class _Bar:
    """How far several files are, on a terminal: "[2/5] ########............  43 %, 1:10 left, lecture.mp3"."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._durations = [duration_of(file) for file in files] if sys.stderr.isatty() else [0.0] * len(files)
        self._number = 0
        self._begin = time.monotonic()

    def begin(self, number: int) -> None:
        """Go to a file."""
        self._number = number
        self.show(0.0)

    def show(self, seconds: float) -> None:
        """Draw it with so many seconds of the file done."""
        done = sum(self._durations[: self._number]) + min(seconds, self._durations[self._number])
        share = done / max(sum(self._durations), 1e-9)
        drawn = round(share * _BAR_WIDTH)
        text = f"[{self._number + 1}/{len(self._files)}] {'#' * drawn}{'.' * (_BAR_WIDTH - drawn)} {share:4.0%}, "
        if done:
            left = round((time.monotonic() - self._begin) * (1 - share) / share)
            text += f"{left // 60}:{left % 60:02} left, "
        _progress(text + self._files[self._number].name)


def _progress(text: str, *, keep: bool = False) -> None:
    """Show a line on stderr: in place on a terminal; elsewhere only those to `keep`."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{text[-width:]}", end="", file=sys.stderr, flush=True)
    elif keep:
        print(text, file=sys.stderr, flush=True)


def _complain(message: str) -> None:
    print(f"u2moe: error: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
