import numpy as np
import pytest

from u2moe.runtime.decoding.ctc import Hypothesis, ctc_prefix_beam_search
from u2moe.runtime.decoding.rescoring import attention_beam_search, attention_rescoring
from u2moe.runtime.model.model import TokenScores
from u2moe.runtime.options import RescoringWeights


def weights_of(mode):
    """Return 0.3 and 0.0 from "attention_rescoring ctc=0.3 rev=0.0"."""
    ctc, reverse = (float(part.split("=")[1]) for part in mode.split()[1:])
    return RescoringWeights(ctc_weight=ctc, reverse_weight=reverse)


def test_rescoring_equals_wenet(golden):
    num_compared = 0
    for utterance, mode, results in golden.cases():
        if mode != "full":
            continue
        hypotheses = ctc_prefix_beam_search(golden.arrays[f"{utterance}/full/ctc_logprobs"], 10)
        left, right = (golden.arrays[f"{utterance}/full/{name}"] for name in ("score", "r_score"))
        scores = TokenScores(left=left, right=right, next=np.zeros((0, 0), np.float32))
        for name, expected in results.items():
            if not name.startswith("attention_rescoring"):
                continue
            best = attention_rescoring(hypotheses, scores, weights_of(name))[0]
            assert best.hypothesis.tokens == expected["tokens"]
            assert best.hypothesis.times == expected["times"]
            # WeNet sums in single precision: 25 terms of about 10.
            assert best.score == pytest.approx(expected["score"], abs=1e-4)
            assert best.confidence == pytest.approx(expected["confidence"], rel=1e-4)
            np.testing.assert_allclose(best.token_confidences, expected["tokens_confidence"], rtol=1e-4)
            num_compared += 1
    assert num_compared == 24


def test_the_first_of_equals_wins_and_length_penalty_prefers_longer_sequences():
    hypotheses = [Hypothesis(tokens=[i], score=-float(i), times=[0]) for i in range(4)]
    left = np.array([[-1, -1], [-0.5, -0.5], [-0.5, -0.5], [-3, -3]], np.float32)
    scores = TokenScores(left=left, right=None, next=np.zeros((4, 4), np.float32))
    ranked = attention_rescoring(hypotheses, scores, RescoringWeights(ctc_weight=0.0))
    assert [item.hypothesis.tokens[0] for item in ranked] == [1, 2, 0, 3]
    assert (
        ranked[0].score == ranked[0].attention_score == -1.0
    )  # no right-to-left decoder: reverse_weight has no effect
    short_first = attention_beam_search(chain, 3, beam_size=6, eos=2, length_penalty=0.0)
    long_first = attention_beam_search(chain, 3, beam_size=6, eos=2, length_penalty=3.0)
    assert len(long_first[0].tokens) > len(short_first[0].tokens)
    assert [] not in [h.tokens for h in long_first[:-1]]  # a length of 0 must be last
    found = attention_beam_search(chain, 3, beam_size=6, eos=2, length_penalty=3.0)
    assert [] in [hypothesis.tokens for hypothesis in found]
    assert all(np.isfinite(hypothesis.score) for hypothesis in found)
    assert found[-1].tokens == []


def test_confidence_is_the_geometric_mean_over_tokens_and_eos():
    scores = TokenScores(
        left=np.log(np.array([[0.5, 0.25, 0.125]], np.float32)),
        right=np.log(np.array([[0.25, 0.75, 0.5]], np.float32)),
        next=np.zeros((1, 4), np.float32),
    )
    weights = RescoringWeights(ctc_weight=2.0, reverse_weight=0.5)
    (item,) = attention_rescoring([Hypothesis(tokens=[1, 2], score=-7.0, times=[0, 1])], scores, weights)
    attention = 0.5 * np.log(0.5 * 0.25 * 0.125) + 0.5 * np.log(0.25 * 0.75 * 0.5)
    assert item.attention_score == pytest.approx(attention, rel=1e-6)
    assert item.score == pytest.approx(attention - 14.0, rel=1e-6)
    assert item.confidence == pytest.approx(np.exp(attention / 3), rel=1e-6)
    assert item.token_confidences == pytest.approx([0.375, 0.5], rel=1e-6)


@pytest.mark.parametrize(("right", "reverse_weight", "probabilities", "expected"), [
    ([0.25, 0.75, 0.5], 0.5, [0.9, 0.3], [(0.5 + 0.25 + 0.9) / 3, (0.25 + 0.75 + 0.3) / 3]),
    ([0.25, 0.75, 0.5], 0.0, [0.9, 0.3], [(0.5 + 0.9) / 2, (0.25 + 0.3) / 2]),
    (None, 0.5, [0.9, 0.3], [(0.5 + 0.9) / 2, (0.25 + 0.3) / 2]),
    (None, 0.5, [], [0.5, 0.25]),
])  # fmt: skip
def test_every_head_that_counts_has_a_voice(right, reverse_weight, probabilities, expected):
    scores = TokenScores(
        left=np.log(np.array([[0.5, 0.25, 0.125]], np.float32)),
        right=None if right is None else np.log(np.array([right], np.float32)),
        next=np.zeros((1, 4), np.float32),
    )
    hypothesis = Hypothesis(tokens=[1, 2], score=-7.0, times=[0, 1], probabilities=probabilities)
    (item,) = attention_rescoring([hypothesis], scores, RescoringWeights(reverse_weight=reverse_weight))
    assert item.token_probabilities == pytest.approx(expected, rel=1e-6)


def chain(tokens):
    """A decoder over {0, 1, eos=2} that prefers 0 first, although only 1 leads to a probable end."""
    table = {(): [0.6, 0.3, 0.1], (0,): [0.3, 0.3, 0.4], (1,): [0.01, 0.01, 0.98]}
    return np.log(np.array([table.get(tuple(row), [0.3, 0.3, 0.4]) for row in tokens], np.float32))


def test_attention_beam_search_looks_ahead_and_stops_at_the_length_of_the_encoder_output():
    assert attention_beam_search(chain, 5, beam_size=1, eos=2)[0].tokens == [0]
    wide = attention_beam_search(chain, 5, beam_size=3, eos=2)
    assert wide[0].tokens == [1]
    assert wide[0].score == pytest.approx(np.log(0.3 * 0.98), rel=1e-5)
    assert [h.score for h in wide] == sorted((h.score for h in wide), reverse=True)

    def never_ends(tokens):
        return np.log(np.tile(np.array([0.5, 0.4, 1e-9], np.float32), (len(tokens), 1)))

    assert [len(h.tokens) for h in attention_beam_search(never_ends, 7, beam_size=2, eos=2)] == [7, 7]
    assert [h.tokens for h in attention_beam_search(never_ends, 0, beam_size=2, eos=2)] == [[]]
