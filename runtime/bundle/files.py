"""Reads files of a folder, compares them with their digests, and rejects files that change afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from u2moe.runtime.errors import BundleError, IntegrityError

BLOCK = 16 << 20  # Bytes. Larger files have a digest per block, so that all cores can verify them in parallel
_PIECE = 1 << 20  # Bytes of a block to read into memory at a time
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # Names of Windows devices, with any suffix


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """Size and SHA-256 of a bundle file. If it has more than `BLOCK` bytes, also the SHA-256 of each block."""

    sha256: str
    size: int
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = -(-self.size // BLOCK)  # rounded up
        if len(self.blocks) not in (0, expected):
            raise ValueError(f"blocks must be {expected} digests for {self.size} bytes, got {len(self.blocks)}")

    @classmethod
    def of(cls, file: Path) -> FileDigest:
        """Compute the digest of a file."""
        size = file.stat().st_size
        with file.open("rb") as stream:
            whole = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(sha256=whole, size=size, blocks=tuple(_digests_of_blocks(file, size)) if size > BLOCK else ())


class BundleFiles:
    """Files of a folder. Each is compared with its digest once, and must not change afterwards."""

    def __init__(self, folder: Path, digests: Mapping[str, FileDigest] | None = None) -> None:
        """Take the digest of each file by name. Without digests, any file may be read."""
        self.folder = folder
        self._digests = digests
        self._states: dict[str, tuple[int, ...]] = {}
        self._compared: set[str] = set()

    def look_at(self, name: str) -> int:
        """Check that a file exists, has the listed size and has not changed. Returns its size.

        Raises BundleError if the file is missing, unreadable, not listed or not a regular file of this folder, or if
        its name is not plain. Raises IntegrityError if its size is another, or if it was replaced or modified.
        """
        path, digest = self.folder / plain_name(name, str(self.folder)), self._digest(name)
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would block until it has a writer
                raise BundleError(f"{path}: is not a regular file")
            target = path.resolve()
            if target.parent != self.folder.resolve():
                raise BundleError(f"{path}: is a link to {target}, expected a file inside the bundle")
        except (OSError, ValueError) as error:
            if name in self._states:
                raise _replaced(path) from error
            if isinstance(error, FileNotFoundError):
                raise BundleError(f"{path}: missing") from None
            raise _unreadable(path, error) from error
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._states.setdefault(name, state) != state:
            raise _replaced(path)
        if digest is not None and status.st_size != digest.size:
            raise IntegrityError(f"{path}: size is {status.st_size} bytes, expected {digest.size}")
        return status.st_size

    def read(self, name: str, limit: int) -> bytes:
        """Read a file of up to `limit` bytes (else BundleError), and check its digest. Errors are as in `look_at`."""
        if self.look_at(name) > limit:
            raise BundleError(f"{self.folder / name}: is larger than {limit} bytes")
        with self.opened(name) as stream:
            content = stream.read(limit)
        if (digest := self._digest(name)) is not None and name not in self._compared:
            self._compare(name, "sha256", hashlib.sha256(content).hexdigest(), digest.sha256)
            self._compared.add(name)
        return content

    def verify(self, name: str) -> None:
        """Compare the content of a file with its digest, unless that was already done. Raises the errors of `read`."""
        size, digest = self.look_at(name), self._digest(name)
        if digest is None or name in self._compared:
            return
        if digest.blocks:
            for index, found in enumerate(_digests_of_blocks(self.folder / name, size)):
                self._compare(name, f"sha256 of block {index}", found, digest.blocks[index])
        else:
            with self.opened(name) as stream:
                self._compare(name, "sha256", hashlib.file_digest(stream, "sha256").hexdigest(), digest.sha256)
        self._compared.add(name)

    def _digest(self, name: str) -> FileDigest | None:
        if self._digests is None:
            return None
        if name not in self._digests:
            raise BundleError(f"{self.folder}: the manifest does not list {name!r:.200}")
        return self._digests[name]

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[BufferedReader]:
        """Open a file for reading. Call `look_at` before this. Raises BundleError if the file cannot be read."""
        try:
            with (self.folder / name).open("rb") as stream:
                yield stream
        except FileNotFoundError as error:
            raise _replaced(self.folder / name) from error
        except OSError as error:
            raise _unreadable(self.folder / name, error) from error

    def _compare(self, name: str, what: str, found: str, expected: str) -> None:
        if found != expected:
            self.look_at(name)  # raises a clearer error if the file was modified
            raise IntegrityError(f"{self.folder / name}: {what} is {found}, expected {expected}")


def plain_name(name: str, where: str) -> str:
    """Return `name` if it is a plain file name on every operating system. Otherwise, raise BundleError at `where`."""
    plain = not any(char in '/\\:*?"<>|' or ord(char) < 32 for char in name) and not _DEVICE.match(name)
    if not plain or not name or name[-1] in ". ":  # Windows drops these at the end
        raise BundleError(f"{where}: found {name!r:.200}, expected a plain file name without folders")
    return name


def _digests_of_blocks(file: Path, size: int) -> Iterator[str]:
    """Yield the SHA-256 of each block of a file."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - imports logging; only large bundles need it

    def digest(begin: int) -> str:
        found = hashlib.sha256()
        with file.open("rb") as stream:
            stream.seek(begin)
            for place in range(0, BLOCK, _PIECE):
                found.update(stream.read(min(_PIECE, BLOCK - place)))
        return found.hexdigest()

    with ThreadPoolExecutor() as threads:
        yield from threads.map(digest, range(0, size, BLOCK))


def _replaced(file: Path) -> IntegrityError:
    return IntegrityError(f"{file}: was replaced while it was being read: load again")


def _unreadable(file: Path, error: Exception) -> BundleError:
    return BundleError(f"{file}: cannot be read: {getattr(error, 'strerror', error)}")
