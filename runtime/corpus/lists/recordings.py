"""Lists of recordings with transcripts, for measurements: in memory, and without malformed lines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from u2moe.runtime.audio.folders import find_audio
from u2moe.runtime.errors import CorpusError
from u2moe.runtime.text.lines import read_lines


@dataclass(frozen=True, kw_only=True)
class Recording:
    """An audio file and its transcript."""

    path: Path
    transcript: str


def read_recordings(file: str | os.PathLike[str]) -> list[Recording]:
    """Recordings from a text file with lines of "path<TAB>transcript"; paths are relative to the file's folder.

    A folder is the list of all recordings in it, whose transcripts are empty.

    Raises:
        AudioError: the folder has no recordings.
        CorpusError: the file cannot be read, or a line is malformed; names file and line.
    """
    path = Path(file)
    if path.is_dir():
        return [Recording(path=found, transcript="") for found in find_audio([path])]
    recordings = []
    for number, line in read_lines(path, "a list of recordings", CorpusError):
        name, tab, transcript = line.partition("\t")
        if not tab or not name.strip():
            raise CorpusError(f"{path}: line {number} must be path<TAB>transcript, got {line[:60]!r}")
        recordings.append(Recording(path=path.parent / name.strip(), transcript=transcript.strip()))
    if not recordings:
        raise CorpusError(f"{path}: lists no recordings")
    return recordings
