"""The command line of studies: options and errors. Also runs `u2moe` in separate processes, to measure memory."""

import argparse
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from u2moe.benchmarks.results.files import results_file
from u2moe.runtime import U2moeError

Main = TypeVar("Main", bound=Callable[[], int | None])
_PROGRAM = """import sys, u2moe.runtime.cli as cli, u2moe.benchmarks.instruments.host as host
code = cli.main(sys.argv[1:]); print(host.status_bytes("VmHWM")); sys.exit(code)"""


def peak_memory(*arguments: str | Path) -> int:
    """Run `u2moe` in a process of its own. Return the process's peak resident memory in bytes."""
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)  # noqa: S603 - our own program
    return int(done.stdout.split()[-1])


def study_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a study, with the option --results. The first line of `doc` describes the study."""
    prog, file = f"python -m u2moe.benchmarks.studies.{name}", results_file(name)
    parser = argparse.ArgumentParser(prog=prog, description=(doc or "").split("\n")[0])
    about = f"file for the results (default: {file})"
    parser.add_argument("--results", type=Path, default=file, metavar="JSON", help=about)
    return parser


def recognition_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a study that runs one bundle on recordings."""
    parser = study_parser(name, doc)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("lists", type=Path, nargs="+", help="lists of recordings: path<TAB>transcript")
    return parser


def named(text: str) -> tuple[str, str]:
    """Parse an argument NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def script(main: Main) -> Main:
    """Decorate the last function: call it if the module is a program, and exit; after an error, print it in a line."""
    if main.__module__ == "__main__":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends servers and attackers, too
        try:
            sys.exit(main())
        except (U2moeError, OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
            sys.exit(f"error: {' '.join(str(error).split())}")
    return main
