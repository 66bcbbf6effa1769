"""Times of tokens and words: spans around the peaks of CTC, and word boundaries moved to pauses in the audio."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.manifest import FeatureConfig
from u2moe.runtime.text.vocabulary import Word

_LONGEST_TOKEN_S = 1.0  # longest span of a token in seconds, at most half of it on either side of the peak
_MIN_PAUSE_S = 0.08  # shortest pause in seconds. Shorter silences are stop consonants within words
_POWER = 0.25
_QUIETEST = 12.0  # the floor of the loudness is at most this far below the loud parts, in nats of energy (52 dB)
_QUIET = 0.2  # frames in the lowest fifth of the range between the floor and the loud parts are quiet
_MIN_BEFORE_PAUSE_S = 0.2  # a recording is cut at a pause only if at least this many seconds of audio precede the pause

Span = tuple[float, float]
"""Start and end in seconds."""
_start_of, _end_of = itemgetter(0), itemgetter(1)


def loudness(features: npt.NDArray[np.float32], config: FeatureConfig) -> npt.NDArray[np.float32]:
    """Return the loudness [frames] of features [frames, size], on the scale of log energy.

    As in Stevens' law of perceived loudness, powers of the band energies are averaged. Hum, which fills few bands,
    therefore counts less. For MFCC, the loudness is the mean log energy, computed from the first coefficient.
    """
    if config.num_ceps:
        return features[:, 0] / np.float32(math.sqrt(config.num_mel_bins))
    levels: npt.NDArray[np.float32] = np.log(np.exp(_POWER * features).mean(axis=1))
    levels /= _POWER
    return levels


def find_pauses(levels: npt.NDArray[np.float32], frame_s: float) -> list[Span]:
    """Return the quiet stretches of an utterance, in seconds, given loudness [frames] every `frame_s` seconds."""
    if not len(levels):
        return []
    loud = float(np.percentile(levels, 99))
    floor = max(float(np.percentile(levels, 10)), loud - _QUIETEST)
    quiet = levels < floor + _QUIET * (loud - floor)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], quiet, [False]))))
    pauses = (edges.reshape(-1, 2) * frame_s).tolist()
    return [(start, end) for start, end in pauses if end - start >= _MIN_PAUSE_S - 1e-9]


def first_pause(levels: npt.NDArray[np.float32], frame_s: float, min_pause_s: float, after_s: float) -> Span | None:
    """Return the first pause that follows other audio and whose middle is after `after_s`; None if there is none.

    `levels` and `frame_s` as in `find_pauses`. The part of the pause within the frames has at least `min_pause_s`.
    """
    pauses = find_pauses(levels, frame_s)
    long = (pause for pause in pauses if pause[1] - pause[0] >= min_pause_s - 1e-9 and pause[0] >= _MIN_BEFORE_PAUSE_S)
    return next((pause for pause in long if sum(pause) / 2 > after_s), None)


def token_spans(times: Sequence[int], frame_s: float, duration: float) -> list[Span]:
    """Return the start and end of each token in seconds, given the encoder frames at which tokens peak.

    As in WeNet's `gen_timestamps_from_peak`, tokens meet halfway between their peaks, extend at most half a second from
    their own peak, and stay within the audio.
    """
    peaks = np.array(times) * frame_s
    middles = (np.array(times[:-1]) + np.array(times[1:])) / 2 * frame_s
    starts = np.maximum(peaks - _LONGEST_TOKEN_S / 2, [0.0, *middles])
    ends = np.minimum(peaks + _LONGEST_TOKEN_S / 2, [*middles, duration])
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def word_spans(
    words: Sequence[Word],
    times: Sequence[int],
    frame_s: float,
    pauses: Sequence[Span],
    *,
    start: int = 0,
    num_frames: int,
) -> list[Span]:
    """Return the start and end of each word in seconds, rounded to milliseconds. Boundaries are moved to pauses.

    Tokens peak at the encoder frames `times`, each of `frame_s` seconds. Frame 0 of `times` is frame `start` of the
    source, and `num_frames` frames from there is the end of the audio. `pauses` are in order, in seconds of the source.
    """
    begin, spans = start * frame_s, token_spans(times, frame_s, num_frames * frame_s)
    meeting = [(begin + spans[word.begin][0], begin + spans[word.end - 1][1]) for word in words]
    peaks = [(begin + times[word.begin] * frame_s, begin + times[word.end - 1] * frame_s) for word in words]
    return [(round(first, 3), round(last, 3)) for first, last in end_at_pauses(meeting, peaks, pauses)]


def end_at_pauses(words: Sequence[Span], peaks: Sequence[Span], pauses: Sequence[Span]) -> list[Span]:
    """Move word boundaries to the longest pause between the peaks of adjacent words.

    A word then ends where this pause begins, and the next word begins where the pause ends. A word's end or start is
    kept if there is no pause, or if the pause is so far from the word's peak that other speech must lie between them.
    `peaks` are those of the first and last token of each word. Words and pauses are in order.
    """
    starts, ends = [start for start, _ in words], [end for _, end in words]
    for place in range(len(words) + 1):
        before, earliest = (peaks[place - 1][1], starts[place - 1]) if place else (-math.inf, -math.inf)
        after, latest = (peaks[place][0], ends[place]) if place < len(words) else (math.inf, math.inf)
        # A token may peak slightly before or after its word, within the pause.
        near = pauses[bisect_left(pauses, before, key=_end_of) : bisect_right(pauses, after, key=_start_of)]
        between = [(start, end) for start, end in near if start > earliest and end < latest]
        if not between:
            continue
        start, end = max(between, key=lambda pause: pause[1] - pause[0])
        if place and start - max(before, earliest) <= _LONGEST_TOKEN_S:
            ends[place - 1] = start
        if place < len(words) and after - end <= _LONGEST_TOKEN_S:
            starts[place] = end
        elif 0 < place < len(words):
            starts[place] = max(starts[place], ends[place - 1])
    return list(zip(starts, ends, strict=True))
