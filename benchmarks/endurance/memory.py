"""Resident memory of this process, and whether it grows."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

_MOST_GROWTH = 1.1
"""Ratio of the memory at the end to that after a tenth of the time above which it counts as growing."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident megabytes of the process after a tenth of a run, and at its end. They should be about equal."""

    start_mb: float
    end_mb: float

    @property
    def grew(self) -> bool:
        """Whether there is significantly more at the end."""
        return self.end_mb > _MOST_GROWTH * self.start_mb


def resident_mb() -> float:
    """Resident memory of this process in megabytes; 0 except on Linux."""
    gc.collect()
    status = Path("/proc/self/statm")
    return int(status.read_text(encoding="ascii").split()[1]) * 4096 / 1e6 if status.exists() else 0.0
