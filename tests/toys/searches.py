"""A small vocabulary, hotwords for it, and random log-probabilities."""

import numpy as np
from log_probs import log_softmax

from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

SYMBOLS = ["<blank>", "<unk>", "▁A", "A", "▁B", "B", "C", "▁", "▁CA", "中", "文", "D", "한", "É"]
HOTWORDS = "a b :2\nCab\n中 :3\n\u3000é 한d :1.25 \ncab :4"
VOCABULARY = Vocabulary(SYMBOLS, TextConfig(tokenizer="bpe"))


def random_frames(seed, num_frames):
    """Return log-probabilities [frames, symbols]: half of the frames are confident blanks, some have equal values."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 2, (num_frames, len(SYMBOLS))).round(1)
    scores[random.random(num_frames) < 0.5, 0] += 6
    return log_softmax(scores)
