"""Prefix beam searches of other programs beside ours, on random log-probabilities."""

import numpy as np
import pytest
from log_probs import log_softmax

from u2moe.runtime import ContextGraph, parse_hotwords
from u2moe.runtime.decoding.ctc import PrefixBeamSearch
from u2moe.runtime.text.vocabulary import TextConfig, Vocabulary

SYMBOLS = ["<blank>", "<unk>", "▁A", "A", "▁B", "B", "C", "▁", "▁CA", "中", "文", "D", "한", "É"]
HOTWORDS = "a b :2\nCab\n中 :3\n\u3000é 한d :1.25 \ncab :4"
VOCABULARY = Vocabulary(SYMBOLS, TextConfig(tokenizer="bpe"))


def random_frames(seed, num_frames):
    """Log-probabilities [frames, symbols]: half of the frames are sure of blank, and some hold equal values."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 2, (num_frames, len(SYMBOLS))).round(1)
    scores[random.random(num_frames) < 0.5, 0] += 6
    return log_softmax(scores)


def search_cases():
    """Pairs of a beam size and log-probabilities."""
    return [(1 + index % 10, random_frames(index, 1 + 3 * index)) for index in range(40)]


def assert_same_searches(found, hotwords):
    """What another program found in `search_cases` is what ours finds.

    Args:
        found: for each case `partial`, the best tokens before the end of the input; `found`, hypotheses with `tokens`,
            `times`, `probabilities` and `scores` (with the bonus of hotwords, and that bonus); `words` of the best as
            [text, begin, end], and its `text`.
        hotwords: lines of hotwords, or nothing.
    """
    num_bonuses = 0
    for (size, frames), theirs in zip(search_cases(), found, strict=True):
        context = ContextGraph(parse_hotwords(hotwords), VOCABULARY) if hotwords else None
        search = PrefixBeamSearch(size, 0, context)
        search.advance(frames)
        assert theirs["partial"] == search.hypotheses(1)[0].tokens
        search.finish()
        ours = search.hypotheses()
        assert [item["tokens"] for item in theirs["found"]] == [item.tokens for item in ours]
        assert [item["times"] for item in theirs["found"]] == [item.times for item in ours]
        for one, other in zip(theirs["found"], ours, strict=True):
            # the same sums in double precision; exp and log1p of another library
            assert one["scores"] == pytest.approx([other.score, other.context_score], rel=1e-12, abs=1e-12)
            assert one["probabilities"] == pytest.approx(other.probabilities, rel=1e-12)
            num_bonuses += other.context_score > 0
        words = VOCABULARY.words(ours[0].tokens)
        assert theirs["words"] == [[word.text, word.begin, word.end] for word in words]
        assert theirs["text"] == VOCABULARY.text(ours[0].tokens)
    assert (num_bonuses > 20) == bool(hotwords)
