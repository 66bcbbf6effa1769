"""Final results as data, and where those of two runtimes differ. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from u2moe.runtime import Result

Segment = Mapping[str, Any]
"""`text`, `tokens`, `times`, `words` as (word, start, end), `nbest` as tokens of each, `score`."""

ASPECTS = ("text", "tokens", "times", "words", "nbest")


def of_python(result: Result) -> Segment:
    """A segment from a result of the Python runtime."""
    return {
        "text": result.text,
        "tokens": result.tokens,
        "times": result.times,
        "words": [[word.word, word.start, word.end] for word in result.words],
        "nbest": [item.tokens for item in result.nbest],
        "score": result.score,
    }


def of_json(item: Mapping[str, Any]) -> Segment:
    """A segment from what the programs in other languages print."""
    return {
        "text": item["text"],
        "tokens": item["tokens"],
        "times": item["times"],
        "words": [[word["word"], word["start"], word["end"]] for word in item["words"]],
        "nbest": [alternative["tokens"] for alternative in item["nbest"]],
        "score": item["nbest"][0]["score"],
    }


def compared(expected: Sequence[Sequence[Segment]], found: Sequence[Sequence[Segment]]) -> dict[str, Any]:
    """Differences of the segments of all recordings.

    Returns:
        `num_recordings`; by aspect, the number of recordings that differ in it; `score`: the largest difference between
        scores of the best hypothesis, where its tokens are equal.
    """
    counts = dict.fromkeys(ASPECTS, 0)
    score = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        for aspect in ASPECTS:
            counts[aspect] += [item[aspect] for item in ours] != [item[aspect] for item in theirs]
        for one, other in zip(ours, theirs, strict=False):
            if one["tokens"] == other["tokens"]:
                score = max(score, abs(one["score"] - other["score"]))
    return {"num_recordings": len(expected), **counts, "score": round(score, 6)}
