"""Writes files whole or not at all: beside their place, and moved there by a rename.

Until then their content is in a hidden file such as ".0123456789abcdef.part". Processes that are killed leave theirs;
later ones remove it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Iterator

_PART = re.compile(r"\.[0-9a-f]{16}\.part")
_STALE_S = 3600.0


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The file to write instead of `file`, whose place it takes at the end; after an error `file` is as it was.

    Its content is on the disk before it takes the place; after a power failure the old one may be back. A link stays,
    and what it leads to is replaced. What is no plain file, such as a pipe, is written as it is.

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
            flush(part)
            part.replace(target)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file whole or not at all; see `replacing`."""
    with replacing(file) as part:
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
        flush(part)
        try:
            os.link(part, file)  # unlike a rename it never replaces
        except OSError:
            if file.exists():
                return False
            part.replace(file)  # a file system without links
        return True


def flush(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with file.open("rb+") as stream:  # Windows flushes only what may be written
        os.fsync(stream.fileno())


def probe(folder: Path) -> float:
    """Current time of a folder's file system, from a temporary file.

    Raises:
        OSError: nothing can be written there.
    """
    with failures_named(folder), _part(folder) as part:
        part.touch(exist_ok=False)
        return part.stat().st_mtime


def remove_stale_parts(folder: Path) -> None:
    """Remove what killed processes left in a folder, but not below it: parts that nobody has changed for an hour."""
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            if _PART.fullmatch(file.name) and time.time() - file.stat().st_mtime > _STALE_S:
                file.unlink()


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock, in a file that is removed at the end; the system releases that of a process that is killed.

    On Windows, and on file systems without locks, it keeps nobody out.

    Raises:
        BlockingIOError: another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    with file.open("ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # no locks
            pass
        if not file.exists() or not os.path.samestat(file.stat(), os.fstat(held.fileno())):
            raise BlockingIOError  # whoever held it has just removed the file
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


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
