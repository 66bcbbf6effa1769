"""Writes a file whole or not at all: beside its target, and moved there in one step."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """The file to write instead of `file`, whose place it takes at the end; after an error `file` is as it was.

    It has the same suffixes. What is no plain file, such as a pipe, is written as it is.

    Raises:
        OSError: it cannot be written; names the file.
    """
    target = Path(os.path.realpath(file))
    is_plain = target.is_file() or not target.exists()
    part = target.with_name(f".{secrets.token_hex(4)}.{target.name}") if is_plain else target
    try:
        yield part
        if is_plain:
            part.replace(target)
    except OSError as error:
        raise OSError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        if is_plain:
            part.unlink(missing_ok=True)


def write_text(file: Path, content: str) -> None:
    """Write text in UTF-8, whole or not at all; see `replacing`."""
    with replacing(file) as part:
        part.write_text(content, encoding="utf-8")
