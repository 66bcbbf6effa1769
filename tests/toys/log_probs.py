"""Random log-probabilities in the form of a CTC head's output."""

import numpy as np


def log_softmax(scores):
    scores = np.asarray(scores, np.float64)
    return (scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))).astype(np.float32)


def random_log_probs(seed, num_frames, vocab_size, scale=2.0):
    """Return [frames, vocabulary]; the larger `scale`, the more one token stands out in each frame."""
    return log_softmax(np.random.default_rng(seed).standard_normal((num_frames, vocab_size)) * scale)
