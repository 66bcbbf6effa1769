"""Small random n-gram models as ARPA text, and their probabilities by definition."""

import itertools
import math

import numpy as np


def random_arpa(seed, words, order, *, share=0.4, markers=("<s>", "</s>", "<unk>"), positive_backoffs=False):
    """Return a model that contains each n-gram with a known beginning with probability `share`; values are random."""
    random = np.random.default_rng(seed)
    ngrams = [[(word,) for word in (*markers, *words)]]
    for _ in range(order - 1):
        longer = (
            (*ngram, word)
            for ngram, word in itertools.product(ngrams[-1], (*words, "</s>"))
            if "</s>" not in ngram and "<unk>" not in ngram[1:]
        )
        ngrams.append([ngram for ngram in longer if ngram[-1] in {*markers, *words} and random.random() < share])
    lines = ["\\data\\", *(f"ngram {length}={len(rows)}" for length, rows in enumerate(ngrams, 1))]
    for length, rows in enumerate(ngrams, 1):
        lines += ["", f"\\{length}-grams:"]
        for row in random.permutation(len(rows)):
            backoff = random.uniform(-1, 0.3 if positive_backoffs else 0) * (random.random() < 0.8)
            end = f"\t{backoff:.6f}" if length < order else ""
            lines.append(f"{random.uniform(-3, -0.01):.6f}\t{' '.join(rows[row])}{end}")
    return "\n".join([*lines, "", "\\end\\", ""])


class Definition:
    """P(word | history) of a text by `random_arpa`, following the definition word for word."""

    def __init__(self, arpa):
        self.log_probs, self.backoffs = {}, {}
        for log_prob, words, *backoff in (line.split("\t") for line in arpa.splitlines() if "\t" in line):
            self.log_probs[tuple(words.split())] = float(log_prob)
            self.backoffs[tuple(words.split())] = float(*backoff)
        self.order = max(map(len, self.log_probs))

    def log10(self, history, word):
        history = tuple(history)[-(self.order - 1) :] if self.order > 1 else ()
        if (*history, word) in self.log_probs:
            return self.log_probs[(*history, word)]
        return self.backoffs.get(history, 0.0) + self.log10(history[1:], word)

    def score(self, words, *, weight, word_bonus, unknown_score):
        """Return the score that a search adds for a finished, non-empty hypothesis."""
        total, history = 0.0, ["<s>"]
        for word in words:
            known = (word,) in self.log_probs
            total += weight * math.log(10) * min(self.log10(history, word if known else "<unk>"), 0)
            total += word_bonus + (0.0 if known else weight * unknown_score)
            history.append(word if known else "<unk>")
        return total + weight * math.log(10) * min(self.log10(history, "</s>"), 0)
