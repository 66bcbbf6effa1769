"""Damage to bytes, and odd values: the building blocks of all fuzz inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 10**9, 2**63, 10**400, 0.5, -0.5, 1e-9, 1e308, float("nan"), float("inf"), "",
    "x", "../tokens.txt", "/etc/passwd", "a\0b", "\ud800", [], {}, [[]], {"x": {}},
)  # fmt: skip
"""Values of all JSON types."""


def one_of(values: Sequence[Any], random: np.random.Generator) -> Any:
    """One of the values."""
    return values[int(random.integers(len(values)))]


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """Bytes truncated, overwritten, inserted, removed or repeated; half of the time among the first hundred."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        end = len(data) if random.random() < 0.5 else min(100, len(data))
        place = int(random.integers(0, end + 1))
        length = int(2 ** random.uniform(0, 12))
        action = int(random.integers(5))
        if action == 0:
            del data[place:]
        elif action == 1:
            data[place : place + length] = random.bytes(len(data[place : place + length]))
        elif action == 2:
            data[place:place] = random.bytes(length)
        elif action == 3:
            del data[place : place + length]
        else:
            for bit in random.integers(0, 8, int(random.integers(1, 9))).tolist():
                if data:
                    data[int(random.integers(0, len(data)))] ^= 1 << bit
    return bytes(data)
