"""Write files atomically: write a temporary file, and rename it.

The temporary file is hidden and next to the target, for example ".0123456789abcdef.part". If a process is killed, its
temporary file remains until a later process removes it.
"""

import contextlib
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_PART = re.compile(r"\.[0-9a-f]{16}\.part")


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary file. After the block, it replaces `file`. After an error, `file` is unchanged.

    The content is flushed to disk before the rename. After a power failure, the old content may reappear. If `file` is
    a symbolic link, its target is replaced. Pipes and other special files are written directly. Raises the OSErrors of
    `failures_named`.
    """
    with failures_named(file):
        if file.exists() and not file.is_file():  # no realpath here: /dev/stdout may link to a pipe without a path
            yield file
            return
        target = Path(os.path.realpath(file))
        with _part(target.parent) as part:
            yield part
            flush(part)
            part.replace(target)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file atomically; see `replacing`."""
    with replacing(file) as part:
        part.write_bytes(content)


def write_text(file: Path, content: str) -> None:
    """Write a UTF-8 text file atomically; see `replacing`."""
    write_bytes(file, content.encode())


def write_first(file: Path, content: bytes) -> bool:
    """Write a file, atomically, unless it exists. Returns whether this process did. Errors are as in `replacing`."""
    with failures_named(file), _part(file.parent) as part:
        part.write_bytes(content)
        flush(part)
        try:
            os.link(part, file)  # unlike a rename, a hard link never replaces a file
        except OSError:
            if file.exists():
                return False
            part.replace(file)  # the file system does not support links
        return True


def flush(file: Path) -> None:
    """Wait until the content of a file is on disk."""
    with file.open("rb+") as stream:  # Windows can flush only a file that is open for writing
        os.fsync(stream.fileno())


def probe(folder: Path) -> float:
    """Return the current time of a folder's file system, from a temporary file. Errors are as in `failures_named`."""
    with failures_named(folder), _part(folder) as part:
        part.touch(exist_ok=False)
        return part.stat().st_mtime


def remove_stale_parts(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder, not below it, more than an hour ago."""
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            if _PART.fullmatch(file.name) and time.time() - file.stat().st_mtime > 3600:
                file.unlink()


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock on a file during the block, then remove the file. A killed process loses its lock.

    On file systems without locks, nothing is locked. On Windows, the file is not touched at all. Raises BlockingIOError
    if another process holds the lock.
    """
    if sys.platform == "win32":
        yield
        return
    with file.open("ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # perhaps the file system does not support locks
            if isinstance(error, BlockingIOError):
                raise
        if not file.exists() or not os.path.samestat(file.stat(), os.fstat(held.fileno())):
            raise BlockingIOError  # the previous holder has just removed the file
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def failures_named(file: Path) -> Iterator[None]:
    """Turn an OSError raised in the block into an OSError with the same errno and a message that names the file."""
    try:
        yield
    except OSError as error:
        named = OSError(f"{file}: cannot be written: {error.strerror or error}")
        named.errno = error.errno
        raise named from error


@contextlib.contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """Yield a unique path for a temporary file in a folder. After the block, the file is removed if it still exists."""
    part = folder / f".{secrets.token_hex(8)}.part"
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
