"""Reads plain or gzipped text files line by line."""

import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, cast

_LONGEST_LINE = 1 << 24  # bytes. This limit prevents reading a whole binary file as one line


def read_lines(
    file: str | Path,
    what: str,
    error: Callable[[str], Exception],
    *,
    opened: AbstractContextManager[IO[bytes]] | None = None,
    errors: str = "strict",
) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line of a UTF-8 file that is not blank, without line end and byte order mark.

    `error` makes the error for a file that cannot be read, and `what` is the kind of file, such as "a list of
    recordings". `opened` is the file, if it is already open. `errors` is that of `bytes.decode`.
    """
    try:
        with opened or open(file, "rb") as stream, contextlib.closing(decompressed(stream)) as content:  # noqa: PTH123
            for number, line in enumerate(iter(lambda: content.readline(_LONGEST_LINE), b""), start=1):
                if len(line) == _LONGEST_LINE:
                    raise error(f"{file}: line {number} is longer than {_LONGEST_LINE} bytes")
                text = line.decode("utf-8", errors).rstrip("\r\n")
                text = text.removeprefix("\ufeff") if number == 1 else text
                if text and not text.isspace():
                    yield number, text
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{file}: cannot be read as {what}: {reason}") from problem


def decompressed(stream: IO[bytes]) -> IO[bytes]:
    """Return a seekable stream of the decompressed content if the stream is gzip, otherwise the stream itself."""
    is_compressed = stream.read(2) == b"\x1f\x8b"  # gzip's magic bytes
    stream.seek(0)
    return cast("IO[bytes]", gzip.GzipFile(fileobj=stream)) if is_compressed else stream
