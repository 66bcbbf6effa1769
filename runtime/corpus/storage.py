"""Files by path or by URL: local ones with the standard library, all others with fsspec, if it is installed."""

from __future__ import annotations

import contextlib
import os
import posixpath
from typing import IO, TYPE_CHECKING, Any, cast

from u2moe.runtime.errors import CorpusError

if TYPE_CHECKING:
    from collections.abc import Iterator


def is_url(path: str) -> bool:
    """Whether fsspec opens it, as "s3://bucket/name"."""
    return "://" in path


def resolve(path: str, folder: str) -> str:
    """A path relative to `folder`, unless it is absolute or a URL."""
    if is_url(path) or os.path.isabs(path):  # noqa: PTH117 - not a Path: URLs would lose a slash
        return path
    return join(folder, path)


def join(folder: str, name: str) -> str:
    """A path below a folder or URL."""
    if is_url(folder):
        return posixpath.normpath(name).join((f"{folder.rstrip('/')}/", ""))
    return os.path.join(folder, name)  # noqa: PTH118


def parent(path: str) -> str:
    """The folder or URL in which a file lies."""
    return path.rpartition("/")[0] if is_url(path) else os.path.dirname(path) or "."  # noqa: PTH120


def base_name(path: str) -> str:
    """The last component of a path or URL."""
    return path.rstrip("/").rpartition("/")[2] if is_url(path) else os.path.basename(path)  # noqa: PTH119


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened.
        CorpusError: a URL, and fsspec (or its part for this kind of URL) is not installed.
    """
    if is_url(path):
        filesystem, name = filesystem_of(path)
        with filesystem.open(name, "rb") as stream:
            yield cast("IO[bytes]", stream)
    else:
        with open(path, "rb") as stream:  # noqa: PTH123
            yield stream


def size_of(path: str) -> int:
    """Size of a file in bytes.

    Raises:
        OSError: there is no such file.
    """
    if is_url(path):
        filesystem, name = filesystem_of(path)
        return int(filesystem.size(name))
    return os.stat(path).st_size  # noqa: PTH116


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
