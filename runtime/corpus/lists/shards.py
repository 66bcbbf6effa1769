"""WeNet's shards: tar archives with pairs of KEY.wav (or another suffix) and KEY.txt, and lists of such archives."""

import itertools
import tarfile
import zlib
from collections.abc import Iterator

from u2moe.runtime.corpus.entry import Entry, ListOptions, TarMember, Unreadable
from u2moe.runtime.corpus.lists.folder import SUFFIXES
from u2moe.runtime.corpus.lists.lines import read_lines
from u2moe.runtime.corpus.storage import base_name, open_binary, size_of
from u2moe.runtime.errors import CorpusError

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_LONGEST_TEXT = 1 << 20


def read(list_path: str, options: ListOptions) -> Iterator[Entry]:
    """Yield the entries of archives. Audio is read later. In a damaged archive, the last entry is `Unreadable`."""
    for archive in archives(list_path, options):
        try:
            with open_binary(archive) as stream, tarfile.open(fileobj=stream, mode="r:*") as tar:
                yield from _pairs(archive, tar)
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            if isinstance(error, FileNotFoundError):
                raise CorpusError(f"{archive}: no such file") from error
            message = f"{archive}: cannot be read completely as a tar archive: {error}"
            yield Entry(key=base_name(archive), source=Unreadable(error=message))


def archives(list_path: str, options: ListOptions) -> Iterator[str]:
    """Return the paths of the archives: `list_path` itself if it is an archive, or else the paths in the list."""
    if is_archive(list_path):
        return iter([list_path])
    return (options.path(line, list_path) for _, line in read_lines(list_path))


def content_of(list_path: str, options: ListOptions) -> Iterator[bytes]:
    """Yield the names and sizes of the archives, which identify the list."""
    for archive in archives(list_path, options):
        yield f"{base_name(archive)} {size_of(archive)}\n".encode("utf-8", "surrogateescape")


def is_archive(path: str) -> bool:
    """Return whether a file name is that of a tar archive."""
    return path.lower().endswith(ARCHIVE_SUFFIXES)


def _pairs(archive: str, tar: tarfile.TarFile) -> Iterator[Entry]:
    """Yield the entries of an archive. Each combines consecutive members whose names differ only in the suffix."""
    for stem, members in itertools.groupby(_files(tar), key=lambda member: member.name.rpartition(".")[0]):
        source, text = None, None
        for member in members:
            suffix = member.name.rpartition(".")[2]
            if suffix == "txt" and member.size <= _LONGEST_TEXT and (content := tar.extractfile(member)):
                text = content.read().decode("utf-8", "replace").strip()
            elif f".{suffix.lower()}" in SUFFIXES:
                source = TarMember(archive=archive, name=member.name, offset=member.offset_data, size=member.size)
        if stem:
            yield Entry(key=stem, source=source or Unreadable(error=f"{archive}: {stem}: has no audio file"), text=text)


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all members in memory
        if member.isreg():
            yield member
