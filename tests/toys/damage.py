"""Damage to bytes, and odd values: the building blocks of fuzz inputs, and a loop that tries them from seeds."""

import gc
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

ODD_VALUES = (
    None, True, False, -1, 0, 1, 2, 7, 10**9, 2**63, 10**400, 0.5, -0.5, 1e-9, 1e308, float("nan"), float("inf"), "",
    "x", "../tokens.txt", "/etc/passwd", "a\0b", "\ud800", [], {}, [[]], {"x": {}},
)  # fmt: skip
"""Values of all JSON types."""
NUM_INPUTS = int(os.environ.get("U2MOE_TEST_INPUTS", "3000"))
"""Number of inputs of each kind for `make check-all`."""


def tried(use, refusals, count, folder):
    """Count inputs that were "refused" with a documented error, or by the result of `use`. The seed of the last input
    stays in `folder` in case it ends the process. Any other error is raised with its seed."""
    outcomes, early_mb = Counter(), 0.0
    for seed in range(count):
        (folder / "seed").write_text(str(seed), encoding="ascii")
        try:
            with warnings.catch_warnings(action="ignore"):
                outcomes[use(np.random.default_rng(seed))] += 1
        except refusals:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: not a documented error") from error
        if seed == count // 5:
            early_mb = resident_mb()
    if count >= 1000:  # earlier, caches still fill
        assert resident_mb() < 1.3 * early_mb + 20
    return outcomes


def resident_mb():
    """Return the resident memory of this process in megabytes; 0 except on Linux."""
    gc.collect()
    file = Path("/proc/self/statm")
    return int(file.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if file.exists() else 0.0


def one_of(values, random):
    return values[random.integers(len(values))]


def place_in(content, random):
    """Return a mapping anywhere in nested mappings, and one of its keys."""
    while True:
        key = one_of(list(content), random)
        if not isinstance(content[key], dict) or not content[key] or random.random() < 0.1:
            return content, key
        content = content[key]


def damaged(content, random):
    """Truncate, overwrite, insert, remove or repeat bytes; half of the time among the first hundred."""
    data = bytearray(content)
    for _ in range(random.integers(1, 4)):
        place = random.integers(0, (len(data) if random.random() < 0.5 else min(100, len(data))) + 1)
        length, action = int(2 ** random.uniform(0, 12)), random.integers(5)
        if action == 0:
            del data[place:]
        elif action == 1:
            data[place : place + length] = random.bytes(len(data[place : place + length]))
        elif action == 2:
            data[place:place] = random.bytes(length)
        elif action == 3:
            del data[place : place + length]
        else:
            for bit in random.integers(0, 8, random.integers(1, 9)) if data else ():
                data[random.integers(len(data))] ^= 1 << bit
    return bytes(data)
