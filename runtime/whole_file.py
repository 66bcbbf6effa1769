"""Writes local files whole or not at all: beside their place, flushed to the disk, and moved there in one step.

Until then the content is in a hidden file, such as ".0123456789abcdef.part". Processes that are killed leave theirs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PART = re.compile(r"\.[0-9a-f]{16}\.part")
_STALE_S = 3600.0
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
"""Errors of file systems that have no disk to flush to."""


@contextlib.contextmanager
def replacing(file: Path, *, is_lasting: bool = True) -> Iterator[Path]:
    """The file to write instead of `file`, whose place it takes at the end; after an error `file` is as it was.

    Its content is on the disk before it takes the place, so that `file` is whole also after a power failure. A link
    stays, and what it leads to is replaced. What is no plain file, such as a pipe, is written as it is.

    Args:
        file: the file to write; its folder exists.
        is_lasting: whether to wait until the new content would survive a power failure, after which the old one may
            otherwise be back. That takes two thirds of the time, which counts where many small files are written.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with failures_named(file):
        if file.exists() and not file.is_file():  # by its own name: that of a pipe, as of /dev/stdout, is no path
            yield file
            return
        target = Path(os.path.realpath(file))
        with _part(target.parent) as part:
            yield part
            _flush(part)
            part.replace(target)
        if is_lasting:
            _flush_folder(target.parent)


def write_bytes(file: Path, content: bytes, *, is_lasting: bool = True) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(file, is_lasting=is_lasting) as part:
        part.write_bytes(content)


def write_text(file: Path, content: str) -> None:
    """Write text in UTF-8, whole or not at all; see `replacing`."""
    write_bytes(file, content.encode())


def write_first(file: Path, content: bytes) -> bool:
    """Write a file whole, unless it exists; of several processes that try at once one succeeds.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with failures_named(file), _part(file.parent) as part:
        part.write_bytes(content)
        _flush(part)
        try:
            os.link(part, file)  # unlike a rename it never replaces
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if file.exists():
                return False
            part.replace(file)
        _flush_folder(file.parent)
        return True


def probe(folder: Path) -> float:
    """What time it is by the clock of a folder's file system, from a file that is written there and removed.

    Raises:
        OSError: nothing can be written there.
    """
    with _part(folder) as part:
        part.touch(exist_ok=False)
        return part.stat().st_mtime


def remove_stale_parts(folder: Path) -> None:
    """Remove what killed processes left in a folder, but not below it: parts that nobody has changed for an hour."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PART.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime > _STALE_S:
                        Path(entry).unlink()


@contextlib.contextmanager
def failures_named(file: Path) -> Iterator[None]:
    """An OSError inside becomes one that names the file which cannot be written, and has the same number."""
    try:
        yield
    except OSError as error:
        named = OSError(f"{file}: cannot be written: {error.strerror or error}")
        named.errno = error.errno
        raise named from error


@contextlib.contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """The name of a file in a folder that no other process writes to; if it is there at the end, it is removed."""
    part = folder / f".{secrets.token_hex(8)}.part"
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Make a rename in a folder last; where folders cannot be opened (Windows) the system does that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
