"""Finds the recordings in folders."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from u2moe.runtime.audio.files import MEDIA_SUFFIXES, has_media
from u2moe.runtime.audio.media import EXTRA
from u2moe.runtime.errors import AudioError, AudioWarning

FILE_SUFFIXES = (".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".w64", ".wav")
"""Suffixes of files that count as audio when a folder is searched."""
APPLE_DOUBLE = "._"
"""Prefix of the metadata files that macOS writes beside others, with the same suffix; they hold no audio."""
_MOST_NAMED = 5


def find_audio(paths: list[Path]) -> list[Path]:
    """Files as given, and the audio files below every folder, sorted by name.

    An AudioWarning names recordings that need the extra [media], and folders that cannot be read.

    Raises:
        AudioError: a folder has no audio files.
    """
    found: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir it raises for no name
            found.append(path)
            continue
        inside, passed_over = _search(path)
        if passed_over:
            named = ", ".join(str(file) for file in passed_over[:_MOST_NAMED])
            more = f" and {len(passed_over) - _MOST_NAMED} more" if len(passed_over) > _MOST_NAMED else ""
            needs = f" (media files need: {EXTRA})" if any(_is_media(file) for file in passed_over) else ""
            warnings.warn(f"{path}: cannot read {named}{more}{needs}", AudioWarning, stacklevel=2)
        if not inside:
            raise AudioError(f"{path}: holds no audio files")
        found += inside
    return found


def _search(folder: Path) -> tuple[list[Path], list[Path]]:
    """Audio files below a folder, and files and folders that cannot be read."""
    inside: list[Path] = []
    passed_over: list[Path] = []
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(
        folder, onerror=lambda error: passed_over.append(Path(error.filename)), followlinks=True
    ):
        # A folder is searched once, even if links to it form a circle.
        targets = {os.path.realpath(Path(place, name)): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for target, name in targets.items() if target not in seen)
        seen.update(targets)
        for file in (Path(place, name) for name in names if not name.startswith(APPLE_DOUBLE)):
            if file.suffix.lower() in FILE_SUFFIXES or (_is_media(file) and has_media()):
                inside.append(file)
            elif _is_media(file):
                passed_over.append(file)
    return sorted(inside), sorted(passed_over)


def _is_media(file: Path) -> bool:
    return file.suffix.lower() in MEDIA_SUFFIXES
