"""Spans of tokens and words in seconds, from the encoder frames at which tokens peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

from u2moe.runtime.result import WordResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from u2moe.runtime.text.vocabulary import Word

LONGEST_TOKEN_S = 1.0
"""Longest span of a token in seconds: it extends at most half of this from its peak."""


def token_spans(times: Sequence[int], frame_s: float, duration: float) -> list[tuple[float, float]]:
    """Start and end of each token in seconds, from the encoder frames at which they peak.

    As in WeNet's `gen_timestamps_from_peak`, tokens meet halfway between their peaks, but extend at most half a second
    from their own peak, and stay within the audio.
    """
    spans = []
    for index, time in enumerate(times):
        peak = time * frame_s
        start, end = peak - LONGEST_TOKEN_S / 2, peak + LONGEST_TOKEN_S / 2
        start = max(start, (times[index - 1] + time) / 2 * frame_s if index > 0 else 0.0)
        end = min(end, (time + times[index + 1]) / 2 * frame_s if index + 1 < len(times) else duration)
        spans.append((start, end))
    return spans


def words_of(
    words: Sequence[Word], spans: Sequence[tuple[float, float]], confidences: Sequence[float]
) -> list[WordResult]:
    """Words with their spans in seconds and their confidences."""
    return [
        WordResult(word=word.text, start=round(start, 3), end=round(end, 3), confidence=confidence)
        for word, (start, end), confidence in zip(words, spans, confidences, strict=True)
    ]
