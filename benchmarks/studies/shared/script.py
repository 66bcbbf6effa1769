"""The command line of studies: options and errors."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from u2moe.benchmarks.results.files import results_file
from u2moe.runtime import U2moeError


def study_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a study, with the option --results. The first line of `doc` describes the study."""
    prog, file = f"python -m u2moe.benchmarks.studies.{name}", results_file(name)
    parser = argparse.ArgumentParser(prog=prog, description=(doc or "").split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=file, metavar="JSON", help=f"file for the results (default: {file})"
    )
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


def run_script(main: Callable[[], int | None]) -> None:
    """Call `main`, and exit with the code that it returns. After an error, print one line to stderr and exit with 1."""
    try:
        sys.exit(main())
    except (U2moeError, OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
