"""SVG bar charts for reports, with an axis and a legend. Independent of ONNX."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

LINE, LEFT, WIDTH, NOTES = 16, 330, 460, 320  # pixels: height of a row, left margin, longest bar, right margin
NUM_TICKS = 4
COLOURS = ("#e8a33d", "#4c78a8", "#54a24b", "#b279a2", "#9d755d", "#e45756", "#72b7b2", "#bab0ac")
"""Colours of series, in turn."""

Bar = tuple[int, float, str]  # number of the series, value, and a note to the right of the bar


def bar_picture(title: str, series: Sequence[str], rows: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Return an SVG bar chart with labelled rows of bars. `title` names the quantity and its unit."""
    begin = y = LINE * (len(series) + 3)
    most = max([value for _, bars in rows for _, value, _ in bars if value > 0], default=1.0)
    lines = [_text(LEFT, LINE, title)]
    for number, name in enumerate(series):
        lines += [_box(LEFT, LINE * (number + 2) - 11, 12, number), _text(LEFT + 20, LINE * (number + 2), name)]
    for label, bars in rows:
        lines.append(_text(LEFT - 8, y + LINE * (len(bars) + 1) / 2 - 4, label, "end"))
        for number, value, note in bars:
            width = round(WIDTH * max(value, 0.0) / most, 1)
            lines += [_box(LEFT, y + 2, width, number), _text(LEFT + width + 6, y + 12, note)]
            y += LINE
        y += LINE // 4
    for tick in range(NUM_TICKS + 1):
        x = LEFT + WIDTH * tick // NUM_TICKS
        lines.append(f'<path d="M{x} {begin}V{y}" stroke="#ccc"/>')
        lines.append(_text(x, y + 12, f"{most * tick / NUM_TICKS:.2g}", "middle"))
    size = f'width="{LEFT + WIDTH + NOTES}" height="{y + 2 * LINE}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>\n"])


def _text(x: float, y: float, content: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(content)}</text>'


def _box(x: float, y: float, width: float, number: int) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{LINE - 4}" fill="{COLOURS[number % len(COLOURS)]}"/>'
