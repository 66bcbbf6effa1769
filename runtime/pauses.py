"""Where an utterance is quiet, and how that bounds its words: CTC gives the peaks of words, not their edges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from u2moe.runtime.result import LONGEST_TOKEN_S

_MIN_PAUSE_S = 0.08
"""Shorter silences are the closures of stop consonants, within words."""
_POWER = 0.25
_QUIETEST = 12.0
"""Nats of energy below the loud parts (52 dB) under which differences of silence mean nothing."""
_QUIET = 0.2
"""Quiet is the lowest fifth of the range from the floor to the loud parts."""
_MIN_BEFORE_PAUSE_S = 0.2
"""A recording is not cut in a pause that begins sooner: nothing precedes it."""

Span = tuple[float, float]
"""Start and end in seconds."""


def loudness(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Loudness [frames] of log-mel features [frames, mel], as if it were energy: its logarithm.

    As in Stevens' law of perceived loudness it sums powers of the energies of bands, so that hum, which fills
    few of them, counts less.
    """
    levels: npt.NDArray[np.float32] = np.log(np.exp(_POWER * features).mean(axis=1)) / np.float32(_POWER)
    return levels


def find_pauses(levels: npt.NDArray[np.float32], frame_s: float) -> list[Span]:
    """Quiet stretches among the frames of an utterance, from its first.

    Args:
        levels: loudness [frames].
        frame_s: seconds from one of them to the next.
    """
    if not len(levels):
        return []
    loud = float(np.percentile(levels, 99))
    floor = max(float(np.percentile(levels, 10)), loud - _QUIETEST)
    quiet = levels < floor + _QUIET * (loud - floor)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], quiet, [False]))))
    pauses = (edges.reshape(-1, 2) * frame_s).tolist()
    return [(start, end) for start, end in pauses if end - start >= _MIN_PAUSE_S - 1e-9]


def first_pause(levels: npt.NDArray[np.float32], frame_s: float, min_pause_s: float, after_s: float) -> Span | None:
    """The first pause after some audio that lasts `min_pause_s` and whose middle is later than `after_s`.

    Args:
        levels: loudness [frames].
        frame_s: seconds from one of them to the next.
        min_pause_s: how long it must last, as far as it is among the frames.
        after_s: seconds from the first frame.
    """
    pauses = find_pauses(levels, frame_s)
    long = (pause for pause in pauses if pause[1] - pause[0] >= min_pause_s - 1e-9 and pause[0] >= _MIN_BEFORE_PAUSE_S)
    return next((pause for pause in long if sum(pause) / 2 > after_s), None)


def end_at_pauses(words: Sequence[Span], peaks: Sequence[Span], pauses: Sequence[Span]) -> list[Span]:
    """Let words end where a pause begins, and begin where it ends: the longest one between the peaks of two words.

    They stay as they are without a pause, and where it is so far from the peak that other speech lies in between.

    Args:
        words: start and end of each, in order.
        peaks: where the first and the last token of each peak.
        pauses: in order, on the same clock.
    """
    starts, ends = [start for start, _ in words], [end for _, end in words]
    for place in range(len(words) + 1):
        before = peaks[place - 1][1] if place else -np.inf
        after = peaks[place][0] if place < len(words) else np.inf
        earliest = starts[place - 1] if place else -np.inf
        latest = ends[place] if place < len(words) else np.inf
        # A token may peak a little after its word, or before: in the pause itself.
        between = [
            (start, end)
            for start, end in pauses
            if end >= before and start <= after and start > earliest and end < latest
        ]
        if not between:
            continue
        start, end = max(between, key=lambda pause: pause[1] - pause[0])
        if place and start - max(before, earliest) <= LONGEST_TOKEN_S:
            ends[place - 1] = start
        if place < len(words) and after - end <= LONGEST_TOKEN_S:
            starts[place] = end
        elif 0 < place < len(words):
            starts[place] = max(starts[place], ends[place - 1])
    return list(zip(starts, ends, strict=True))
