"""The command line `u2moe`."""

import argparse
import contextlib
import importlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Sequence
from importlib.metadata import version
from types import FrameType

from u2moe.commands import COMMANDS
from u2moe.runtime.cli import terminal
from u2moe.runtime.cli.options import CommandParser, meant
from u2moe.runtime.errors import U2moeError, handing_warnings_to
from u2moe.runtime.installation import install_command

EXTRAS = {
    "torch": "export", "onnx": "export", "onnx_ir": "tools", "yaml": "export",
    "onnxruntime_extensions": "clip", "av": "media", "cryptography": "sign", "huggingface_hub": "hub",
    "h11": "server", "prometheus_client": "server", "python_multipart": "server", "starlette": "server",
    "uvicorn": "server", "websockets": "server",
    "pyarrow": "parquet", "ray": "ray", "wetext": "written",
}  # fmt: skip
"""Packages that only some commands need, and the extra that installs each package."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0 for success, 1 for a failure, 2 for wrong usage."""
    with terminal.standard_streams(), handing_warnings_to(terminal.warn):  # AudioWarning, BundleWarning
        return _run(sys.argv[1:] if argv is None else list(argv))


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """Treat SIGTERM like Ctrl-C, to keep the results so far. Yield a list that receives the signal number."""
    received: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, interrupt)
            stack.callback(signal.signal, signal.SIGTERM, before or signal.SIG_DFL)
        yield received


def _run(arguments: list[str]) -> int:
    received: list[int] = []
    failed = 1  # 2 for u2moe bench, where 1 means that a limit is exceeded
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    try:
        args = _parsed(command, arguments)
        failed = getattr(args, "failed", failed)
        with terminal.logging_to_stderr(is_verbose=args.verbose), _sigterm_as_interrupt() as received:
            code: int = args.run(args)
    except KeyboardInterrupt:
        terminal.show_progress("")
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has ended
        terminal.silence_stdout()
        return failed
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        remedy = f": {install_command(extra)}" if extra else ", which is not installed"
        terminal.complain(f"'u2moe {command}' needs the Python package {error.name}{remedy}")
        return failed
    except (U2moeError, ValueError, OSError) as error:  # OSError: for example a full disk
        terminal.complain(str(error))
        return failed
    except Exception:
        if failed == 1:  # Python prints the traceback and exits with status 1
            raise
        traceback.print_exc()
        return failed
    return 128 + received[0] if received else code


def _parsed(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. Wrong arguments end the program with exit status 2 and a suggestion."""
    found = parser([command])
    if command and command not in COMMANDS:
        found.error(f"unknown command {command!r}{meant(command, COMMANDS)}")
    args, unknown = found.parse_known_args(arguments)
    if unknown:
        options = re.findall(r"(?<!\w)--[a-z][a-z-]*", args.parser.format_help())
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant(unknown[0].partition('=')[0], options)}")
    return args


def parser(commands: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser of the command line, with the options of `commands`. Other commands have only their summaries.

    For shell completion, shtab uses the parser with all commands: `shtab --shell=bash u2moe.runtime.cli.parser`.
    """
    found = argparse.ArgumentParser(prog="u2moe", description="Recognise speech with U2++ models on onnxruntime.")
    found.add_argument("--version", action="version", version=f"u2moe {version('u2moe')}")
    found.add_argument("--verbose", action="store_true", help="log to stderr what is loaded and recognised")
    subparsers = found.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, (module, function, summary) in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, add_help=name in commands)
        if name in commands:
            command.set_defaults(parser=command)
            getattr(importlib.import_module(module), function)(command)
    return found
