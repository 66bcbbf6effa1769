"""The damage of layers as a picture: SVG, for browsers and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from u2moe.quantize.arithmetic import NOTHING

LINE, LEFT, WIDTH = 16, 330, 460
COLOURS = ("#e8a33d", "#4c78a8")
"""Of the lowest format and of the one above it."""


def damage_picture(damage: Mapping[str, Any]) -> str:
    """A bar for what each layer costs alone, in each format, in the order of the network.

    Args:
        damage: the report's, with the names of `formats`.
    """
    layers, formats = damage["layers"], damage["formats"]
    most = max([NOTHING, *(item["alone"][-1] for item in layers)])
    lines = []
    for row, item in enumerate(layers):
        y = LINE * (row + 2)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(item["layer"])}</text>')
        for alone, colour in zip(reversed(item["alone"][1:]), COLOURS, strict=False):
            width = round(WIDTH * max(alone, 0) / most, 1)
            lines.append(f'<rect x="{LEFT}" y="{y + 2}" width="{width}" height="{LINE - 4}" fill="{colour}"/>')
        notes = [f"{item['alone'][-1]:.4f}"]
        notes += [f"outliers: {', '.join(map(str, found))}" for found in item["outliers"].values()]
        notes += [f"now {step['format']}" for step in damage.get("steps", []) if step["layer"] == item["layer"]]
        x = LEFT + 6 + round(WIDTH * max(item["alone"][-1], 0) / most)
        lines.append(f'<text x="{x}" y="{y + 12}" fill="#666">{escape("; ".join(notes))}</text>')
    title = f"divergence of each layer alone in {' and '.join(reversed(formats[1:]))}, nats"
    size = f'width="{LEFT + WIDTH + 320}" height="{LINE * (len(layers) + 3)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n<text x="{LEFT}" y="{LINE}">{escape(title)}</text>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )
