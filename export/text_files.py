"""Reads the text and yaml files of a checkpoint, with limits on memory and time."""

from __future__ import annotations

import stat
from pathlib import Path

import yaml

from u2moe.runtime.errors import CheckpointError

LARGEST_TEXT = 1 << 26
"""Characters of a vocabulary or of statistics; a million symbols fit."""
LARGEST_YAML = 1 << 18
"""Characters of a yaml file; those of WeNet have 2,000 to 10,000."""


class PlainLoader(yaml.SafeLoader):
    """Without merges ("<<"), which a few hundred characters of aliases would make too large for the memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave "<<" as it is, for which there is no constructor."""


def read_text(path: Path, *, purpose: str, largest: int = LARGEST_TEXT) -> str:
    """The content of a UTF-8 file; if it cannot be read, the error says what it is needed for: `purpose`.

    Raises:
        CheckpointError: the file is missing, not a regular file, not UTF-8, or longer than `largest` characters.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block until written to, a device might never end
            raise CheckpointError(f"{path}: is not a regular file; {purpose}")
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(largest + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {purpose}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}; {purpose}") from error
    if len(text) > largest:
        raise CheckpointError(f"{path}: has more than {largest:,} characters, expected fewer; {purpose}")
    return text


def read_yaml(path: Path, *, purpose: str) -> object:
    """The content of a yaml file of plain values.

    Raises:
        CheckpointError: as for `read_text`; or the file is not yaml, or has Python tags or merges.
    """
    text = read_text(path, purpose=purpose, largest=LARGEST_YAML)
    try:
        return yaml.load(text, PlainLoader)  # noqa: S506 - a SafeLoader
    except Exception as error:  # pyyaml raises KeyError, AttributeError and others for explicit tags that do not fit
        raise CheckpointError(f"{path}: is not plain yaml: {type(error).__name__}: {error}") from error
