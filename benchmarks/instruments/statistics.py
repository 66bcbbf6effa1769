"""What is told of repeated measurements beside their spread; how they are made is the runtime's `measurement`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from u2moe.quantize.tuning.measurement import Spread, interleaved

__all__ = ["PERCENTILES", "Spread", "differs", "interleaved", "percentiles"]

PERCENTILES = (50, 90, 95, 99)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p95, p99 (linear between neighbours), the largest as max, and how many values there were."""
    if not values:
        raise ValueError("percentiles need at least one value")
    result = {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}
    return {**result, "max": float(max(values)), "count": len(values)}


def differs(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether two spreads, as they stand in JSON, differ by more than they spread: their quartiles do not overlap."""
    return bool(before["high"] < after["low"] or after["high"] < before["low"])
