"""Size and damage of each choice that a search evaluated, as text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from u2moe.quantize.picture import bar_picture

Front = Sequence[Mapping[str, Any]]
"""Choices ordered by size. Each has `bytes`, `divergence` in nats per frame, `at_most`, and `written` (whether a bundle
was written). `at_most` is the upper limit of the interval for the share of changed tokens. A choice is allowed if
`--max-damage` is at least `at_most`."""


def describe_front(front: Front) -> list[str]:
    """Return a table as lines: each choice with its size, divergence and smallest `--max-damage` that allows it."""
    head = "choices of the search: size, divergence, and the smallest --max-damage that allows them"
    lines = []
    for point in front:
        share = ("" if point["written"] else "about ") + f"{point['at_most']:.2%}"
        lines.append(f"{point['bytes'] / 1e6:9.2f} MB {point['divergence']:12.5f} nats per frame {share:>15}")
    return [head, *lines] if lines else []


def front_picture(front: Front, limit: float | None) -> str:
    """Draw a bar for each choice's share of changed tokens, in the order of `front`, and one for the limit."""
    rows = []
    for point in front:
        bar = (0 if point["written"] else 1, 100 * point["at_most"], f"{point['at_most']:.2%}")
        rows.append((f"{point['bytes'] / 1e6:.2f} MB", [bar]))
    if limit is not None:
        rows.append(("limit", [(2, 100 * limit, f"{limit:.2%}")]))
    title = "changed tokens in %, upper limit of the interval, by total file size"
    return bar_picture(title, ["written and compared", "estimated from the divergence", "--max-damage"], rows)
