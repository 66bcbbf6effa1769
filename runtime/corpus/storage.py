"""Access to files by path (with the standard library) or by URL (with fsspec, if installed)."""

import contextlib
import io
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from u2moe.runtime import whole_file
from u2moe.runtime.errors import CorpusError


def is_url(path: str) -> bool:
    """Return whether the path is a URL for fsspec, such as "s3://bucket/name"."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """Join a relative path to a folder or URL."""
    return posixpath.join(folder, name) if is_url(folder) else os.path.join(folder, name)  # noqa: PTH118


def parent(path: str) -> str:
    """Return the folder or URL that contains a file."""
    return (posixpath.dirname(path) if is_url(path) else os.path.dirname(path)) or "."  # noqa: PTH120


def base_name(path: str) -> str:
    """Return the last component of a path or URL."""
    return posixpath.basename(path.rstrip("/")) if is_url(path) else os.path.basename(path)  # noqa: PTH119


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading. Raise OSError if that is impossible, and the CorpusError of `filesystem_of`."""
    if is_url(path):
        filesystem, name = filesystem_of(path)
        with filesystem.open(name, "rb") as stream, io.BufferedReader(stream) as buffered:
            yield buffered  # fsspec's readline takes no limit
    else:
        with open(path, "rb") as stream:  # noqa: PTH123
            yield stream


def size_of(path: str) -> int:
    """Return the size of a file in bytes. Raise OSError if the file does not exist."""
    if is_url(path):
        filesystem, name = filesystem_of(path)
        return int(filesystem.size(name))
    return Path(path).stat().st_size


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return the fsspec file system for a URL, and the file's name there. Raise CorpusError if it is not installed."""
    try:
        import fsspec  # noqa: PLC0415 - not needed for local files

        filesystem, name = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise CorpusError(f"{url}: needs the Python package {error.name or error}: pip install fsspec s3fs") from error
    except ValueError as error:
        raise CorpusError(f"{url}: {error}") from error
    return filesystem, str(name)


def read_bytes(path: str) -> bytes | None:
    """Return the content of a file; None if the file does not exist."""
    with contextlib.suppress(FileNotFoundError), open_binary(path) as stream:
        return stream.read()
    return None


def list_files(folder: str) -> list[str]:
    """Return the relative paths of all files below a folder (none if it is missing), except local hidden files."""
    if is_url(folder):
        filesystem, name = filesystem_of(folder)
        filesystem.invalidate_cache()
        try:
            found = [str(file) for file in filesystem.find(name)]
        except FileNotFoundError:
            return []
        return sorted(file.removeprefix(f"{name.rstrip('/')}/") for file in found)
    local = (Path(place, name) for place, _, names in os.walk(folder) for name in names if not name.startswith("."))
    return sorted(file.relative_to(folder).as_posix() for file in local)


def write_whole(path: str, content: bytes) -> None:
    """Write a file atomically; create missing folders. Raise OSError if the file cannot be written."""
    if is_url(path):
        filesystem, name = filesystem_of(path)
        filesystem.makedirs(parent(name), exist_ok=True)
        filesystem.pipe_file(name, content)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        whole_file.write_bytes(Path(path), content)


def write_first(path: str, content: bytes) -> bool:
    """Write a file as `write_whole` does, unless it exists. Return whether it was written.

    If several processes try at the same time, only one succeeds. On object stores, however, several may succeed.
    """
    if not is_url(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return whole_file.write_first(Path(path), content)
    is_new = read_bytes(path) is None
    if is_new:
        write_whole(path, content)
    return is_new
