"""Output of the command line to stdout and stderr. Each may be a terminal, a file or a pipe, or may be closed."""

import contextlib
import io
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from u2moe.runtime.audio.reading import duration_of
from u2moe.runtime.errors import U2moeError

_BAR_WIDTH = 20


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Provide missing stdout and stderr. Bytes in file names are kept. Writing to a closed stdout is an error."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, so no other file can get it
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")
    with contextlib.ExitStack() as stack:
        if sys.stderr is None:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        if sys.stdout is None:
            stack.enter_context(contextlib.redirect_stdout(_Closed()))
        yield


class _Closed(io.TextIOBase):
    def write(self, _text: str) -> int:
        raise U2moeError("stdout is closed: the output cannot be written")


@contextlib.contextmanager
def logging_to_stderr(*, is_verbose: bool) -> Iterator[None]:
    """Log to stderr if `is_verbose`."""
    logger, handler = logging.getLogger("u2moe"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("u2moe: %(message)s"))
    with contextlib.ExitStack() as stack:
        if is_verbose:
            stack.callback(logger.setLevel, logger.level)
            stack.callback(logger.removeHandler, handler)
            logger.addHandler(handler)
            logger.setLevel(logging.DEBUG)
        yield


def print_result(text: str) -> None:
    """Write `text` to stdout at once. Raise BrokenPipeError if the reader has closed the pipe, otherwise U2moeError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except UnicodeEncodeError as error:
        character = error.object[error.start]
        raise U2moeError(
            f"{character!a} cannot be written to stdout in {error.encoding}: "
            "set PYTHONIOENCODING=utf-8, or use --output"
        ) from error
    except OSError as error:  # for example a full disk
        silence_stdout()
        raise U2moeError(f"stdout: cannot be written: {error.strerror or error}") from error


def print_json(line: str) -> None:
    """Write a line of JSON as `print_result` does, with escapes if stdout needs them."""
    print_result(encodable(line, sys.stdout.encoding or "utf-8"))


def encodable(line: str, encoding: str = "utf-8") -> str:
    """Return a line of JSON. If the encoding lacks a character, escape all non-ASCII characters."""
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(json.loads(line)) + "\n"
    return line


def silence_stdout() -> None:
    """Discard buffered and later output. Python would otherwise report an error at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_progress(text: str) -> None:
    """Show `text`, or its end if it is too long, as the current line of a terminal. Without a terminal, do nothing."""
    if sys.stderr.isatty():
        width = max(shutil.get_terminal_size().columns - 1, 1)
        _write_stderr(f"\r\x1b[K{text[-width:]}")


def show_latest(text: str) -> None:
    """Show a text that replaces the previous one. If stderr is not a terminal, write it as a line instead."""
    if sys.stderr.isatty():
        show_progress(text)
    else:
        _write_stderr(f"{text}\n")


def tell(text: str) -> None:
    """Write a line to stderr. Progress does not overwrite it."""
    show_progress("")
    _write_stderr(f"{text}\n")


def complain(message: str) -> None:
    """Write an error to stderr, as a separate line."""
    tell(f"u2moe: error: {message}")


def warn(message: str) -> None:
    """Write a warning to stderr, as a separate line."""
    tell(f"u2moe: warning: {message}")


def _write_stderr(text: str) -> None:
    with contextlib.suppress(OSError):  # a lost message must not affect results
        sys.stderr.write(text)
        sys.stderr.flush()


class ProgressBar:
    """Terminal progress bar for several files: "[2/5] ########............  43 %, 1:10 left, lecture.mp3"."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._durations = [duration_of(file) for file in files] if sys.stderr.isatty() else [0.0] * len(files)
        self._begin = time.monotonic()

    def begin(self, number: int) -> None:
        """Start the bar for the file at index `number`."""
        self._number, self._before = number, sum(self._durations[:number])
        self.show(0.0)

    def show(self, seconds: float) -> None:
        """Draw the bar, with `seconds` of the current file done."""
        done = self._before + min(seconds, self._durations[self._number])
        share = done / max(sum(self._durations), 1e-9)
        drawn = round(share * _BAR_WIDTH)
        text = f"[{self._number + 1}/{len(self._files)}] {'#' * drawn}{'.' * (_BAR_WIDTH - drawn)} {share:4.0%}, "
        if done:
            left = round((time.monotonic() - self._begin) * (1 - share) / share)
            text += f"{left // 60}:{left % 60:02} left, "
        show_progress(text + self._files[self._number].name)
