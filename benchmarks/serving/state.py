"""What a server's process holds, and whether it still works."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from u2moe.benchmarks.serving.servers import RunningServer
from u2moe.benchmarks.serving.speakers import first_blocks, speech_blocks

WARM_UP = 1500
"""Connections after which the allocators of the libraries have what they need; before, growth says nothing."""
_MOST_GROWTH = 1.1
_MORE_FILES = 8
_PAGE_BYTES = 4096
_SETTLE_S = 3.0


@dataclass(frozen=True)
class State:
    """Resident memory and open files of a process; of Linux only."""

    resident_mb: float
    num_files: int

    @classmethod
    def of(cls, pid: int) -> Self:
        """As it is now."""
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        return cls(pages * _PAGE_BYTES / 1e6, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()))

    def grown_since(self, before: Self) -> list[str]:
        """What there is more of than before, in words."""
        found = []
        if self.resident_mb > _MOST_GROWTH * before.resident_mb:
            found.append(f"memory grew from {before.resident_mb:.0f} to {self.resident_mb:.0f} MB")
        if self.num_files > before.num_files + _MORE_FILES:
            found.append(f"open files grew from {before.num_files} to {self.num_files}")
        return found


async def speaks_still(server: RunningServer) -> bool:
    """Whether it recognises a clip, once what was left half done has settled."""
    await asyncio.sleep(_SETTLE_S)
    found = await first_blocks(server.url, speech_blocks(2.0))
    return any(is_final and text for _, is_final, text in found)
