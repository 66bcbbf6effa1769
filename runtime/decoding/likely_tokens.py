"""The most probable tokens of each frame, for searches."""

import numpy as np
import numpy.typing as npt

_NUM_BLOCKS = 8
"""The vocabulary is divided into this many blocks per wanted token."""


def most_probable(
    log_probs: npt.NDArray[np.float32], num: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the most probable tokens of each frame and their scores, both [time, min(num, vocab)].

    The best token comes first. Of tokens with equal scores, the lower id comes first.
    """
    num_frames, vocab = log_probs.shape
    num = min(num, vocab)
    width = max(vocab // (_NUM_BLOCKS * num), 1)
    num_blocks = vocab // width
    peaks = log_probs[:, : width * num_blocks].reshape(num_frames, width, num_blocks).max(axis=1)
    if np.isnan(peaks.max()) or np.isnan(log_probs[:, width * num_blocks :]).any():
        raise ValueError("log_probs contain NaN")
    # A peak is the highest score in a block. The `num` highest peaks belong to different tokens, so at least `num`
    # tokens score no lower than the lowest of these peaks. Usually, only a few more tokens do.
    least = np.partition(peaks, num_blocks - num, axis=1)[:, num_blocks - num, np.newaxis]
    places = np.flatnonzero(log_probs >= least)
    frames, scores = places // vocab, log_probs.reshape(-1)[places]
    order = np.lexsort((-scores, frames))
    firsts = order[np.searchsorted(frames, np.arange(num_frames))[:, np.newaxis] + np.arange(num)]
    return places[firsts] % vocab, scores[firsts]
