"""Endpoints and segments: rules, a toy model that recognises tones as words, and hotwords."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from feeding import CHUNKED, RATE, RULES, check_segments, feed
from hypothesis import given, settings
from hypothesis import strategies as st
from tones import say, toy_recognizer

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule, Hypothesis, Recognizer
from u2moe.runtime.decoding.utterance import Endpoint, Endpointer

FRAME_S = 0.04
OPTIONS = [
    CHUNKED,
    dataclasses.replace(CHUNKED, num_left_chunks=-1),
    dataclasses.replace(CHUNKED, num_left_chunks=0, chunk_size=5),
    dataclasses.replace(CHUNKED, search="ctc_greedy"),
    DecodingOptions(endpoint=RULES),
]


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
    endpoint = Endpointer(EndpointConfig(), FRAME_S, blank=2).advance(log_probs("x" + "_" * 30, blank=2))
    assert endpoint == Endpoint(num_frames=31, rule=2, trailing_silence=30)
    rule = EndpointConfig(rule1=EndpointRule(min_trailing_silence=FRAME_S), rule2=None, rule3=None)
    for probability, fires in ((0.799, False), (0.801, True)):
        frame = np.log(np.array([[probability, 1 - probability]], np.float32))
        assert (Endpointer(rule, FRAME_S).advance(frame) is not None) == fires


def test_rules_can_be_switched_off_and_a_turn_is_asked_about_once_in_each_silence():
    with pytest.raises(ValueError, match=r"min_trailing_silence|min_utterance_length"):
        EndpointRule(must_contain_nonsilence=True)
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
    asked, endpointer = [], Endpointer(EndpointConfig(turn=0.1), FRAME_S, fusion=saying(0, 0.05))
    frames = log_probs("x" + "_" * 20 + "x_x" + "_" * 44)
    assert endpointer.advance(frames, lambda num: asked.append(num) or heard(0.0)) is None
    assert asked == [16, 39]


def saying(*ends):
    """Make a language model with a given end probability for each number of tokens."""
    ngrams = SimpleNamespace(end=None if None in ends else 1)
    return SimpleNamespace(ngrams=ngrams, end_probability=lambda tokens: ends[len(tokens)])


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
    for fusion in (saying(*ends), None):
        endpointer = Endpointer(EndpointConfig(turn=0.1), FRAME_S, fusion=fusion)
        found = endpointer.advance(frames, lambda num: asked.append(num) or hypotheses)
        assert found == Endpoint(num_frames=num_frames, rule=2, trailing_silence=num_frames - 1)
        num_frames = 31
    assert asked == ([] if None in ends else [16])


@pytest.mark.slow
@settings(max_examples=20)
@given(data=st.data())
def test_full_context_does_not_depend_on_when_the_end_is_known(data):
    """Also if the recording ends at the end of a window, or less than an encoder frame later."""
    words = data.draw(st.lists(st.sampled_from("ABCD"), min_size=12, max_size=12))
    pauses = data.draw(st.lists(st.sampled_from([0.0, 0.05, 0.3]), min_size=12, max_size=12))
    window = 32_720  # samples of 50 encoder frames
    samples = say(words, pauses)[0][: window + data.draw(st.sampled_from([-1, 0, 300, 639, 640, 20_000]))]
    portion = data.draw(st.sampled_from([1600, 7000, 16_000]))
    toy, found = toy_recognizer(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("u2moe.runtime.decoding.stream_state.LONGEST_WINDOW_S", 2.0)
        for size in (len(samples), portion):
            stream = toy.create_recording_stream(DecodingOptions(endpoint=RULES))
            for place in range(0, len(samples), size):
                if place:
                    toy.decode_streams([stream])
                stream.accept_waveform(RATE, samples[place : place + size])
            stream.input_finished()
            toy.decode_streams([stream])
            found.append(stream.take_segments())
    assert found[0] == found[1] != []


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@settings(max_examples=6)
@given(data=st.data())
def test_every_word_of_a_recording_is_found_once(options, data):
    words = data.draw(st.lists(st.sampled_from("ABCD"), max_size=30))
    pauses = data.draw(st.lists(st.sampled_from([0.2, 0.2, 0.3, 1.2, 4.0]), min_size=len(words), max_size=len(words)))
    toy = toy_recognizer()
    samples, starts = say(words, pauses)
    transcript = toy.transcribe(samples, options=options)
    assert transcript.text.split() == words
    check_segments(transcript.segments, transcript.duration)
    found = [word for segment in transcript.segments for word in segment.words]
    peaks = [time for segment in transcript.segments for time in segment.times]
    assert [word.word for word in found] == words
    for word, peak, start in zip(found, peaks, starts, strict=True):
        assert word.start <= start + 0.3
        assert word.end >= start  # the word's time overlaps its tone
        assert 0.9 < word.confidence <= 1
        assert start - 0.1 <= peak <= start + 0.4


def test_minutes_in_flat_memory(toy):
    samples, _ = say("ABCD" * 12, [0.3, 1.0, 0.2, 0.7] * 12)
    for options in (OPTIONS[1], OPTIONS[-1]):
        stream = toy._stream(dataclasses.replace(options, search="ctc_prefix_beam"), options.chunk_size, None)
        state, texts, caches, held = stream.state, [], 0, 0
        for _ in range(2):
            stream.accept_waveform(RATE, samples)
            toy.decode_streams([stream])
            texts += [segment.text for segment in stream.take_segments()]
            caches = max(caches, state.caches.num_cached, state.caches.offset if options.chunk_size else 0)
            held = max(held, sum(map(len, state.utterance._outputs)) + state.extractor._windows._num_frames // 4)
        assert caches <= 6 * 25 + 32  # an utterance, and the chunk in which it ends
        assert held <= 30 * 25 + 10 * 25  # encoder frames that are kept, as output or as features
        stream.input_finished()
        toy.decode_streams([stream])
        texts += [segment.text for segment in stream.take_segments()]
        assert " ".join(texts).split() == list("ABCD" * 12 * 2)


def test_segments_end_where_speakers_pause_whatever_the_chunks(toy):
    samples, _ = say("ABCDABCDAB", [0.3, 0.3, 1.5, 0.3, 3.0, 0.1, 0.1, 0.1, 0.1, 2.0])
    found = [feed(toy, samples, options=dataclasses.replace(CHUNKED, chunk_size=size)) for size in (1, 3, 16, 40)]
    assert len({tuple((each.text, each.start, each.end) for each in segments) for segments in found}) == 1
    assert [each.text for each in found[0]] == ["A B", "C D", "A B C D A", "B"]


def test_hotwords_of_streams_and_recognisers(toy):
    samples, _ = say("AB", [0.3, 0.3])
    named = Recognizer(toy.bundle, toy.model, hotwords=["a b"])
    stream, plain = named.create_stream(CHUNKED), toy.create_stream(CHUNKED)
    other = named.create_stream(CHUNKED, hotwords=[("B", 2.0)])
    for each in (stream, plain, other):
        each.accept_waveform(RATE, samples)
        each.input_finished()
    named.decode_streams([stream, plain, other])
    scores = [each.get_result().score for each in (stream, plain, other)]
    # With hotwords the search follows other prefixes, so sums over alignments differ slightly.
    assert scores[0] - scores[1] == pytest.approx(3.0, abs=0.01)
    assert scores[2] - scores[1] == pytest.approx(2.0, abs=0.01)
    assert toy.transcribe(samples, hotwords={"B": 2.0}) == toy.transcribe(samples, hotwords=[("B", 2.0)])
    with pytest.raises(ValueError, match="hotword 'Z': the vocabulary has no 'Z'"):
        toy.create_stream(hotwords=["Z"])
    with pytest.raises(ValueError, match="hotwords need a prefix beam search"):
        toy.create_stream(DecodingOptions(search="ctc_greedy"), hotwords=["A"])
