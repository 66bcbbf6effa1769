from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime.decoding.ctc import Hypothesis
from u2moe.runtime.decoding.utterance import Endpoint, Endpointer
from u2moe.runtime.options import EndpointConfig, EndpointRule

FRAME_S = 0.04


def log_probs(pattern, blank=0):
    """Make log-probabilities [time, 3] from a string: "_" silence, "x" speech."""
    probabilities = np.full((len(pattern), 3), 0.05)
    for frame, char in enumerate(pattern):
        probabilities[frame, blank] = 0.9 if char == "_" else 0.2
    return np.log(probabilities / probabilities.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("pattern", "num_frames", "rule"), [
    ("_" * 59, None, None),
    ("_" * 60, 60, 1),
    ("x" + "_" * 29, None, None),
    ("x" + "_" * 40, 31, 2),
    ("_" * 50 + "x" + "_" * 29 + "x" + "_" * 30, 111, 2),
    ("x" * 499, None, None),
    ("x" * 510, 500, 3),
    ("x_" * 250, 500, 3),
])  # fmt: skip
def test_default_rules(pattern, num_frames, rule):
    endpoint = Endpointer(EndpointConfig(), FRAME_S).advance(log_probs(pattern))
    assert (endpoint and (endpoint.num_frames, endpoint.rule)) == (num_frames and (num_frames, rule))


def test_a_silent_frame_is_more_than_four_fifths_blank_whatever_token_that_is():
    assert Endpointer(EndpointConfig(), FRAME_S, blank=2).advance(log_probs("x" + "_" * 30, blank=2)) == Endpoint(
        num_frames=31, rule=2, trailing_silence=30
    )
    rule = EndpointConfig(rule1=EndpointRule(min_trailing_silence=FRAME_S), rule2=None, rule3=None)
    for probability, fires in ((0.799, False), (0.801, True)):
        frame = np.log(np.array([[probability, 1 - probability]], np.float32))
        assert (Endpointer(rule, FRAME_S).advance(frame) is not None) == fires


def test_rules_can_be_switched_off_and_a_turn_is_asked_about_once_in_each_silence():
    off = EndpointConfig(rule1=None, rule2=None, rule3=None)
    assert off.min_pause is None
    assert EndpointConfig().min_pause == 0.5
    assert EndpointConfig(pause=None).min_pause is None
    assert Endpointer(off, FRAME_S).advance(log_probs("x" + "_" * 1000)) is None
    never = EndpointConfig(rule1=EndpointRule(min_trailing_silence=1e308), rule2=None, rule3=None)
    assert Endpointer(never, FRAME_S).advance(log_probs("x" + "_" * 1000)) is None
    only3 = EndpointConfig(rule1=None, rule2=None, rule3=EndpointRule(min_utterance_length=2, min_trailing_silence=0.2))
    endpoint = Endpointer(only3, FRAME_S).advance(log_probs("x" * 70 + "_" * 9))
    assert endpoint == Endpoint(num_frames=75, rule=3, trailing_silence=5)
    asked = []
    endpointer = Endpointer(EndpointConfig(turn=0.1), FRAME_S, fusion=SayingFusion(0, 0.05))
    pattern = "x" + "_" * 20 + "x_x" + "_" * 44
    assert endpointer.advance(log_probs(pattern), lambda num: asked.append(num) or heard(0.0)) is None
    assert asked == [16, 39]


class SayingFusion:
    """A language model with a given end probability for each number of tokens."""

    def __init__(self, *ends):
        self.ends, self.ngrams = ends, SimpleNamespace(end=None if None in ends else 1)

    def end_probability(self, tokens):
        return self.ends[len(tokens)]


def heard(*scores):
    """Make hypotheses with 1, 2, ... tokens."""
    return [Hypothesis(tokens=[1] * num, score=score, times=[0] * num) for num, score in enumerate(scores, start=1)]


@pytest.mark.parametrize(("ends", "hypotheses", "num_frames"), [
    ((0, 0.3), heard(-5.0), 16),
    ((0, 0.1), heard(-5.0), 16),
    ((0, 0.09), heard(-5.0), 46),
    ((0, 0.3, 0.0), heard(-5.0, -5.5), 16),
    ((0, 0.3, 0.0), heard(-5.0, -4.0), 46),
    ((None, 0.3), heard(-5.0), 31),
])  # fmt: skip
def test_the_end_of_a_turn_is_early_where_a_sentence_ends_and_late_where_it_does_not(ends, hypotheses, num_frames):
    """After 0.5 or 1.5 times the silence of rule 2; several hypotheses are weighted by their shares."""
    asked, frames = [], log_probs("x" + "_" * 59)
    for fusion in (SayingFusion(*ends), None):
        endpointer = Endpointer(EndpointConfig(turn=0.1), FRAME_S, fusion=fusion)
        found = endpointer.advance(frames, lambda num: asked.append(num) or hypotheses)
        assert found == Endpoint(num_frames=num_frames, rule=2, trailing_silence=num_frames - 1)
        num_frames = 31
    assert asked == ([] if None in ends else [16])


@given(st.lists(st.sampled_from("___x"), min_size=1, max_size=400), st.lists(st.integers(0, 50), max_size=20))
def test_portions_do_not_matter(pattern, sizes):
    config = EndpointConfig(
        rule1=EndpointRule(min_trailing_silence=0.4),
        rule2=EndpointRule(must_contain_nonsilence=True, min_trailing_silence=0.2),
        rule3=EndpointRule(min_utterance_length=1.0),
    )
    frames = log_probs("".join(pattern))
    assert ends(config, [frames]) == ends(config, np.split(frames, np.cumsum(sizes).clip(0, len(frames))))


def ends(config, portions):
    """Return the frames after which the utterances of a recording end."""
    endpointer, found, position = Endpointer(config, FRAME_S), [], 0
    for portion in portions:
        rest = portion
        while (endpoint := endpointer.advance(rest)) is not None:
            position += endpoint.num_frames
            found.append((position, endpoint.rule, endpoint.trailing_silence))
            rest = rest[endpoint.num_frames :]
            endpointer.reset()
        position += len(rest)
    return found


@pytest.mark.parametrize("arguments", [{}, {"must_contain_nonsilence": True}])
def test_rules_that_cannot_be(arguments):
    with pytest.raises(ValueError, match=r"min_trailing_silence|min_utterance_length"):
        EndpointRule(**arguments)
