"""Files of one folder, opened only once, so that what is verified is what is read. Independent of file formats."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from u2moe.runtime.errors import BundleError, IntegrityError

if TYPE_CHECKING:
    from types import TracebackType

    from u2moe.runtime.bundle.manifest import FileDigest

_PORTION = 1 << 20
"""Bytes read at a time."""
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
"""Names that mean devices on Windows, with any suffix."""


class BundleFile:
    """A regular file directly in `folder`, open for reading; close it, or use it in a `with` block.

    Raises:
        BundleError: not a plain name, missing, unreadable, not a regular file, or a link to a file elsewhere.
        IntegrityError: the size differs from `digest`.
    """

    def __init__(self, folder: Path, name: str, digest: FileDigest | None = None) -> None:
        self.path = folder / plain_name(name, str(folder))
        self._digest = digest
        # Opening a named pipe would block until it has a writer; for regular files the flag has no effect.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            self._descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            raise BundleError(f"{self.path}: missing") from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.path}: cannot be read: {getattr(error, 'strerror', error)}") from error
        try:
            self._status = os.fstat(self._descriptor)
            self._check(folder)
        except BaseException:
            self.close()
            raise

    def _check(self, folder: Path) -> None:
        if not stat.S_ISREG(self._status.st_mode):
            raise BundleError(f"{self.path}: is not a regular file")
        try:
            target = self.path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise BundleError(f"{self.path}: was replaced while it was opened") from error
        if target.parent != folder.resolve():
            raise BundleError(f"{self.path}: is a link to {target}, expected a file inside the bundle")
        if self._digest is not None and self.size != self._digest.size:
            raise IntegrityError(f"{self.path}: size is {self.size} bytes, expected {self._digest.size}")

    @property
    def size(self) -> int:
        """Size in bytes when it was opened."""
        return self._status.st_size

    def read(self, limit: int) -> bytes:
        """The whole content, compared with its digest, if there is one.

        Raises:
            BundleError: more than `limit` bytes, or a read error.
            IntegrityError: it differs from its digest.
        """
        if self.size > limit:
            raise BundleError(f"{self.path}: is larger than {limit} bytes")
        return b"".join(self.portions())

    def verify(self) -> None:
        """Read the whole file only to compare it with its digest; see `read`."""
        for _ in self.portions():
            pass

    def sha256(self) -> str:
        """Digest of the whole file."""
        computed = hashlib.sha256()
        for portion in self.portions():
            computed.update(portion)
        return computed.hexdigest()

    def portions(self) -> Iterator[bytes]:
        """The content in portions of about a megabyte; after the last one it is compared with its digest."""
        computed, left = hashlib.sha256(), self.size
        with self._reading():
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        while left > 0:
            with self._reading():
                portion = os.read(self._descriptor, min(_PORTION, left))
            if not portion:
                raise IntegrityError(f"{self.path}: was shortened while it was read")
            computed.update(portion)
            left -= len(portion)
            yield portion
        if self._digest is not None and computed.hexdigest() != self._digest.sha256:
            raise IntegrityError(f"{self.path}: sha256 is {computed.hexdigest()}, expected {self._digest.sha256}")

    def read_into(self, target: memoryview, begin: int) -> None:
        """Fill `target` with the bytes from `begin` on, which are compared with nothing.

        Raises:
            BundleError: a read error.
            IntegrityError: the file ends before.
        """
        with self._reading():
            os.lseek(self._descriptor, begin, os.SEEK_SET)
        while target:
            with self._reading():
                portion = os.read(self._descriptor, min(_PORTION, len(target)))
            if not portion:
                raise IntegrityError(f"{self.path}: was shortened while it was read")
            target[: len(portion)] = portion
            target = target[len(portion) :]

    def check_unchanged(self) -> None:
        """Check that the file was not replaced or modified since it was opened: others may have read it by its path.

        Raises:
            IntegrityError: it was replaced or modified.
        """
        try:
            by_path = os.stat(self.path)  # noqa: PTH116 - beside fstat
        except OSError as error:
            raise IntegrityError(f"{self.path}: was removed while it was loaded") from error
        if not _state(self._status) == _state(os.fstat(self._descriptor)) == _state(by_path):
            raise IntegrityError(f"{self.path}: was changed while it was loaded")

    def close(self) -> None:
        """Give the descriptor back. Once."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BundleError(f"{self.path}: cannot be read: {error.strerror}") from error


def plain_name(name: str, where: str) -> str:
    """`name`, if it can only mean a file directly inside a folder, on any system.

    Raises:
        BundleError: it may mean another file; begins with `where`.
    """
    plain = not any(char in '/\\:*?"<>|' or ord(char) < 32 for char in name) and not _DEVICE.match(name)
    if not plain or not name or name[-1] in ". ":  # which Windows leaves out
        raise BundleError(f"{where}: found {name!r:.200}, expected a plain file name without folders")
    return name


def _state(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
