"""Lists of entries: one module for each format, and the table of formats."""

from u2moe.runtime.corpus.entry import ListOptions
from u2moe.runtime.corpus.lists.lines import Recording, read_recordings
from u2moe.runtime.corpus.lists.table import FORMATS, ListFormat, digest, find_format, read_utterances

__all__ = [
    "FORMATS", "ListFormat", "ListOptions", "Recording", "digest", "find_format", "read_recordings", "read_utterances",
]  # fmt: skip
