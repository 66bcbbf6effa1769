"""Kaldi's data folders: wav.scp, and beside it perhaps `segments`, `text` and `utt2spk`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

from u2moe.runtime.corpus.lists.lines import parse_lines, seconds
from u2moe.runtime.corpus.lists.options import ListOptions
from u2moe.runtime.corpus.lists.sorted_table import SortedTable, open_table
from u2moe.runtime.corpus.storage import join, parent

_BESIDE = ("segments", "text", "utt2spk")


def read(list_path: str, options: ListOptions) -> Iterator[Utterance]:
    """Utterances of a data folder, or of its wav.scp: one for each segment or, without segments, each recording.

    Kaldi's order is expected: tables sorted with `LC_ALL=C sort`. They are looked up on disk, so must be local.

    Raises:
        CorpusError: a table is not sorted.
    """
    recordings, *beside = files(list_path)
    tables = {os.path.basename(path): path for path in beside}  # noqa: PTH119
    with ExitStack() as stack:

        def table(name: str) -> SortedTable | None:
            return stack.enter_context(open_table(tables[name])) if name in tables else None

        texts, speakers = table("text"), table("utt2spk")
        segmented = stack.enter_context(open_table(recordings)) if "segments" in tables else None

        def parse(line: str) -> Entry:
            if segmented is not None:
                key, recording, start, end = _segment(line)
                entry = segmented.find(recording)
                if entry is None:
                    raise ValueError(f"recording {recording!r} is not in {recordings}")
            else:
                key, _, entry = line.partition(" ") if "\t" not in line else line.partition("\t")
                start, end = 0.0, None
            return Entry(
                key=key,
                source=options.source(entry.strip(), recordings),
                start=start,
                end=end,
                duration=None if end is None else end - start,
                text=texts.find(key) if texts else None,
                speaker=speakers.find(key) if speakers else None,
            )

        yield from parse_lines(tables.get("segments", recordings), parse)


def files(list_path: str) -> list[str]:
    """The files of a data folder: wav.scp first, then those beside it that are there."""
    recordings = join(list_path, "wav.scp") if os.path.isdir(list_path) else list_path  # noqa: PTH112
    beside = [join(parent(recordings), name) for name in _BESIDE]
    return [recordings, *(path for path in beside if os.path.isfile(path))]  # noqa: PTH113


def _segment(line: str) -> tuple[str, str, float, float | None]:
    words = line.split()
    if len(words) not in (4, 5):
        raise ValueError(f"found {line[:60]!r}, expected: utterance recording start end")
    start, end = seconds(words[2], "start"), None
    if not words[3].startswith("-"):  # Kaldi: -1 is the end of the recording
        end = seconds(words[3], "end")
    return words[0], words[1], start, end
