import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from searches import log_softmax, random_log_probs

from u2moe.runtime import ctc_greedy_search, ctc_prefix_beam_search
from u2moe.runtime.decoding.ctc import GreedySearch, PrefixBeamSearch, most_probable, penalize_blank


def test_searches_equal_wenet(golden):
    for utterance, mode, results in golden.cases():
        log_probs = golden.arrays[f"{utterance}/{mode}/ctc_logprobs"]
        greedy = ctc_greedy_search(log_probs)
        assert greedy.tokens == results["ctc_greedy_search"]["tokens"]
        assert greedy.times == results["ctc_peaks"]
        expected = results["ctc_prefix_beam_search"]
        hypotheses = ctc_prefix_beam_search(log_probs, 10)
        assert [h.tokens for h in hypotheses] == expected["nbest"]
        assert [h.times for h in hypotheses] == expected["nbest_times"]
        # WeNet also adds in double precision; only the order of rounding differs.
        np.testing.assert_allclose([h.score for h in hypotheses], expected["nbest_scores"], atol=1e-9)


@given(
    seed=st.integers(0, 2**32 - 1), time=st.integers(0, 60), vocab=st.integers(2, 12), beam_size=st.integers(1, 10),
    height=st.sampled_from([0.0, 3.0, 6.0, 12.0, 40.0]), step=st.sampled_from([0.0, 0.5, 2.0]),
    splits=st.lists(st.integers(0, 9), max_size=12), blank=st.integers(0, 11), penalty=st.sampled_from([0.0, 0.7, 9.0]),
)  # fmt: skip
def test_no_split_and_no_extension_that_is_not_tried_changes_anything(
    *, seed, time, vocab, beam_size, height, step, splits, blank, penalty
):
    """Equal to the last bit, also with equal scores and impossible tokens; and whatever token is the blank."""
    blank, random = blank % vocab, np.random.default_rng(seed)
    scores = random.standard_normal((time, vocab)) * 3
    scores[:, blank] += height * (random.random(time) < 0.8)
    log_probs = log_softmax(scores)
    if step:
        log_probs = np.round(log_probs / step).astype(np.float32) * np.float32(step)
        log_probs[log_probs < -10 * step] = -np.inf
    whole = PrefixBeamSearch(beam_size, blank, blank_penalty=penalty)
    for search in whole._searches:
        search._most_gain = search._most_bonus = 1e9
    whole.advance(log_probs)
    order = [blank, *(token for token in range(vocab) if token != blank)]
    first = ctc_prefix_beam_search(log_probs[:, order], beam_size, blank_penalty=penalty)
    assert step or [[order[token] for token in each.tokens] for each in first] == [h.tokens for h in whole.hypotheses()]
    greedy = ctc_greedy_search(log_probs, blank, blank_penalty=penalty)
    for search, expected in (
        (PrefixBeamSearch(beam_size, blank, blank_penalty=penalty), whole.hypotheses()),
        (GreedySearch(blank, blank_penalty=penalty), [greedy]),
    ):
        for part in np.split(log_probs, np.cumsum(splits).clip(0, time)):
            search.advance(part)
        assert search.hypotheses() == expected


@given(
    seed=st.integers(0, 2**32 - 1), vocab=st.integers(1, 400), num=st.integers(1, 12),
    kind=st.sampled_from(["different", "equal", "impossible"]),
)  # fmt: skip
def test_most_probable_tokens_are_the_first_of_a_sort(seed, vocab, num, kind):
    rng = np.random.default_rng(seed)
    num = min(num, vocab)
    log_probs = -rng.random((7, vocab), np.float32)
    if kind == "equal":
        log_probs = np.round(log_probs * 4) / 4
    elif kind == "impossible":
        log_probs[log_probs < -0.1] = -np.inf
    tokens, scores = most_probable(log_probs, num)
    assert np.array_equal(tokens, np.argsort(-log_probs, axis=1, kind="stable")[:, :num])
    assert np.array_equal(scores, np.take_along_axis(log_probs, tokens, axis=1))


@given(
    seed=st.integers(0, 2**32 - 1), penalty=st.floats(0, 10), blank=st.integers(0, 11),
    height=st.sampled_from([1.0, 5.0, 30.0]),
)  # fmt: skip
def test_a_penalty_of_the_blank_is_that_of_wenet(seed, penalty, blank, height):
    """WeNet's `ctc_logprobs` subtracts it from the blank's logit."""
    logits = np.random.default_rng(seed).normal(0, height, (30, 12)).astype(np.float32)
    wanted = logits.astype(np.float64)
    wanted[:, blank] -= penalty
    found = penalize_blank(log_softmax(logits).astype(np.float32), penalty, blank)
    # If blank is certain, float32 rounding of the other tokens grows with the penalty.
    limit = 1e-5 + 1.2e-7 * math.exp(penalty) + np.spacing(np.abs(log_softmax(wanted)).max().astype(np.float32)) * 4
    assert np.abs(found - log_softmax(wanted)).max() < limit
    assert found.dtype == np.float32


def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match="beam_size must be at least 1, got 0"):
        PrefixBeamSearch(0)
    with pytest.raises(ValueError, match=r"blank \(7\)"):
        ctc_greedy_search(np.zeros((1, 5), np.float32), blank=7)
    for shape in ((5,), (2, 3, 4), (2, 0)):
        with pytest.raises(ValueError, match="log_probs must be"):
            ctc_prefix_beam_search(np.zeros(shape, np.float32), 2)
    for vocab, token in ((5, 3), (200, 7), (299, 298), (299, 0)):
        log_probs = random_log_probs(0, 3, vocab)
        log_probs[1, token] = np.nan
        with pytest.raises(ValueError, match="NaN"):
            ctc_prefix_beam_search(log_probs, 2)


def test_long_utterances():
    log_probs = np.full((20_000, 3), -10.0, np.float32)
    log_probs[::2, 1] = log_probs[1::2, 2] = -1e-4
    assert len(ctc_prefix_beam_search(log_probs, 2)[0].tokens) == 20_000
