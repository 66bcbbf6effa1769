"""Access to files by path (standard library) or by URL (fsspec, if installed)."""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from u2moe.runtime import whole_file
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.text.lines import decompressed

if TYPE_CHECKING:
    from collections.abc import Iterator


def is_url(path: str) -> bool:
    """Whether fsspec opens it, as "s3://bucket/name"."""
    return "://" in path


def resolve(path: str, folder: str) -> str:
    """A path relative to `folder`, unless it is absolute or a URL."""
    return path if is_url(path) or os.path.isabs(path) else join(folder, path)  # noqa: PTH117 - a URL is no Path


def join(folder: str, name: str) -> str:
    """A path below a folder or URL."""
    return posixpath.join(folder, name) if is_url(folder) else os.path.join(folder, name)  # noqa: PTH118


def parent(path: str) -> str:
    """The folder or URL in which a file lies."""
    return (posixpath.dirname(path) if is_url(path) else os.path.dirname(path)) or "."  # noqa: PTH120


def base_name(path: str) -> str:
    """The last component of a path or URL."""
    return posixpath.basename(path.rstrip("/")) if is_url(path) else os.path.basename(path)  # noqa: PTH119


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened.
        CorpusError: a URL, and fsspec (or its part for this kind of URL) is not installed.
    """
    if is_url(path):
        filesystem, name = filesystem_of(path)
        with filesystem.open(name, "rb") as stream, io.BufferedReader(stream) as buffered:
            yield buffered  # fsspec's own readline takes no limit
    else:
        with open(path, "rb") as stream:  # noqa: PTH123
            yield stream


@contextlib.contextmanager
def open_decompressed(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed if it is compressed with gzip; errors as for `open_binary`."""
    with open_binary(path) as stream:
        yield decompressed(stream)


def size_of(path: str) -> int:
    """Size of a file in bytes; OSError: there is no such file."""
    if is_url(path):
        filesystem, name = filesystem_of(path)
        return int(filesystem.size(name))
    return Path(path).stat().st_size


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the name of the file in it.

    Raises:
        CorpusError: fsspec, or its part for this kind of URL, is not installed, or does not know it.
    """
    try:
        import fsspec  # noqa: PLC0415 - local files need none

        filesystem, name = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise CorpusError(f"{url}: needs the Python package {error.name or error}: pip install fsspec s3fs") from error
    except ValueError as error:
        raise CorpusError(f"{url}: {error}") from error
    return filesystem, str(name)


def read_bytes(path: str) -> bytes | None:
    """The content of a file; None if there is no such file."""
    try:
        with open_binary(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def exists(path: str) -> bool:
    """Whether there is such a file."""
    if is_url(path):
        filesystem, name = filesystem_of(path)
        return bool(filesystem.exists(name))
    return os.path.exists(path)  # noqa: PTH110 - Path.exists raises for names that are too long


def list_files(folder: str) -> list[str]:
    """Paths of all files below a folder, from that folder, without hidden ones; none if there is no such folder."""
    if is_url(folder):
        filesystem, name = filesystem_of(folder)
        filesystem.invalidate_cache()
        try:
            found = [str(file) for file in filesystem.find(name)]
        except FileNotFoundError:
            return []
        return sorted(file.removeprefix(f"{name.rstrip('/')}/") for file in found)
    places = ((Path(place), names) for place, _, names in os.walk(folder))
    return sorted(
        (place / name).relative_to(folder).as_posix()
        for place, names in places
        for name in names
        if not name.startswith(".")
    )


def write_whole(path: str, content: bytes) -> None:
    """Write a file whole or not at all; replaces one that exists. Folders are created.

    Object stores show an object when it is whole.

    Raises:
        OSError: it cannot be written.
    """
    if is_url(path):
        filesystem, name = filesystem_of(path)
        filesystem.makedirs(parent(name), exist_ok=True)
        filesystem.pipe_file(name, content)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    whole_file.write_bytes(Path(path), content)


def write_first(path: str, content: bytes) -> bool:
    """Write a file unless it exists, otherwise as `write_whole`; of several processes that try at once one succeeds.

    On object stores this is not atomic: two processes may both succeed.
    """
    if is_url(path):
        if exists(path):
            return False
        write_whole(path, content)
        return True
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return whole_file.write_first(Path(path), content)


def remove_stale_parts(folder: str) -> None:
    """Remove what killed writers left below a folder; see `whole_file`."""
    for place, _, _ in os.walk(folder) if not is_url(folder) else ():
        whole_file.remove_stale_parts(Path(place))
