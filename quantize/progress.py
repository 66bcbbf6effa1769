"""Progress of long work as lines of text: the finished share and the remaining time."""

import time
from collections.abc import Callable

Progress = Callable[[str], None]  # receives a line of text
BAR_WIDTH = 20
LEAST_SHARE = 0.1  # smallest share of the work between two lines of progress


def shares(progress: Progress, title: str) -> Callable[[float], None]:
    """Return a function that receives the finished share of the work and reports it with the remaining time."""
    begin, last = time.monotonic(), [0.0]

    def report(share: float) -> None:
        if share - last[0] >= LEAST_SHARE or share >= 1:
            last[0] = share
            left = round((time.monotonic() - begin) * (1 - share) / share)
            drawn = round(share * BAR_WIDTH)
            bar = "#" * drawn + "." * (BAR_WIDTH - drawn)
            progress(f"{title}: {bar} {share:4.0%}, {left // 60}:{left % 60:02} left")

    return report
