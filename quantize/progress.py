"""Long work as lines of text: the share that is done, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable

BAR_WIDTH = 20
LEAST_SHARE = 0.1
"""Of the work, between two lines."""


def shares(progress: Callable[[str], None], title: str) -> Callable[[float], None]:
    """A function that reports a share of work that is done, with the time that is left."""
    begin, last = time.monotonic(), [0.0]

    def report(share: float) -> None:
        if share - last[0] >= LEAST_SHARE or share >= 1:
            last[0] = share
            left = round((time.monotonic() - begin) * (1 - share) / share)
            drawn = round(share * BAR_WIDTH)
            bar = "#" * drawn + "." * (BAR_WIDTH - drawn)
            progress(f"{title}: {bar} {share:4.0%}, {left // 60}:{left % 60:02} left")

    return report
