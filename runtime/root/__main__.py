"""The program `u2moe`, also run by `python -m u2moe`. Its help does not need onnxruntime."""

import os
import signal
import sys

from u2moe.commands import help_text


def main() -> int:
    """Run the command line; see `u2moe.runtime.cli`."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        try:
            print(help_text(), flush=True)
        except OSError:  # the reader, such as `head`, has closed the pipe, or the disk is full; avoid an error at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else the caller ignores or handles it
    if is_usual:  # Ctrl-C ends the program at once: numpy turns a KeyboardInterrupt in its import into an ImportError
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from u2moe.runtime.cli import main as run

    if is_usual:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
