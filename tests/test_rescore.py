import copy
import dataclasses
import itertools
import math
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from manifests import edited

from u2moe.quantize import RECIPES, quantize_bundle
from u2moe.runtime import Bundle, DecodingOptions, Recognizer
from u2moe.runtime.bundle.manifest import Calibration
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.decoding.ctc import Hypothesis, ctc_prefix_beam_search
from u2moe.runtime.decoding.rescoring import attention_beam_search, attention_rescoring, word_confidence
from u2moe.runtime.model.model import TokenScores
from u2moe.runtime.options import RescoringWeights


def test_rescoring_equals_wenet(golden):
    # Names are such as "attention_rescoring ctc=0.3 rev=0.0"
    cases = [
        (utterance, [float(part.split("=")[1]) for part in name.split()[1:]], expected)
        for utterance, mode, results in golden.cases()
        for name, expected in results.items()
        if mode == "full" and name.startswith("attention_rescoring")
    ]
    for utterance, (ctc, reverse), expected in cases:
        hypotheses = ctc_prefix_beam_search(golden.arrays[f"{utterance}/full/ctc_logprobs"], 10)
        left, right = (golden.arrays[f"{utterance}/full/{name}"] for name in ("score", "r_score"))
        scores = TokenScores(left=left, right=right, next=np.zeros((0, 0), np.float32))
        weights = RescoringWeights(ctc_weight=ctc, reverse_weight=reverse)
        best = attention_rescoring(hypotheses, scores, weights)[0]
        assert (best.hypothesis.tokens, best.hypothesis.times) == (expected["tokens"], expected["times"])
        # WeNet sums in single precision: 25 terms of about 10.
        assert best.score == pytest.approx(expected["score"], abs=1e-4)
        assert best.confidence == pytest.approx(expected["confidence"], rel=1e-4)
        np.testing.assert_allclose(best.token_confidences, expected["tokens_confidence"], rtol=1e-4)
    assert len(cases) == 24


def test_the_first_of_equals_wins_and_without_a_right_to_left_decoder_its_weight_has_no_effect():
    hypotheses = [Hypothesis(tokens=[i], score=-float(i), times=[0]) for i in range(4)]
    left = np.array([[-1, -1], [-0.5, -0.5], [-0.5, -0.5], [-3, -3]], np.float32)
    scores = TokenScores(left=left, right=None, next=np.zeros((4, 4), np.float32))
    ranked = attention_rescoring(hypotheses, scores, RescoringWeights(ctc_weight=0.0))
    assert [item.hypothesis.tokens[0] for item in ranked] == [1, 2, 0, 3]
    assert ranked[0].score == ranked[0].attention_score == -1.0


@pytest.mark.parametrize(("right", "reverse_weight", "probabilities", "expected"), [
    ([0.25, 0.75, 0.5], 0.5, [0.9, 0.3], [(0.5 + 0.25 + 0.9) / 3, (0.25 + 0.75 + 0.3) / 3]),
    ([0.25, 0.75, 0.5], 0.0, [0.9, 0.3], [(0.5 + 0.9) / 2, (0.25 + 0.3) / 2]),
    (None, 0.5, [0.9, 0.3], [(0.5 + 0.9) / 2, (0.25 + 0.3) / 2]),
    (None, 0.5, [], [0.5, 0.25]),
])  # fmt: skip
def test_every_head_that_counts_has_a_voice(right, reverse_weight, probabilities, expected):
    left, right = (each and np.log(np.array([each], np.float32)) for each in ([0.5, 0.25, 0.125], right))
    hypothesis = Hypothesis(tokens=[1, 2], score=-7.0, times=[0, 1], probabilities=probabilities)
    scores = TokenScores(left=left, right=right, next=np.zeros((1, 4), np.float32))
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
    # A length penalty prefers longer sequences: a length of 0 must be last
    short_first, long_first = (
        attention_beam_search(chain, 3, beam_size=6, eos=2, length_penalty=penalty) for penalty in (0.0, 3.0)
    )
    assert len(long_first[0].tokens) > len(short_first[0].tokens)
    assert [h.tokens for h in long_first].index([]) == len(long_first) - 1
    assert np.isfinite([h.score for h in long_first]).all()


def test_words_are_as_sure_as_their_tokens_and_calibration_is_kept_by_quantization(small_bundle, tmp_path):
    assert (word_confidence([0.9, 0.2, 0.8], None), word_confidence([0.8], None)) == (0.2, 0.8)
    assert word_confidence([0.8], Calibration()) == pytest.approx(0.8)
    assert word_confidence([0.5], Calibration(scale=2.0)) == 0.5
    assert word_confidence([0.8], Calibration(scale=2.0)) == pytest.approx(16 / 17)  # odds of 4 become 16
    assert word_confidence([0.5], Calibration(bias=math.log(3))) == pytest.approx(0.75)
    # A calibration is added to existing graphs, and later changed: the graphs must still fit the manifest
    folder = shutil.copytree(small_bundle.path, tmp_path / "bundle")
    edited("", calibration={"scale": 1.5, "bias": -0.5})(folder)
    assert Bundle.open(folder).manifest.metadata() == small_bundle.manifest.metadata()
    quantized, _ = quantize_bundle(folder, tmp_path / "int8", RECIPES["int8"])
    assert quantized.manifest.calibration == Calibration(scale=1.5, bias=-0.5)
    # As described in the embedding guide
    assert Bundle.open(DEMO_FOLDER).manifest.calibration is not None


@given(st.lists(st.floats(0, 1), min_size=2).map(sorted), st.floats(0.01, 100), st.floats(-1000, 1000))
def test_calibration_keeps_the_order_and_is_a_probability(confidences, scale, bias):
    found = [word_confidence([confidence], Calibration(scale=scale, bias=bias)) for confidence in confidences]
    assert all(0 <= confidence <= 1 for confidence in found)
    assert all(a <= b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("search", ["ctc_prefix_beam", "attention_rescoring"])
def test_confidences_are_what_the_bundle_says_they_are_worth(bundle, model, sound, search):
    calibration = Calibration(scale=1.5, bias=-0.5)
    other = copy.copy(model)
    other.manifest = dataclasses.replace(model.manifest, calibration=calibration)
    plain, scaled = (
        Recognizer(bundle, which, DecodingOptions(search=search)).transcribe(sound).segments for which in (model, other)
    )
    expected = [word_confidence([word.confidence], calibration) for segment in plain for word in segment.words]
    assert [word.confidence for segment in scaled for word in segment.words] == pytest.approx(expected) != []
    for before, after in zip(plain, scaled, strict=True):
        assert after.confidence == pytest.approx(sum(word.confidence for word in after.words) / len(after.words))
        assert (after.text, after.nbest) == (before.text, before.nbest)  # the ranking is unchanged
