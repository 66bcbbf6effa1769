"""Forced alignment of tokens with the CTC output, and cut points between words."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from u2moe.runtime.text.vocabulary import Vocabulary

_BLOCK_LEN = 2048
"""Encoder frames per block. Scores are stored once per block; tracing a path recomputes the scores in between."""
_MOST_IN_MEMORY = 1 << 26
"""Bytes of scores and log-probabilities kept in memory. The rest goes to a temporary file."""


@dataclass(frozen=True, kw_only=True)
class AlignedToken:
    """A token of the most probable alignment: its encoder frames from `start` to `end` (exclusive).

    `peak` is the first frame at which the token is most probable, and `confidence` its probability there.
    """

    token: int
    start: int
    end: int
    peak: int
    confidence: float


class Aligner:
    """Finds the most probable CTC alignment of a token sequence. Log-probabilities may arrive in parts of any length.

    The search is exact (Viterbi), even for long recordings. Its time grows with the product of frames and tokens.
    Only the log-probabilities of the sequence's tokens and the scores of every 2048th frame are stored. Data beyond
    64 MB goes to a temporary file.

    Attributes:
        num_frames: number of frames so far.
        num_needed: minimum number of frames: one for each token, and one for the blank between two equal tokens.

    Raises:
        ValueError: a token is blank or outside the vocabulary.
    """

    def __init__(self, tokens: Sequence[int], vocab_size: int, blank: int = 0) -> None:
        if any(token == blank or not 0 <= token < vocab_size for token in tokens):
            raise ValueError(f"tokens must be ids below {vocab_size} other than blank {blank}, got {list(tokens)}")
        self.num_frames = 0
        self._tokens = np.asarray(tokens, np.int64)
        # The first of the kept columns is the blank.
        kept, columns = np.unique(self._tokens, return_inverse=True)
        self._kept, self._columns = np.concatenate([[blank], kept]), columns + 1
        # Blank is optional between two different tokens.
        self._skip = np.where(np.diff(self._tokens, prepend=blank) != 0, 0.0, -np.inf)
        self._skip[:1] = -np.inf
        self.num_needed = len(self._tokens) + int(np.isneginf(self._skip[1:]).sum())
        # Scores of paths that end in a blank (one before each token and one after the last), and of paths that end in
        # a token. All paths begin in the first blank, before the first frame.
        self._blanks = np.full(len(self._tokens) + 1, -np.inf)
        self._blanks[0] = 0.0
        self._ends = np.full(len(self._tokens), -np.inf)
        self._waiting = [np.zeros((0, len(self._kept)), np.float32)]
        self._blocks = tempfile.SpooledTemporaryFile(max_size=_MOST_IN_MEMORY)  # noqa: SIM115 - closed by the finalizer
        weakref.finalize(self, self._blocks.close)

    def advance(self, log_probs: npt.NDArray[np.float32]) -> None:
        """Add frames, given their log-probabilities [time, vocab]."""
        self.num_frames += len(log_probs)
        self._waiting.append(log_probs[:, self._kept])
        if self.num_frames // _BLOCK_LEN > (self.num_frames - len(log_probs)) // _BLOCK_LEN:
            frames = np.concatenate(self._waiting)
            while len(frames) >= _BLOCK_LEN:
                self._search(frames[:_BLOCK_LEN])
                frames = frames[_BLOCK_LEN:]
            self._waiting = [frames]

    def finish(self) -> list[AlignedToken] | None:
        """Return the tokens in order, with spans that do not overlap; None if no alignment is possible."""
        self._search(np.concatenate(self._waiting))
        if not len(self._tokens):
            return []
        if not max(self._ends[-1], self._blanks[-1]) > -np.inf:
            return None
        path, log_probs = self._trace()
        # State 2 i is the blank before token i, and state 2 i + 1 is the token.
        starts = np.searchsorted(path, 2 * np.arange(len(self._tokens)) + 1)
        ends = np.searchsorted(path, 2 * np.arange(len(self._tokens)) + 2)
        aligned = []
        for token, start, end in zip(self._tokens.tolist(), starts.tolist(), ends.tolist(), strict=True):
            peak = start + int(log_probs[start:end].argmax())
            confidence = min(float(np.exp(log_probs[peak])), 1.0)
            aligned.append(AlignedToken(token=token, start=start, end=end, peak=peak, confidence=confidence))
        return aligned

    def _search(self, frames: npt.NDArray[np.float32]) -> None:
        """Store the scores and a block of frames [time, kept]; then advance the scores over the block."""
        for part in (self._blanks, self._ends, np.ascontiguousarray(frames, np.float32)):
            self._blocks.write(part.tobytes())
        _viterbi(self._blanks, self._ends, frames.astype(np.float64), self._columns, self._skip)

    def _trace(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Trace back the best path; return its state and log-probability in each frame, both [time]."""
        num_tokens, num_kept = len(self._tokens), len(self._kept)
        path, found = np.empty(self.num_frames, np.int64), np.empty(self.num_frames, np.float32)
        state = 2 * num_tokens - 1 if self._ends[-1] >= self._blanks[-1] else 2 * num_tokens
        scores_len = 8 * (2 * num_tokens + 1)
        block_size = scores_len + 4 * _BLOCK_LEN * num_kept
        for number in range((self.num_frames - 1) // _BLOCK_LEN, -1, -1):
            begin = number * _BLOCK_LEN
            num_frames = min(self.num_frames - begin, _BLOCK_LEN)
            self._blocks.seek(number * block_size)
            scores = np.frombuffer(self._blocks.read(scores_len))
            frames = np.frombuffer(self._blocks.read(4 * num_frames * num_kept), np.float32).reshape(-1, num_kept)
            # A path passes at most one token per frame, so it cannot reach earlier tokens in this block.
            first, last = max(state // 2 - num_frames, 0), min(state // 2 + 1, num_tokens)
            blanks, ends = scores[first : last + 1].copy(), scores[num_tokens + 1 :][first:last].copy()
            columns, skip = self._columns[first:last], self._skip[first:last].copy()
            if first:
                skip[0] = -np.inf
            steps = np.empty((num_frames, 2 * (last - first) + 1), np.int8)
            _viterbi(blanks, ends, frames.astype(np.float64), columns, skip, steps)
            for frame in range(num_frames - 1, -1, -1):
                path[begin + frame] = state
                found[begin + frame] = frames[frame, self._columns[state // 2] if state % 2 else 0]
                state -= int(steps[frame, state - 2 * first])
        return path, found


def align(log_probs: npt.NDArray[np.float32], tokens: Sequence[int], blank: int = 0) -> list[AlignedToken] | None:
    """Return `tokens` aligned with log-probabilities [time, vocab]; None if no alignment is possible. See `Aligner`."""
    aligner = Aligner(tokens, log_probs.shape[1], blank)
    aligner.advance(log_probs)
    return aligner.finish()


def find_cut(
    vocabulary: Vocabulary, tokens: Sequence[int], log_probs: npt.NDArray[np.float32], blank: int = 0
) -> int | None:
    """Find where to cut an utterance: in the longest pause between two words in the utterance's second half.

    If there is no pause in that half, cut in the last pause. `tokens` are those recognised so far, and `log_probs`
    [time, vocab] those of the utterance. Returns the number of frames before the cut; None if there are fewer than two
    words, or if no alignment is possible.
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


def _viterbi(
    blanks: npt.NDArray[np.float64],
    ends: npt.NDArray[np.float64],
    frames: npt.NDArray[np.float64],
    columns: npt.NDArray[np.int64],
    skip: npt.NDArray[np.float64],
    steps: npt.NDArray[np.int8] | None = None,
) -> None:
    """Advance the scores `blanks` and `ends` over `frames` [time, kept], in place.

    `blanks` are scores of paths that end in the blank before each token or after the last one. `ends` are scores of
    paths that end in a token. `columns` are the columns of the tokens in `frames`. `skip` is 0 for a token that may
    follow the previous token without a blank, else -inf. States alternate between blank and token.
    `steps` [time, 2 * tokens + 1] receives, for each frame, by how many states the best path to each state advances.
    """
    before = np.full(len(ends), -np.inf)
    for number, frame in enumerate(frames):
        before[1:] = ends[:-1]
        before += skip
        if steps is not None:
            steps[number, 0] = 0
            steps[number, 1::2] = np.stack([ends, blanks[:-1], before]).argmax(axis=0)
            steps[number, 2::2] = ends > blanks[1:]
        np.maximum(before, blanks[:-1], out=before)
        np.maximum(blanks[1:], ends, out=blanks[1:])
        blanks += frame[0]
        np.maximum(ends, before, out=ends)
        ends += frame[columns]
