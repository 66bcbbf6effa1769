"""Kaldi's tables ("key value" lines, sorted by key): looked up on disk, so that memory does not grow with them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

from u2moe.runtime.errors import CorpusError


class SortedTable:
    """A text file of "key value" lines in the order of their keys' bytes (`LC_ALL=C sort`), as Kaldi demands.

    A lookup first tries the line after the last one found, which is the right one where two tables are read side by
    side; otherwise it bisects the file. Open it with `open_table`.
    """

    def __init__(self, name: str, content: mmap.mmap | bytes) -> None:
        self._name = name
        self._content = content
        self._next = 0
        self._end = len(content)
        while self._end and content[self._end - 1 : self._end].isspace():
            self._end -= 1
        self._is_checked = False

    def find(self, key: str) -> str | None:
        """The value of a key, stripped; None if the table lacks it.

        Raises:
            CorpusError: the table is not in order.
        """
        wanted = key.encode("utf-8", "surrogateescape")
        value = self._value_at(self._next, wanted)
        if value is not None:
            return value
        self._check()
        low, high = 0, self._end
        while low < high:
            begin = self._content.rfind(b"\n", low, (low + high) // 2) + 1 or low
            found, end = self._key_at(begin)
            if found < wanted:
                low = end
            elif found > wanted:
                high = begin
            else:
                return self._value_at(begin, wanted)
        return None

    def _check(self) -> None:
        """Look once whether the keys are in order: a lookup in a table that is not would miss some."""
        if self._is_checked:
            return
        begin, before = 0, b""
        while begin < self._end:
            found, begin = self._key_at(begin)
            if found <= before:
                met = found.decode("utf-8", "replace")
                raise CorpusError(f"{self._name}: is not sorted as by LC_ALL=C sort -u: met {met!r} too late")
            before = found
        self._is_checked = True

    def _key_at(self, begin: int) -> tuple[bytes, int]:
        """The key of the line that begins here, and where the next line begins."""
        end = self._content.find(b"\n", begin) + 1 or len(self._content)
        words = self._content[begin:end].split(None, 1)
        return (words[0] if words else b""), end

    def _value_at(self, begin: int, wanted: bytes) -> str | None:
        found, end = self._key_at(begin)
        if found != wanted:
            return None
        self._next = end
        value = self._content[begin:end].strip()[len(wanted) :]
        return value.decode("utf-8", "surrogateescape").strip()


@contextmanager
def open_table(path: str) -> Iterator[SortedTable]:
    """A table on disk.

    Raises:
        CorpusError: it cannot be read.
    """
    try:
        with open(path, "rb") as stream:  # noqa: PTH123
            if not stream.read(1):
                yield SortedTable(path, b"")
                return
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                yield SortedTable(path, content)
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror or error}") from error
