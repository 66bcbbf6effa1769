import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from log_probs import random_log_probs

from u2moe.runtime.decoding import alignment
from u2moe.runtime.decoding.alignment import Aligner, align
from u2moe.runtime.decoding.ctc import ctc_greedy_search

OF_TORCHAUDIO = json.loads((Path(__file__).parent / "golden" / "alignments.json").read_text(encoding="utf-8"))


def collapse(path):
    return [token for token, _ in itertools.groupby(path) if token != 0]


def path_of(aligned, num_frames):
    path = [0] * num_frames
    for token in aligned:
        path[token.start : token.end] = [token.token] * (token.end - token.start)
    return path


@given(st.integers(0, 10_000), st.integers(0, 6), st.lists(st.integers(1, 2), max_size=4))
def test_it_is_the_best_of_all_alignments(seed, num_frames, tokens):
    log_probs = random_log_probs(seed, num_frames, 3, scale=3.0)

    def score(path):
        return sum(float(log_probs[frame, token]) for frame, token in enumerate(path))

    possible = [path for path in itertools.product(range(3), repeat=num_frames) if collapse(path) == tokens]
    aligned = align(log_probs, tokens)
    if not possible:
        assert aligned is None
        return
    path = path_of(aligned, num_frames)
    assert collapse(path) == tokens
    assert score(path) == pytest.approx(max(map(score, possible)))


@pytest.mark.parametrize("case", OF_TORCHAUDIO, ids=lambda case: str(len(case["path"])))
def test_it_is_that_of_torchaudio_which_wenet_uses(case):
    log_probs = random_log_probs(case["seed"], len(case["path"]), case["vocab_size"], scale=3.0)
    assert path_of(align(log_probs, case["tokens"]), len(log_probs)) == case["path"]


@given(st.integers(0, 10_000), st.integers(1, 60), st.lists(st.integers(1, 3), max_size=20), st.data())
def test_parts_and_blocks_make_no_difference(seed, num_frames, tokens, data):
    log_probs = random_log_probs(seed, num_frames, 4, scale=3.0)
    expected = align(log_probs, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "_BLOCK_LEN", data.draw(st.integers(1, 9)))
        patch.setattr(alignment, "_MOST_IN_MEMORY", data.draw(st.sampled_from([0, 1 << 20])))
        aligner, begin = Aligner(tokens, 4), 0
        while begin < num_frames:
            size = data.draw(st.integers(1, 25))
            aligner.advance(log_probs[begin : begin + size])
            begin += size
        assert aligner.finish() == expected
    if expected is None:
        assert aligner.num_needed > num_frames


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_the_greedy_result_aligns_where_it_was_found(seed, num_frames):
    log_probs = random_log_probs(seed, num_frames, 5, scale=3.0)
    greedy = ctc_greedy_search(log_probs)
    aligned = align(log_probs, greedy.tokens)
    assert [token.start for token in aligned] == greedy.times
    assert [token.token for token in aligned] == greedy.tokens
    for token, following in itertools.pairwise(aligned):
        assert token.start < token.end <= following.start
    for token in aligned:
        assert token.start <= token.peak < token.end <= num_frames
        assert token.confidence == pytest.approx(np.exp(log_probs[token.start : token.end, token.token].max()))


def test_blank_may_be_any_token_and_impossible_tokens_have_no_alignment():
    log_probs = random_log_probs(7, 20, 5, scale=3.0)
    order = [1, 2, 3, 4, 0]  # column of each old id
    moved = np.empty_like(log_probs)
    moved[:, order] = log_probs
    expected = align(log_probs, [1, 2, 2])
    assert [(t.start, t.end) for t in align(moved, [2, 3, 3], blank=1)] == [(t.start, t.end) for t in expected]
    log_probs = random_log_probs(1, 4, 3, scale=3.0)
    assert align(log_probs, [1, 1, 1]) is None
    log_probs[:, 2] = -np.inf
    assert align(log_probs, [2]) is None
    assert align(log_probs, []) == []
    assert align(log_probs[:0], [1]) is None


@pytest.mark.parametrize("tokens", [[0], [3], [-1]])
def test_tokens_that_cannot_be(tokens):
    with pytest.raises(ValueError, match="tokens must be ids below 3 other than blank 0"):
        align(random_log_probs(1, 4, 3, scale=3.0), tokens)
