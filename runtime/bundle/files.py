"""Files of one folder, opened only once and held open, so that what is verified is what is read. Knows no formats."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from u2moe.runtime.errors import BundleError, IntegrityError

BLOCK = 16 << 20
"""Bytes of a larger file that have a digest of their own, so that all cores of the processor compare it at once."""
_PORTION = 1 << 20
"""Bytes read at a time."""
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
"""Names that mean devices on Windows, with any suffix."""
_SEEKING = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size and sha256 of one file of a bundle, and if it is larger than `BLOCK`, the sha256 of each of its blocks.

    Raises:
        ValueError: the number of blocks is another one.
    """

    sha256: str
    size: int
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = _num_blocks(self.size)
        if len(self.blocks) not in (0, expected):
            raise ValueError(f"blocks: found {len(self.blocks)} digests, expected {expected} for {self.size} bytes")


class BundleFile:
    """A regular file directly in `folder`, open for reading until `close` or the end of this object.

    Any thread may read it.

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
        self.close = weakref.finalize(self, os.close, self._descriptor)
        self._status = os.fstat(self._descriptor)
        self._check(folder)

    def _check(self, folder: Path) -> None:
        if not stat.S_ISREG(self._status.st_mode):
            raise BundleError(f"{self.path}: is not a regular file")
        try:
            target = self.path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise _replaced(self.path) from error
        if target.parent != folder.resolve():
            raise BundleError(f"{self.path}: is a link to {target}, expected a file inside the bundle")
        if self._digest is not None and self.size != self._digest.size:
            raise IntegrityError(f"{self.path}: size is {self.size} bytes, expected {self._digest.size}")

    @property
    def size(self) -> int:
        """Size in bytes when it was opened."""
        return self._status.st_size

    def read(self, limit: int) -> bytes:
        """The whole content, compared with its digest unless that has been done before.

        Raises:
            BundleError: more than `limit` bytes, or a read error.
            IntegrityError: it differs from its digest.
        """
        if self.size > limit:
            raise BundleError(f"{self.path}: is larger than {limit} bytes")
        content = b"".join(self._portions(0, self.size))
        self._compare(hashlib.sha256(content).hexdigest() if self._digest else "")
        return content

    def read_into(self, target: memoryview, begin: int) -> None:
        """Fill `target` with the bytes from `begin` on; errors as in `read`."""
        position = 0
        for portion in self._portions(begin, begin + len(target)):
            target[position : position + len(portion)] = portion
            position += len(portion)

    def verify(self) -> None:
        """Compare the content with its digest unless that has been done before; errors as in `read`."""
        if self._digest is None:
            return
        if not self._digest.blocks:
            self._compare(self._sha256(0, self.size))
            return
        for index, (found, expected) in enumerate(zip(self._blocks(), self._digest.blocks, strict=True)):
            self._compare_digests(f"sha256 of block {index}", found, expected)
        self._digest = None

    def digest(self) -> FileDigest:
        """Digest of the content."""
        blocks = self._blocks() if _num_blocks(self.size) > 1 else ()
        return FileDigest(sha256=self._sha256(0, self.size), size=self.size, blocks=tuple(blocks))

    def _blocks(self) -> Iterator[str]:
        """The sha256 of each block."""
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - brings logging, for large bundles alone

        with ThreadPoolExecutor() as threads:
            starts = range(0, self.size, BLOCK)
            yield from threads.map(lambda begin: self._sha256(begin, min(self.size, begin + BLOCK)), starts)

    def _sha256(self, begin: int, end: int) -> str:
        computed = hashlib.sha256()
        for portion in self._portions(begin, end):
            computed.update(portion)
        return computed.hexdigest()

    def check_unchanged(self, *, by_path: bool = True) -> None:
        """Check that the file was not modified since it was opened, nor replaced: others may have read it by its path.

        Args:
            by_path: whether it matters that the path leads to another file now.

        Raises:
            IntegrityError: it was replaced or modified.
        """
        found = [os.fstat(self._descriptor)]
        try:
            if by_path:
                found.append(os.stat(self.path))  # noqa: PTH116 - beside fstat
        except OSError as error:
            raise _replaced(self.path) from error
        if any(_state(status) != _state(self._status) for status in found):
            raise _replaced(self.path)

    def _compare(self, sha256: str) -> None:
        if self._digest is not None:
            self._compare_digests("sha256", sha256, self._digest.sha256)
        self._digest = None

    def _compare_digests(self, name: str, found: str, expected: str) -> None:
        if found != expected:
            self.check_unchanged(by_path=False)  # if it was modified, that is the reason
            raise IntegrityError(f"{self.path}: {name} is {found}, expected {expected}")

    def _portions(self, begin: int, end: int) -> Iterator[bytes]:
        while begin < end:
            try:
                portion = self._read_at(begin, min(_PORTION, end - begin))
            except OSError as error:
                raise BundleError(f"{self.path}: cannot be read: {error.strerror}") from error
            if not portion:
                raise _replaced(self.path)
            yield portion
            begin += len(portion)

    def _read_at(self, begin: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._descriptor, size, begin)
        with _SEEKING:  # Windows
            os.lseek(self._descriptor, begin, os.SEEK_SET)
            return os.read(self._descriptor, size)


class BundleFiles:
    """The files of a folder by name, each opened when it is first asked for and then held open.

    Args:
        folder: the folder.
        digests: size and sha256 of each file, by name; None: unknown, any file may be opened.
    """

    def __init__(self, folder: Path, digests: Mapping[str, FileDigest] | None = None) -> None:
        self.folder = folder
        self._digests = digests
        self._files: dict[str, BundleFile] = {}

    def __getitem__(self, name: str) -> BundleFile:
        """The file of this name; errors as for `BundleFile`, and BundleError for a file that has no digest."""
        if name not in self._files:
            if self._digests is not None and name not in self._digests:
                raise BundleError(f"{self.folder}: the manifest does not list {name!r:.200}")
            digest = None if self._digests is None else self._digests[name]
            self._files[name] = BundleFile(self.folder, name, digest)
        return self._files[name]

    def release(self) -> None:
        """Close all files; each is opened again when it is next asked for."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def plain_name(name: str, where: str) -> str:
    """`name`, if it can only mean a file directly inside a folder, on any system.

    Raises:
        BundleError: it may mean another file; begins with `where`.
    """
    plain = not any(char in '/\\:*?"<>|' or ord(char) < 32 for char in name) and not _DEVICE.match(name)
    if not plain or not name or name[-1] in ". ":  # which Windows leaves out
        raise BundleError(f"{where}: found {name!r:.200}, expected a plain file name without folders")
    return name


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def _replaced(file: Path) -> IntegrityError:
    return IntegrityError(f"{file}: was replaced while it was being read: load again")


def _state(status: os.stat_result) -> tuple[int, ...]:
    """File attributes that change when a file is replaced or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
