"""A small vocabulary, hotwords for it, and random log-probabilities in the form of a CTC head's output."""

import numpy as np

from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

SYMBOLS = ["<blank>", "<unk>", "▁A", "A", "▁B", "B", "C", "▁", "▁CA", "中", "文", "D", "한", "É"]
HOTWORDS = "a b :2\nCab\n中 :3\n\u3000é 한d :1.25 \ncab :4"
VOCABULARY = Vocabulary(SYMBOLS, TextConfig(tokenizer="bpe"))


def log_softmax(scores):
    scores = np.asarray(scores, np.float64)
    return (scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))).astype(np.float32)


def random_log_probs(seed, num_frames, vocab_size, scale=2.0):
    """Return [frames, vocabulary]; the larger `scale`, the more one token stands out in each frame."""
    return log_softmax(np.random.default_rng(seed).standard_normal((num_frames, vocab_size)) * scale)


def random_frames(seed, num_frames):
    """Return log-probabilities [frames, symbols]: half of the frames are confident blanks, some have equal values."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 2, (num_frames, len(SYMBOLS))).round(1)
    scores[random.random(num_frames) < 0.5, 0] += 6
    return log_softmax(scores)
