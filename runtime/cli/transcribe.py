"""`u2moe transcribe`, `u2moe align` and `u2moe listen`: recognise or align recordings one by one, or a microphone."""

import argparse
import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from u2moe.runtime.audio.microphone import Microphone, input_devices
from u2moe.runtime.audio.raw import ENCODINGS, RawAudio
from u2moe.runtime.audio.reading import read_blocks
from u2moe.runtime.cli.inputs import STDIN, Input, add_channel, find_inputs
from u2moe.runtime.cli.options import add_declared, add_decoding, add_model, add_session, model_choice
from u2moe.runtime.cli.outputs import EVENTS, TEXT, Output, add_output, make_output
from u2moe.runtime.cli.terminal import ProgressBar, complain, print_result, show_progress, tell, warn
from u2moe.runtime.decoding.alignment import MIN_SCORE
from u2moe.runtime.decoding.vad import VoiceActivityDetector
from u2moe.runtime.errors import AlignmentError, AudioError, AudioOverflowError, U2moeError
from u2moe.runtime.installation import install_command
from u2moe.runtime.options import NONE, DecodingOptions
from u2moe.runtime.recognition import LiveRecognition, transcript_of
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.result import Alignment, Result, Transcript
from u2moe.runtime.text.formats import FORMATS
from u2moe.runtime.transcriber import Transcriber

WORDS = "ctm"  # the default format of `u2moe align`: one line for each word
_MOST_WARNINGS = 10
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
    path = Path(text)
    return path.absolute() if path == STDIN and text != "-" else path  # ./- is a file


def _raw_format(text: str) -> Callable[..., RawAudio]:
    found = re.fullmatch(rf"({'|'.join(ENCODINGS)}):(\d+(?:\.\d+)?)(?::(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be ENCODING:HZ[:CHANNELS], such as s16le:16000, got {text!r}")
    return partial(RawAudio, encoding=found[1], sample_rate=float(found[2]), num_channels=int(found[3] or 1))


def run_transcribe(args: argparse.Namespace) -> int:
    """Recognise every recording. Raise ValueError if options contradict each other."""
    if args.format == EVENTS and args.output:
        raise ValueError(f"-f {EVENTS} is for stdout: leave out --output")
    if args.vad and args.stream:
        raise ValueError("--vad needs whole recordings: leave out --stream")
    if args.num_left_chunks is not None and args.chunk_size is None and not args.stream:
        raise ValueError("--num-left-chunks needs --chunk-size or --stream: full context has no chunks")
    vad = VoiceActivityDetector(None if args.vad == "silero" else Path(args.vad)) if args.vad else None
    return run_each(args, TEXT, lambda *recording: _transcript(args, vad, *recording))


def run_each(args: argparse.Namespace, default: str, transcribe: Work) -> int:
    """Transcribe and write every recording; report failures. `transcribe` also returns whether Ctrl-C ended it."""
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
    args: argparse.Namespace,
    vad: VoiceActivityDetector | None,
    recognizer: Recognizer,
    item: Input,
    output: Output,
    on_progress: Callable[[float], None],
) -> tuple[Transcript, bool]:
    """Return the transcript so far, and whether Ctrl-C cut it short. Raise AudioError if no audio can be read."""
    segments: list[Result] = []
    seconds, error, is_interrupted = 0.0, None, False
    chosen = {"channel": args.channel, "track": args.track}

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
            for buffer in read_blocks(item.audio, rate, block_s=0.1, **chosen):
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
            keep(recognizer.segments(item.audio, vad=vad, on_progress=progressed, **chosen))
    except KeyboardInterrupt:
        error, is_interrupted = AudioError(f"{item.name}: interrupted; the text so far is kept"), True
    except AudioError as damage:
        if seconds == 0:
            raise
        error = damage
    if seconds == 0 and not is_interrupted:
        raise AudioError(f"{item.name}: contains no samples")
    return transcript_of(segments, seconds, error), is_interrupted


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
            item.audio, text, min_score=args.min_score, on_progress=on_progress, channel=args.channel, track=args.track
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


def add_listen(parser: argparse.ArgumentParser) -> None:
    """Add `u2moe listen`."""
    parser.description = (
        "Recognise speech from a microphone until Ctrl-C: partial results on stderr, final ones on stdout. "
        f"Needs sounddevice: {install_command('microphone')}."
    )
    choices = [name for name, each in FORMATS.items() if each.segment is not None]
    told = f"json: one segment per line; {EVENTS}: also partial results and phrases of a grammar"
    parser.add_argument("-f", "--format", choices=[*choices, EVENTS], default=TEXT, help=told)
    experts = add_decoding(parser, chunk_size="as in training, or 16")
    told = "number of the microphone, or part of its name (default: the system's default); list: show all and exit"
    experts.add_argument("--device", metavar="NAME", help=told)
    parser.set_defaults(run=run_listen)


def run_listen(args: argparse.Namespace) -> int:
    """Recognise speech from a microphone until Ctrl-C. Everything said before Ctrl-C is still recognised."""
    if args.device == "list":
        for number, name in input_devices():
            print_result(f"{number}\t{name}\n")
        return 0
    recognizer = model_choice(args).load()
    recognizer.warm_up()
    device = int(args.device) if args.device and args.device.isdecimal() else args.device

    source = Input(name="microphone", file=STDIN, place=STDIN, audio=STDIN)
    output = make_output(None, args.format, [source])

    def on_error(error: Exception) -> None:
        if not isinstance(error, AudioOverflowError):
            raise error
        complain(str(error))

    take = partial(output.take, source)
    transcriber = Transcriber(recognizer, on_partial=take, on_final=take, on_error=on_error)
    with transcriber, contextlib.closing(Microphone(transcriber, device=device)) as microphone:
        tell("listening; press Ctrl-C to stop")
        output.begin()
        with contextlib.suppress(KeyboardInterrupt):
            microphone.start()
            while microphone.is_active:
                time.sleep(0.1)
    show_progress("")
    return 0
