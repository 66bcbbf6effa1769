"""Processor cores that this process may use, by affinity and by the quota of its container."""

from __future__ import annotations

import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> list[int]:
    """Numbers of the cores that this process may run on; all where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def num_cores(quota: Path = _QUOTA) -> int:
    """How many of them can be kept busy: in a container with a quota fewer than it sees; at least 1."""
    count = len(usable_cores())
    try:
        allowed, period = quota.read_text(encoding="ascii").split()
        count = min(count, math.ceil(int(allowed) / int(period)))
    except (OSError, ValueError):  # no quota ("max"), or no container
        pass
    return max(count, 1)


def cores_of(worker: int, num_workers: int, num_threads: int) -> list[int] | None:
    """The cores to which a worker is pinned, or None: it is not pinned.

    Workers are pinned where they fill all cores that this process may use. Where they do not, something else may use
    them too, such as another container that would choose the same cores.
    """
    cores = usable_cores()
    if len(cores) != num_workers * num_threads or len(cores) > num_cores() or not hasattr(os, "sched_setaffinity"):
        return None
    return cores[worker * num_threads : (worker + 1) * num_threads]
