"""Writes local files and folders whole or not at all: beside their place, flushed, and moved there by a rename.

Until then the content is hidden: of a file in one such as ".0123456789abcdef.part", of a folder NAME in one such as
".NAME.01234567.partial". Processes that are killed leave theirs; later ones remove it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PART = re.compile(r"\.[0-9a-f]{16}\.part")
_PARTIAL, _REPLACED = ".partial", ".replaced"
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
    """Current time of a folder's file system, from a temporary file.

    Raises:
        OSError: nothing can be written there.
    """
    with failures_named(folder), _part(folder) as part:
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
def new_folder(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A new hidden folder, for `put_in_place`; removed at the end if it is still there.

    Removes first what killed processes left of `target`, and puts back the old one that they had just taken away.

    Args:
        target: the folder that is to be written; folders above it are created, and removed if they stay empty.
        check: raises an error if `target` must not be written; called while no other process replaces it.

    Raises:
        OSError: it cannot be written, for example because it is a mount point (`errno.EBUSY`).
    """
    folder = target.parent / f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}"
    made = [parent for parent in target.parents if not parent.exists()]
    lock = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent):
            _clear_up(target)
            check()
            folder.mkdir()
            lock = _lock(folder, wait=False)
            _try_to_replace(target, folder)
        yield folder
    finally:
        _remove(folder)
        if lock is not None:
            os.close(lock)
        for parent in made:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def put_in_place(folder: Path, target: Path, check: Callable[[], None]) -> None:
    """Flush a `new_folder`, and rename it to `target`; one that is there is first renamed, and at the end removed.

    In between, for the time of one rename, there is no `target`. Processes that have its files open go on with them.
    `check` is that of `new_folder`.

    Raises:
        OSError: it cannot be renamed; the old one is then in place.
    """
    for file in folder.iterdir():
        _flush(file)
    with _locked(target.parent):
        check()
        replaced = folder.with_suffix(_REPLACED)
        with contextlib.suppress(FileNotFoundError):
            target.rename(replaced)
        try:
            folder.rename(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                replaced.rename(target)
            raise
        _flush_folder(target.parent)
    _remove(replaced)


def kept_in_place(target: Path) -> contextlib.AbstractContextManager[None]:
    """Within the block no other process replaces a folder; one that is replacing it just now is waited for."""
    return _locked(target.parent)


def _clear_up(target: Path) -> None:
    """Remove, or put back, what killed processes left of a folder; the lock of its parent is held."""
    for path in target.parent.iterdir():
        if not path.name.startswith(f".{target.name}."):
            continue
        if path.suffix == _REPLACED and not target.exists():
            path.rename(target)
        elif path.suffix == _REPLACED:
            _remove(path)
        elif path.suffix == _PARTIAL and (lock := _lock(path, wait=False)) is not None:  # else its process is alive
            _remove(path)
            os.close(lock)


def _try_to_replace(target: Path, folder: Path) -> None:
    """Fail now if `target` cannot be renamed: try it in a way that cannot succeed, onto a folder that is not empty."""
    if not target.exists() or target.is_symlink():
        return
    occupied = folder / "occupied"
    occupied.touch()
    try:
        target.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    occupied.unlink()


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """A descriptor that locks a folder until it is closed; None: others hold it, or the system has no such locks."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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
