"""Claims on blocks, so that machines that share a folder do not work on the same block.

Claims only save work. Two processes that do the same block write the same bytes, each atomically, so that no locks are
needed; on a file system where claims fail (no hard links, delayed listings) only time is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path

from u2moe.runtime.corpus.storage import write_first, write_whole
from u2moe.runtime.whole_file import probe

LEASE_S = 600.0
"""Seconds without renewal after which a claim is void."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A process that works on a block.

    Attributes:
        host: name of its machine.
        process: its process id.
        started: its start in clock ticks since boot, which tells a reused process id; None: unknown.
    """

    host: str
    process: int
    started: int | None

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        return cls(host=socket.gethostname(), process=os.getpid(), started=_started(os.getpid()))

    def is_gone(self) -> bool:
        """Whether it ran on this machine and has ended."""
        if self.host != socket.gethostname() or os.name != "posix":
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return _started(self.process) != self.started


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim on a block; `age_s` are seconds since its renewal by the clock of the file system."""

    number: int
    owner: Owner
    age_s: float

    @property
    def is_void(self) -> bool:
        """Whether its owner no longer works on the block."""
        return self.age_s > LEASE_S or self.owner.is_gone()


class Claims:
    """The claims of this process in a folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._own: set[int] = set()
        self._me = Owner.here()

    def take(self, number: int) -> bool:
        """Claim a block; False if another process that seems to be alive has it."""
        content = json.dumps(asdict(self._me)).encode()
        with contextlib.suppress(OSError):  # claims that cannot be written do not conflict
            if not write_first(self._path(number), content):
                claim = self._read(number)
                if claim is not None and not claim.is_void:
                    return False
                write_whole(self._path(number), content)
        self._own.add(number)
        return True

    def renew(self) -> None:
        """Renew all claims of this process; must be called several times within `LEASE_S`."""
        for number in self._own:
            with contextlib.suppress(OSError):
                os.utime(self._path(number))

    def release(self, number: int) -> None:
        """Release a block, done or not."""
        self._own.discard(number)
        with contextlib.suppress(OSError):
            os.unlink(self._path(number))  # noqa: PTH108

    def release_all(self) -> None:
        """Release all blocks of this process."""
        for number in list(self._own):
            self.release(number)

    def remove_void(self, finished: Container[int]) -> None:
        """Remove void claims on finished blocks: their owners were killed before they could release them."""
        for claim in self.held():
            if claim.number in finished and claim.is_void:
                self.release(claim.number)

    def held(self) -> list[Claim]:
        """All claims in the folder."""
        try:
            numbers = sorted(int(name) for name in os.listdir(self._folder) if name.isdigit())  # noqa: PTH208
        except OSError:
            return []
        return [claim for claim in map(self._read, numbers) if claim is not None]

    def _path(self, number: int) -> str:
        return str(self._folder / f"{number:012}")

    def _read(self, number: int) -> Claim | None:
        """The claim on a block; None: it was released meanwhile, or cannot be read."""
        path = Path(self._path(number))
        try:
            owner = Owner(**json.loads(path.read_bytes()))
            age_s = probe(self._folder) - path.stat().st_mtime
        except (OSError, ValueError, TypeError):
            return None
        return Claim(number=number, owner=owner, age_s=age_s)


def _started(process: int) -> int | None:
    try:
        content = Path(f"/proc/{process}/stat").read_bytes()
    except OSError:
        return None
    return int(content.rpartition(b")")[2].split()[19])
