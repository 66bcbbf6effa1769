"""A folder as a list: all audio files below it, sorted by name."""

import os
from collections.abc import Iterator
from pathlib import Path

from u2moe.runtime.audio.files import APPLE_DOUBLE, FILE_SUFFIXES, MEDIA_SUFFIXES
from u2moe.runtime.corpus.entry import AudioFile, Entry, ListOptions
from u2moe.runtime.errors import CorpusError

SUFFIXES = frozenset((*FILE_SUFFIXES, *MEDIA_SUFFIXES))
"""Suffixes of recordings. They do not depend on installed extras. Some files need the extra [media] to be read."""


def read(list_path: str, _options: ListOptions) -> Iterator[Entry]:
    """Yield an entry for each audio file below a folder. Links to folders are not followed. Raise CorpusError."""
    is_empty = True
    for path in _walk(list_path):
        is_empty = False
        yield Entry(key=Path(path).relative_to(list_path).as_posix(), source=AudioFile(path=path))
    if is_empty:
        raise CorpusError(f"{list_path}: contains no audio files")


def content_of(list_path: str, options: ListOptions) -> Iterator[bytes]:
    """Yield the keys of all entries. Together, the keys identify the list."""
    return (f"{entry.key}\n".encode("utf-8", "surrogateescape") for entry in read(list_path, options))


def _walk(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        raise CorpusError(f"{folder}: cannot be read: {error.strerror or error}") from error
    for name, is_folder in found:
        path = os.path.join(folder, name)  # noqa: PTH118 - Path is too slow for ten million files
        if is_folder:
            yield from _walk(path)
        elif os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(APPLE_DOUBLE):  # noqa: PTH122
            yield path
