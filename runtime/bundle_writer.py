"""Write a folder atomically: stage it next to its target, seal it, and rename it to the target."""

import contextlib
import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from u2moe.runtime.bundle.files import FileDigest, plain_name
from u2moe.runtime.bundle.manifest import MANIFEST_FILE, Manifest
from u2moe.runtime.bundle.manifest_file import format_manifest
from u2moe.runtime.bundle.signature import SIGNATURE_FILE
from u2moe.runtime.bundle_folder import Bundle
from u2moe.runtime.errors import BundleError
from u2moe.runtime.whole_file import flush, locked

SEALED_FILE = f"{MANIFEST_FILE}.staged"
"""Name of the manifest in a staged bundle. It differs from `MANIFEST_FILE`, so that no program uses an unfinished
folder as a bundle."""


class BundleWriter:
    """Atomic writer of a bundle.

    Files are staged in a temporary folder next to the target. `finish` renames this folder to the target::

        with BundleWriter(out) as staging:
            staging.add("tokens.txt", content)              # or write into staging.path directly
            onnx.save(graph, staging.path / "encoder.onnx")
            bundle = staging.finish(with_external(manifest, staging.path))

    If the block ends with an exception or without `finish`, the staged files are removed and the target is unchanged. A
    non-empty target is an error, unless `overwrite` is true and the target contains the file `marker`. This file shows
    that the target is a bundle. To write a folder for another runtime, pass another marker, which bundles may have too,
    and call `publish` instead of `finish`.

    Attributes:
        target: the folder to write.
        path: the temporary folder; it exists only within the block.

    Raises:
        BundleError: on entry, the target is a non-empty folder that must not be overwritten, or it cannot be written.
    """

    def __init__(self, target: str | os.PathLike[str], *, overwrite: bool = False, marker: str = MANIFEST_FILE) -> None:
        self.target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow the target if it is a link
        self.path = self._beside("partial")
        self._old = self._beside("replaced")
        self._overwrite = overwrite
        self._marker = marker
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._failures(), contextlib.ExitStack() as stack:
            for parent in self.target.parents[::-1]:
                if not parent.exists():
                    parent.mkdir(exist_ok=True)
                    stack.callback(_remove_if_empty, parent)
            stack.enter_context(locked(self._beside("lock")))
            self._clear()  # remove the folders that a killed process left behind
            self._check_target()
            stack.callback(self._clear)
            self.path.mkdir()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stack.close()
        if isinstance(error, OSError):
            with self._failures():
                raise error

    def add(self, name: str, content: str | bytes | Path) -> None:
        """Stage a file. `content` is text (written as UTF-8), bytes, or an existing file to copy."""
        target = self.path / plain_name(name, "add")
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_bytes(content.encode() if isinstance(content, str) else content)

    def seal(self, manifest: Manifest) -> Bundle:
        """Hash every staged file, write the manifest, and open the bundle in the temporary folder.

        The digests of the staged files replace `manifest.files`. If a file changes later, call `seal` again. Until
        `finish`, the manifest is named `SEALED_FILE`.

        Raises:
            BundleError: a graph or tokens.txt is missing, or the staged files are not a valid bundle.
        """
        write_manifest(self.path, manifest, SEALED_FILE)
        return Bundle.open(self.path, verify=False, manifest_file=SEALED_FILE)

    def finish(self, manifest: Manifest) -> Bundle:
        """Seal the staged folder, and move it to the target. Returns the bundle at the target."""
        bundle = self.seal(manifest)
        (self.path / SEALED_FILE).replace(self.path / MANIFEST_FILE)
        return Bundle(self.publish(), bundle.manifest, bundle.tokens)

    def publish(self) -> Path:
        """Replace the target with the staged folder, without sealing it. Returns the target.

        An existing target is renamed first. For a moment, there is therefore no folder at the target.
        """
        for file in self.path.rglob("*"):
            if file.is_file():
                flush(file)
        self._check_target()
        with contextlib.suppress(FileNotFoundError):
            self.target.rename(self._old)
        self.path.rename(self.target)
        return self.target

    def _clear(self) -> None:
        """Remove the staged folder and the one that it replaces, or move the latter back if there is no target."""
        if not self.target.exists():
            with contextlib.suppress(FileNotFoundError):
                self._old.rename(self.target)
        for folder in (self.path, self._old):
            if folder.is_symlink():
                folder.unlink()
            shutil.rmtree(folder, ignore_errors=True)

    def _beside(self, role: str) -> Path:
        return self.target.parent / f".{self.target.name}.{role}"

    def _check_target(self) -> None:
        if not self.target.exists():
            return
        if self.target.is_mount():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if not self.target.is_dir():
            raise BundleError(f"{self.target}: is a file: name a folder to write the bundle to")
        occupied = any(self.target.iterdir())
        if occupied and not self._overwrite:
            raise BundleError(f"{self.target}: is not empty: name another folder, or replace it (--overwrite)")
        if occupied and not (self.target / self._marker).is_file():
            raise BundleError(
                f"{self.target}: contains no {self._marker}: only a folder of the same kind can be overwritten"
            )
        if occupied and self._marker != MANIFEST_FILE and (self.target / MANIFEST_FILE).is_file():
            raise BundleError(f"{self.target}: is a bundle, and only a bundle may replace it: name another folder")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn file system errors, such as a full disk, into BundleErrors."""
        try:
            yield
        except OSError as error:
            reason = f"cannot be written: {error.strerror or error}"
            if isinstance(error, BlockingIOError):
                reason = "is being written by another process"
            if error.errno == errno.EBUSY:
                reason = "is a mount point, which cannot be replaced; name a folder inside it"
            raise BundleError(f"{self.target}: {reason}") from error


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_manifest(folder: Path, manifest: Manifest, name: str = MANIFEST_FILE) -> None:
    """Hash the files in a folder, and write the manifest with their digests to the file `name`."""
    unlisted = {MANIFEST_FILE, SEALED_FILE, SIGNATURE_FILE}
    names = sorted({file.name for file in folder.iterdir() if file.is_file()} - unlisted)
    files = {file: FileDigest.of(folder / file) for file in names}
    (folder / name).write_bytes(format_manifest(dataclasses.replace(manifest, files=files)).encode())
