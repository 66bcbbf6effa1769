"""Writes a folder atomically: staged beside its target, sealed, and moved there in one step."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

from u2moe.runtime.bundle.bundle import Bundle
from u2moe.runtime.bundle.files import BundleFile, plain_name
from u2moe.runtime.bundle.manifest import MANIFEST_FILE, FileDigest, Manifest
from u2moe.runtime.bundle.manifest_file import format_manifest
from u2moe.runtime.errors import BundleError

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from types import TracebackType

SEALED_FILE = f"{MANIFEST_FILE}.staged"
"""The manifest of a staged bundle: without `MANIFEST_FILE`, nothing else takes the folder for a bundle."""
_STAGED, _REPLACED = ".partial", ".replaced"
_LINUX_AT_FDCWD, _LINUX_RENAME_EXCHANGE = -100, 2
_ATTEMPTS = 20
"""Number of attempts to move the folder, if other writers remove or replace the target."""


class BundleWriter:
    """Writes a bundle atomically.

    Files are staged in a temporary folder beside the target, which `finish` renames to the target::

        with BundleWriter(out) as staging:
            staging.add("tokens.txt", content)              # or write into staging.path directly
            onnx.save(graph, staging.path / "encoder.onnx")
            bundle = staging.finish(manifest)

    Leaving the block without `finish`, or by an exception, removes the staged files and leaves the target as it was.
    A target that exists and is not empty is refused, unless `overwrite` is true and it is a bundle, that is, holds the
    file `marker`. Folders for other runtimes have another marker and end with `publish` instead of `finish`.

    To replace a bundle, the whole folder is exchanged, on Linux in one step: readers find either the old bundle or the
    new one. Leftovers of a killed writer are removed by the next writer of the same target.

    Raises:
        BundleError: on entering the block: the target is occupied or cannot be replaced.
    """

    def __init__(self, target: str | os.PathLike[str], *, overwrite: bool = False, marker: str = MANIFEST_FILE) -> None:
        self.target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow the target if it is a link
        self.overwrite = overwrite
        self.marker = marker
        self.path = self.target.parent / f".{self.target.name}.{secrets.token_hex(4)}{_STAGED}"
        self._lock: int | None = None
        self._made: list[Path] = []
        """Folders that were not there, innermost first."""

    def __enter__(self) -> Self:
        try:
            self._remove_stale()
            self._check_target()
            self._made = [folder for folder in self.target.parents if not folder.exists()]
            try:
                self.target.parent.mkdir(parents=True, exist_ok=True)
                self._make_folder()
                self._try_to_replace()
            except BaseException:
                self._clean_up()
                raise
        except OSError as error:
            raise BundleError(f"{self.target}: cannot be written: {error.strerror or error}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()
        if isinstance(error, OSError):  # a full disk, most of all
            raise BundleError(f"{self.target}: cannot be written: {error.strerror or error}") from error

    def add(self, name: str, content: str | bytes | Path) -> None:
        """Stage one file from text (UTF-8), bytes, or an existing file to copy."""
        target = self.path / plain_name(name, "add")
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_bytes(content.encode() if isinstance(content, str) else content)

    def seal(self, manifest: Manifest) -> Bundle:
        """Hash every staged file, write the manifest, and open the staged bundle (still in the temporary folder).

        `manifest.files` is replaced by the staged files. Sealing again after a change is allowed. Until `finish`, the
        manifest has a different name.

        Raises:
            BundleError: a graph or tokens.txt is missing, or the staged files are not a valid bundle.
        """
        write_manifest(self.path, manifest, SEALED_FILE)
        return Bundle.open(self.path, verify=False, manifest_file=SEALED_FILE)

    def finish(self, manifest: Manifest) -> Bundle:
        """Seal, and move the staged folder to the target. Returns the bundle at the target.

        Sessions created from the staged bundle keep working if the system can rename open files (on Windows, release
        them first).
        """
        bundle = self.seal(manifest)
        (self.path / SEALED_FILE).replace(self.path / MANIFEST_FILE)
        return Bundle(self.publish(), bundle.manifest, bundle.tokens)

    def publish(self) -> Path:
        """Move the staged folder to the target without sealing it. Returns the target."""
        for attempt in range(_ATTEMPTS):
            self._check_target()
            try:
                if self.target.exists() and any(self.target.iterdir()):
                    self._exchange()
                else:
                    self.path.rename(self.target)
            except OSError as error:  # another writer was faster
                if attempt == _ATTEMPTS - 1 or error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                break
        return self.target

    def _exchange(self) -> None:
        """Exchange the staged folder and the target, or else move the target away first."""
        if _exchanged(self.path, self.target):
            return
        replaced = self.path.with_suffix(_REPLACED)
        self.target.rename(replaced)
        try:
            self.path.rename(self.target)
        except OSError:
            replaced.rename(self.target)
            raise

    def _check_target(self) -> None:
        if not self.target.exists():
            return
        if not self.target.is_dir():
            raise BundleError(f"{self.target}: is a file, expected the name of a folder to write a bundle to")
        occupied = any(self.target.iterdir())
        if occupied and not self.overwrite:
            raise BundleError(f"{self.target}: exists and is not empty; ask to overwrite it or name another folder")
        if occupied and not (self.target / self.marker).is_file():
            raise BundleError(f"{self.target}: holds no {self.marker}: only a folder of the same kind is overwritten")

    def _make_folder(self) -> None:
        """Create the temporary folder, locked before it gets a name that other writers recognise as stale."""
        fresh = self.path.with_suffix(".new")
        fresh.mkdir()
        self._lock = _locked(fresh)
        fresh.rename(self.path)

    def _try_to_replace(self) -> None:
        """Try an impossible move of the target, if any: for a mount point the system gives a different error."""
        if not self.target.exists() or self.target.is_symlink():
            return
        occupied = self.path / "occupied"
        occupied.touch()
        try:
            self.target.rename(self.path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise BundleError(
                    f"{self.target}: is a mount point, which cannot be replaced; name a folder inside it"
                ) from error
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        occupied.unlink()

    def _remove_stale(self) -> None:
        """Remove leftovers of killed writers, and restore a target that one of them had moved away."""
        left = [
            path
            for path in (self.target.parent.iterdir() if self.target.parent.is_dir() else ())
            if path.name.startswith(f".{self.target.name}.") and path.suffix in (_STAGED, _REPLACED)
        ]
        for path in left:
            lock = _locked(path)
            if lock is None:  # its writer is still running
                continue
            if path.suffix == _REPLACED and not self.target.exists():
                path.rename(self.target)
            else:
                shutil.rmtree(path, ignore_errors=True)
            os.close(lock)

    def _clean_up(self) -> None:
        for path in (self.path, self.path.with_suffix(_REPLACED)):
            if path.is_symlink():  # the target was a link
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty: that of a bundle, most of all
                folder.rmdir()


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST_FILE) -> None:
    """Hash every file of a folder, and write the manifest with their digests into its file `name`."""
    names = sorted(file.name for file in folder.iterdir() if file.name not in (MANIFEST_FILE, SEALED_FILE))
    files = {file: _digest(folder, file) for file in names}
    text = format_manifest(dataclasses.replace(manifest, files=files))
    (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _digest(folder: Path, name: str) -> FileDigest:
    with BundleFile(folder, name) as file:
        return FileDigest(sha256=file.sha256(), size=file.size)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks a folder until closed; None: locked by another process, or locks are unsupported."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step, for which Python has no function; False: not supported by the system."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    result = rename(_LINUX_AT_FDCWD, paths[0], _LINUX_AT_FDCWD, paths[1], ctypes.c_uint(_LINUX_RENAME_EXCHANGE))
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM):  # an older kernel, a file system without it, a sandbox
        return False
    raise OSError(number, os.strerror(number), str(other))
