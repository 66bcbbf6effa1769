"""Forced alignment of tokens with the CTC output, and cut points between words. Pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from u2moe.runtime.text.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class AlignedToken:
    """One token of the most probable alignment.

    Attributes:
        token: token id.
        start: first encoder frame of the token.
        end: the frame after its last one.
        peak: the frame where it is most probable; the first of several.
        confidence: its probability there.
    """

    token: int
    start: int
    end: int
    peak: int
    confidence: float


def align(log_probs: npt.NDArray[np.float32], tokens: Sequence[int], blank: int = 0) -> list[AlignedToken] | None:
    """The most probable CTC alignment of `tokens`.

    Takes time * len(tokens) steps and bytes. Of equally probable alignments it is the one that stays longest.

    Args:
        log_probs: [time, vocab].
        tokens: token ids, none of them blank.
        blank: id of the blank token.

    Returns:
        A span for each token, in order and without overlap; None if no alignment is possible, for example because there
        are too few frames.

    Raises:
        ValueError: tokens that are blank or outside the vocabulary.
    """
    if any(token == blank or not 0 <= token < log_probs.shape[1] for token in tokens):
        raise ValueError(f"tokens must be ids below {log_probs.shape[1]} and not blank {blank}, got {list(tokens)}")
    if not tokens:
        return []
    states = np.full(2 * len(tokens) + 1, blank)
    states[1::2] = tokens
    path = _best_path(log_probs, states)
    if path is None:
        return None
    aligned = []
    for index, token in enumerate(tokens):
        frames = np.flatnonzero(path == 2 * index + 1)
        start, end = int(frames[0]), int(frames[-1]) + 1
        peak = start + int(log_probs[start:end, token].argmax())
        confidence = min(float(np.exp(log_probs[peak, token])), 1.0)
        aligned.append(AlignedToken(token=token, start=start, end=end, peak=peak, confidence=confidence))
    return aligned


def find_cut(
    vocabulary: Vocabulary, tokens: Sequence[int], log_probs: npt.NDArray[np.float32], blank: int = 0
) -> int | None:
    """Where to cut an utterance that continues: in the longest pause between two words in its second half.

    Args:
        vocabulary: groups tokens into words.
        tokens: the tokens recognised so far.
        log_probs: [time, vocab] of the utterance.
        blank: id of the blank token.

    Returns:
        Number of frames before the cut, which splits no word of the most probable alignment; None if there are not two
        words to cut between.
    """
    words = vocabulary.words(tokens)
    aligned = align(log_probs, tokens, blank)
    if aligned is None:
        return None
    pauses = [(aligned[word.end - 1].end, aligned[following.begin].start) for word, following in pairwise(words)]
    late = [pause for pause in pauses if sum(pause) >= len(log_probs)] or pauses[-1:]
    if not late:
        return None
    end, start = max(late, key=lambda pause: (pause[1] - pause[0], pause))
    return (end + start + 1) // 2


def _best_path(log_probs: npt.NDArray[np.float32], states: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """State of each frame [time] on the best path through `states`: blank, token, blank, token, ..., blank."""
    num_frames, num_states = len(log_probs), len(states)
    # Blank may be left out between two different tokens.
    may_skip = np.zeros(num_states, bool)
    may_skip[3::2] = states[3::2] != states[1:-2:2]
    steps = np.zeros((num_frames, num_states), np.int8)
    # Two impossible states in front simplify the recursion. Paths begin in the first blank, before the first frame.
    scores = np.full(num_states + 2, -np.inf)
    scores[2] = 0.0
    emissions = log_probs[:, states].astype(np.float64)
    for frame in range(num_frames):
        arrivals = np.stack([scores[2:], scores[1:-1], np.where(may_skip, scores[:-2], -np.inf)])
        steps[frame] = arrivals.argmax(axis=0)
        scores[2:] = arrivals.max(axis=0) + emissions[frame]
    last = num_states - 2 if num_frames and scores[-2] >= scores[-1] else num_states - 1
    if not scores[2 + last] > -np.inf:
        return None
    path = np.empty(num_frames, np.int64)
    for frame in range(num_frames - 1, -1, -1):
        path[frame] = last
        last -= int(steps[frame, last])
    return path
