import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime.decoding.pauses import token_spans
from u2moe.runtime.result import Alternative, Result, moved


def test_spans_equal_wenet(golden):
    for utterance, mode, results in golden.cases():
        num_frames = len(golden.arrays[f"{utterance}/{mode}/ctc_logprobs"])
        spans = token_spans(results["ctc_peaks"], 0.04, num_frames * 0.04)
        np.testing.assert_allclose(spans, results["peak_timestamps"], atol=1e-9)


@given(st.lists(st.integers(0, 200), max_size=20, unique=True).map(sorted))
def test_spans_are_in_order_and_within_the_audio(times):
    spans = token_spans(times, 0.04, 201 * 0.04)
    flat = [0.0, *(edge for span in spans for edge in span), 201 * 0.04]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(flat))
    assert all(start <= time * 0.04 <= end for time, (start, end) in zip(times, spans, strict=True))


def test_a_text_without_times_of_words_moves_as_a_whole():
    assert not hasattr(Result, "moved")  # internal to the runtime
    found = moved(Result(text="here", is_final=True, start=0.5, end=2.0, times=[0.75]), 60.0, 3)
    assert (found.segment, found.start, found.end, found.times) == (3, 60.5, 62.0, [60.75])
    scores = {"score": 0.0, "ctc_score": None, "attention_score": None}
    timed = {"a": 0.75, "b": 1.0}
    alternatives = [Alternative(text=text, tokens=[1], times=[time], **scores) for text, time in timed.items()]
    both = moved(Result(text="a", is_final=True, times=[0.75], nbest=alternatives), 60.0, 0)
    assert [each.times for each in both.nbest] == [[60.75], [61.0]]
    silent = moved(Result(text="", is_final=True), 60.0, 3)
    assert (silent.start, silent.end) == (0.0, 0.0)
