"""Claims on blocks, so that machines that share a folder do not work on the same one.

A claim only saves work: a block that two work on is written twice with the same bytes, each time as a whole. So it
needs no lock, and a file system that cannot keep it (one without links, one whose listings are late) costs time alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from u2moe.runtime.corpus.storage import write_first, write_whole
from u2moe.runtime.whole_file import probe

LEASE_S = 600.0
"""Seconds after which a claim that was not renewed is void: its owner's machine is gone."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Who works on a block.

    Attributes:
        number: the block.
        host: its machine.
        process: number of its process there.
        age_s: seconds since it was last renewed, by the clock of the file system.
    """

    number: int
    host: str
    process: int
    age_s: float


class Claims:
    """The claims of this process in a folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._own: set[int] = set()
        self._me = {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid())}

    def take(self, number: int) -> bool:
        """Claim a block; False if another process that seems to be alive has it."""
        content = json.dumps(self._me).encode()
        with contextlib.suppress(OSError):  # what keeps no claims has none that would be in the way
            if not write_first(self._path(number), content):
                if not self._is_void(number):
                    return False
                write_whole(self._path(number), content)
        self._own.add(number)
        return True

    def renew(self) -> None:
        """Say that this process is alive; to be called several times in each `LEASE_S`."""
        for number in self._own:
            with contextlib.suppress(OSError):
                os.utime(self._path(number))

    def release(self, number: int) -> None:
        """Give a block up, done or not."""
        self._own.discard(number)
        with contextlib.suppress(OSError):
            os.unlink(self._path(number))  # noqa: PTH108

    def release_all(self) -> None:
        """Give up all that this process holds."""
        for number in list(self._own):
            self.release(number)

    def remove_void(self, finished: Container[int]) -> None:
        """Remove claims on finished blocks that processes left which were killed as they finished them."""
        for claim in self.held():
            if claim.number in finished and self._is_void(claim.number):
                self.release(claim.number)

    def held(self) -> list[Claim]:
        """All claims in the folder."""
        found = []
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(self._folder)):  # noqa: PTH208
                owner = self._owner(int(name)) if name.isdigit() else None
                if owner is not None:
                    found.append(
                        Claim(
                            number=int(name),
                            host=str(owner.get("host")),
                            process=int(owner.get("process", 0)),
                            age_s=self._age_s(int(name)),
                        )
                    )
        return found

    def _path(self, number: int) -> str:
        return str(self._folder / f"{number:012}")

    def _owner(self, number: int) -> dict[str, Any] | None:
        try:
            owner = json.loads(Path(self._path(number)).read_bytes())
        except (OSError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None

    def _is_void(self, number: int) -> bool:
        owner = self._owner(number)
        if owner is None:  # released in this moment
            return True
        if owner.get("host") == self._me["host"] and os.name == "posix" and not _lives(owner):
            return True
        return self._age_s(number) > LEASE_S

    def _age_s(self, number: int) -> float:
        """Seconds since a claim was renewed, by the clock of the file system: those of machines differ."""
        try:
            changed = os.stat(self._path(number)).st_mtime  # noqa: PTH116
            return probe(self._folder) - changed
        except OSError:
            return 0.0


def _lives(owner: dict[str, Any]) -> bool:
    process = owner.get("process")
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _started(process) == owner.get("started")


def _started(process: int) -> int | None:
    """When a process started, in ticks since the machine did, so that a number that is used again shows; Linux only."""
    try:
        content = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return None
    return int(content.rpartition(b")")[2].split()[19])
