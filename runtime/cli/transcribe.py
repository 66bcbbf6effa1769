"""`u2moe transcribe`: recognise files, folders and pipes, one by one. The failure of one does not stop the others."""

import argparse
import contextlib
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from u2moe.runtime.audio.raw import ENCODINGS, RawAudio
from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.cli.inputs import Input, add_channel, find_inputs
from u2moe.runtime.cli.options import add_decoding, model_choice
from u2moe.runtime.cli.outputs import EVENTS, TEXT, Output, add_output, make_output
from u2moe.runtime.cli.terminal import ProgressBar, complain, show_progress
from u2moe.runtime.decoding.vad import VoiceActivityDetector
from u2moe.runtime.errors import AudioError, U2moeError
from u2moe.runtime.recognition import LiveRecognition, transcript_of
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Result, Transcript
from u2moe.runtime.text.formats import FORMATS

_STREAM_BUFFER_S = 0.1
Work = Callable[[Recognizer, Input, Output, Callable[[float], None]], tuple[Transcript, bool]]
"""Function that processes a recording. It calls its last argument with the seconds done so far."""


def add_transcribe(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe transcribe [FILES...]`."""
    parser.description = (
        "Recognise audio files (WAV, FLAC, MP3, Ogg and more, any sample rate and number of channels). By "
        "default, uses the demo model and its clips. The text of a single file is printed segment by segment as it "
        "is recognised."
    )
    about = "audio files, media files, folders, pipes; -: standard input"
    parser.add_argument("files", nargs="*", type=named_path, metavar="FILE", help=about)
    parser.add_argument("--stream", action="store_true", help="recognise chunk by chunk and show partial results")
    events = (
        "a JSON object for each segment when it is found, each partial result (--stream), and the end of each recording"
    )
    add_output(parser, (*FORMATS, EVENTS), TEXT, f"; events, for programs: {events}")
    experts = add_decoding(parser, chunk_size="full context; with --stream: as in training, or 16")
    add_channel(experts)
    about = "read raw samples (without a header) as they arrive, in this format, such as s16le:16000; encodings: "
    about += ", ".join(ENCODINGS)
    experts.add_argument("--raw", type=_raw_format, metavar="ENCODING:HZ[:CHANNELS]", help=about)
    about = (
        "recognise only where silero VAD finds speech; MODEL: an ONNX file, or silero for the installed package "
        "(pip install --no-deps silero-vad)"
    )
    experts.add_argument("--vad", metavar="MODEL", help=about)
    parser.set_defaults(run=run_transcribe)


def named_path(text: str) -> Path:
    """Return a path. Refuse URLs and empty names."""
    if not text:  # it would mean the current folder, but may come from an unset variable
        raise argparse.ArgumentTypeError("a file name is empty")
    if re.match(r"[a-z]+://", text):
        raise argparse.ArgumentTypeError(f"{text}: is a URL, not a path: download it, or pipe it into 'transcribe -'")
    return Path(text)


def _raw_format(text: str) -> Callable[..., RawAudio]:
    found = re.fullmatch(rf"({'|'.join(ENCODINGS)}):(\d+(?:\.\d+)?)(?::(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be ENCODING:HZ[:CHANNELS], such as s16le:16000, got {text!r}")
    return partial(RawAudio, encoding=found[1], sample_rate=float(found[2]), num_channels=int(found[3] or 1))


def run_transcribe(args: argparse.Namespace) -> int:
    """Recognise every recording. Raise ValueError if options contradict each other or would have no effect."""
    if args.format == EVENTS and args.output:
        raise ValueError(f"-f {EVENTS} is for stdout: leave out --output")
    if args.vad and args.stream:
        raise ValueError("--vad needs whole recordings: leave out --stream")
    if args.num_left_chunks is not None and args.chunk_size is None and not args.stream:
        raise ValueError("--num-left-chunks needs --chunk-size or --stream: full context has no chunks")
    vad = VoiceActivityDetector(None if args.vad == "silero" else Path(args.vad)) if args.vad else None
    return run_each(args, TEXT, lambda *recording: _transcript(args, vad, *recording))


def run_each(args: argparse.Namespace, default: str, transcribe: Work) -> int:
    """Make and write the transcript of every recording. If one fails, report it and continue with the next.

    Args:
        args: parsed options, as `find_inputs`, `make_output` and `model_choice` need them.
        default: the default format.
        transcribe: function that passes segments to the output. It returns the transcript, and whether Ctrl-C
            interrupted the work.
    """
    inputs, num_failed = find_inputs(args)
    num_asked = len(inputs) + num_failed
    output = make_output(args.output, args.format, inputs, default)
    inputs = output.missing(inputs)
    bar, recognizer = ProgressBar([item.file for item in inputs]), model_choice(args).load()
    for number, item in enumerate(inputs):
        bar.begin(number)
        try:
            transcript, is_interrupted = transcribe(recognizer, item, output, bar.show)
            show_progress("")
            output.transcript(item, transcript)
        except (U2moeError, UnicodeError) as error:
            complain(str(error))
            output.failure(item, str(error))
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


def _transcript(
    args: argparse.Namespace, vad: VoiceActivityDetector | None, recognizer: Recognizer, item: Input, output: Output,
    on_progress: Callable[[float], None],
) -> tuple[Transcript, bool]:  # fmt: skip
    """Return the transcript, and whether Ctrl-C cut it short. If so, the transcript contains the text so far.

    Raise AudioError if none of the audio can be read.
    """
    segments: list[Result] = []
    seconds, error, is_interrupted = 0.0, None, False

    def progressed(done: float) -> None:
        nonlocal seconds
        seconds = done
        on_progress(done)

    def keep(results: Iterable[Result]) -> None:
        for result in results:
            if result.is_final:
                segments.append(result)
            output.take(item, result)

    def follow() -> None:
        nonlocal seconds
        options = replace(recognizer.options, endpoint=recognizer.default_endpoint)
        live = LiveRecognition(recognizer.decode_streams, recognizer.create_stream(options))
        rate = recognizer.bundle.manifest.features.sample_rate
        try:
            for buffer in read_blocks(item.audio, rate, _STREAM_BUFFER_S, channel=item.channel, track=item.track):
                keep(live.accept(rate, buffer))
                seconds = live.stream.duration
                if not live.shown:
                    on_progress(seconds)
        except (AudioError, KeyboardInterrupt):
            with contextlib.suppress(U2moeError):  # the text so far must not be lost
                keep(live.finish())
            raise
        keep(live.finish())

    try:
        if args.stream:
            follow()
        else:
            keep(
                recognizer.segments(item.audio, vad=vad, on_progress=progressed, channel=item.channel, track=item.track)
            )
    except KeyboardInterrupt:
        error, is_interrupted = AudioError(f"{item.name}: interrupted; the text so far is kept"), True
    except AudioError as damage:
        if seconds == 0:
            raise
        error = damage
    if seconds == 0 and not is_interrupted:
        raise AudioError(f"{item.name}: contains no samples")
    return transcript_of(segments, seconds, error), is_interrupted
