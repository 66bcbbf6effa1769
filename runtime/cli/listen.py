"""`u2moe listen`: recognise speech from a microphone."""

import argparse
import contextlib
import time
from functools import partial

from u2moe.runtime.audio.microphone import Microphone, input_devices
from u2moe.runtime.cli.inputs import STDIN, Input
from u2moe.runtime.cli.options import add_decoding, model_choice
from u2moe.runtime.cli.outputs import EVENTS, TEXT, make_output
from u2moe.runtime.cli.terminal import complain, print_result, show_progress, tell
from u2moe.runtime.errors import AudioOverflowError
from u2moe.runtime.installation import install_command
from u2moe.runtime.text.formats import FORMATS
from u2moe.runtime.transcriber import Transcriber


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

    source = Input(name="microphone", file=STDIN, place=STDIN, audio=STDIN, channel=None, track=None)
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
