"""The command line of studies: arguments, progress and errors."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from u2moe.runtime import U2moeError


def script_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m u2moe.benchmarks.NAME`, described by the first line of the module's docstring."""
    return argparse.ArgumentParser(prog=f"python -m u2moe.benchmarks.{name}", description=(doc or "").split("\n")[0])


def named(text: str) -> tuple[str, str]:
    """The type of arguments NAME=VALUE."""
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def run_script(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with the code that it returns; what stops it is one line on stderr, with exit code 1."""
    try:
        sys.exit(main())
    except (U2moeError, OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def report(line: str) -> None:
    """Show a line of progress."""
    print(f"- {line}", file=sys.stderr, flush=True)
