"""The sizes and the damage of the choices that a search met: which limit takes which size, as text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEFT, TOP, WIDTH, HEIGHT = 70, 40, 520, 320
NUM_TICKS = 5
KINDS = {True: ("written and compared", "#4c78a8"), False: ("estimated from the divergence", "#e8a33d")}
"""Of points, by whether they are `written`: their names in the legend, and colours."""

Front = Sequence[Mapping[str, Any]]
"""Choices by size: `bytes`, `divergence` in nats a frame, `at_most` (the upper end of the interval of the share of
tokens that change, which a limit must allow), and whether it was `written`."""


def describe_front(front: Front) -> list[str]:
    """A table: which limit takes which size."""
    lines = (
        ["choices that the search met: size, divergence, and the least --max-damage that allows them"] if front else []
    )
    for point in front:
        title = "" if point["written"] else "about "
        nats = f"{point['divergence']:.5f} nats a frame"
        lines.append(f"{point['bytes'] / 1e6:9.2f} MB {nats:>22} {title + format(point['at_most'], '.2%'):>15}")
    return lines


def front_picture(front: Front, limit: float | None) -> str:
    """Points of size and share of changed tokens, and a line at the limit."""
    sizes: list[float] = [point["bytes"] / 1e6 for point in front]
    shares: list[float] = [100 * point["at_most"] for point in front]
    margin = 0.05 * max(max(sizes) - min(sizes), 0.1 * max(sizes))
    first, last, most = min(sizes) - margin, max(sizes) + margin, 1.1 * max([100 * (limit or 0), *shares])

    def x(size: float) -> float:
        return round(LEFT + WIDTH * (size - first) / (last - first), 1)

    def y(share: float) -> float:
        return round(TOP + HEIGHT * (1 - share / most), 1)

    lines = []
    for number in range(NUM_TICKS + 1):
        size, share = first + (last - first) * number / NUM_TICKS, most * number / NUM_TICKS
        lines.append(f'<path d="M{LEFT} {y(share)}H{LEFT + WIDTH}" stroke="#ccc"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y(share) + 4}" text-anchor="end">{share:.3g}</text>')
        lines.append(f'<text x="{x(size)}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{size:.3g}</text>')
    points = " ".join(f"{x(size)},{y(share)}" for size, share in zip(sizes, shares, strict=True))
    lines.append(f'<polyline points="{points}" fill="none" stroke="#999"/>')
    for point, size, share in zip(front, sizes, shares, strict=True):
        lines.append(f'<circle cx="{x(size)}" cy="{y(share)}" r="5" fill="{KINDS[point["written"]][1]}"/>')
    for row, (name, colour) in enumerate(KINDS.values()):
        at = TOP + HEIGHT - 34 + 16 * row
        lines.append(f'<circle cx="{LEFT + WIDTH - 190}" cy="{at}" r="5" fill="{colour}"/>')
        lines.append(f'<text x="{LEFT + WIDTH - 180}" y="{at + 4}">{name}</text>')
    if limit is not None:
        allowed, end = y(100 * limit), LEFT + WIDTH
        lines.append(f'<path d="M{LEFT} {allowed}H{end}" stroke="#c33" stroke-dasharray="5"/>')
        lines.append(
            f'<text x="{end}" y="{allowed - 4}" text-anchor="end" fill="#c33">--max-damage {100 * limit:g}</text>'
        )
    middle = TOP + HEIGHT // 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{TOP + HEIGHT + 48}" '
        'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{LEFT}" y="20" font-size="13">Size and damage of the choices that the search met</text>\n'
        + "\n".join(lines)
        + f'\n<text x="{LEFT + WIDTH // 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">size of all files, MB</text>\n'
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
        "tokens that change, upper end of the interval, %</text>\n</svg>\n"
    )
