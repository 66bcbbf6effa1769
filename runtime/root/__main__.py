"""The program `u2moe`, also run by `python -m u2moe`. Its help does not need onnxruntime."""

import os
import sys

from u2moe.commands import help_text


def main() -> int:
    """Run the command line; see `u2moe.runtime.cli`."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        try:
            print(help_text(), flush=True)
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe; avoid an error of Python at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    from u2moe.runtime.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
