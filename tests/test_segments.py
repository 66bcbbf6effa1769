"""Endpoints and segments, with a toy model that recognises tones as words, and with the tiny model."""

import dataclasses

import numpy as np
import pytest
from feeding import CHUNKED, RATE, RULES, check_segments, feed
from hypothesis import given, settings
from hypothesis import strategies as st
from tones import say, toy_recognizer

from u2moe.runtime import DecodingOptions, Recognizer

pytestmark = pytest.mark.slow

OPTIONS = [
    CHUNKED,
    dataclasses.replace(CHUNKED, num_left_chunks=-1),
    dataclasses.replace(CHUNKED, num_left_chunks=0, chunk_size=5),
    dataclasses.replace(CHUNKED, search="ctc_greedy"),
    DecodingOptions(endpoint=RULES),
]


@settings(max_examples=30)
@given(data=st.data())
def test_full_context_does_not_depend_on_when_the_end_is_known(data):
    """Also if the recording ends at the end of a window, or less than an encoder frame later."""
    words = data.draw(st.lists(st.sampled_from("ABCD"), min_size=12, max_size=12))
    pauses = data.draw(st.lists(st.sampled_from([0.0, 0.05, 0.3]), min_size=12, max_size=12))
    window = 32_720  # samples of 50 encoder frames
    num_samples = window + data.draw(st.sampled_from([-1, 0, 300, 639, 640, 20_000]))
    samples = say(words, pauses)[0][:num_samples]
    portion = data.draw(st.sampled_from([1600, 7000, 16_000]))
    toy, found = toy_recognizer(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("u2moe.runtime.decoding.stream_state.LONGEST_WINDOW_S", 2.0)
        for portions in ([samples], np.split(samples, range(portion, len(samples), portion))):
            stream = toy.create_recording_stream(DecodingOptions(endpoint=RULES))
            for block in portions:
                stream.accept_waveform(RATE, block)
                if len(portions) > 1:
                    toy.decode_streams([stream])
            stream.input_finished()
            toy.decode_streams([stream])
            found.append(stream.take_segments())
    assert found[0] == found[1]
    assert found[0]


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
    assert [word.word for word in found] == words
    tones = [(start, start + 0.3) for start in starts]
    for word, (start, end) in zip(found, tones, strict=True):
        assert word.start <= end
        assert word.end >= start  # the word's time overlaps its tone
        assert 0.9 < word.confidence <= 1
    peaks = [time for segment in transcript.segments for time in segment.times]
    assert all(start - 0.1 <= peak <= end + 0.1 for peak, (start, end) in zip(peaks, tones, strict=True))


def test_segments_end_where_speakers_pause_and_long_utterances_between_words(toy):
    samples, starts = say("ABCDA", [0.3, 0.3, 1.5, 0.3, 3.0])
    segments = feed(toy, samples)
    assert [segment.text for segment in segments] == ["A B", "C D", "A"]
    assert [segment.times[0] for segment in segments] == pytest.approx([starts[0], starts[2], starts[4]], abs=0.3)
    # Only the third rule can fire: after 6 s, within a tone.
    samples, starts = say("ABCD" * 8, [0.35] + [0.1] * 31, tone_s=0.5)
    assert any(start + 0.2 < 6.0 < start + 0.3 for start in starts)
    for options in OPTIONS[:4]:
        segments = feed(toy, samples, options=options)
        assert " ".join(segment.text for segment in segments).split() == list("ABCD" * 8)
        assert 3 <= len(segments) <= 7
        assert all(segment.end - segment.start <= 6.1 for segment in segments)


@settings(max_examples=8)
@given(st.lists(st.integers(0, 50_000), max_size=8), st.sampled_from(OPTIONS[:4]))
def test_portions_do_not_matter(splits, options):
    samples, _ = say("ABCDABCDAB", [0.3, 0.3, 1.5, 0.3, 3.0, 0.1, 0.1, 0.1, 0.1, 2.0])
    toy = toy_recognizer()
    assert feed(toy, samples, splits, options) == feed(toy, samples, (), options)


def num_frames_held(stream):
    """Count the encoder frames that a stream keeps, as output or as features."""
    return sum(map(len, stream.state.utterance._outputs)) + stream.state.extractor._windows._num_frames // 4


def test_minutes_in_flat_memory(toy):
    samples, _ = say("ABCD" * 12, [0.3, 1.0, 0.2, 0.7] * 12)
    for options in (OPTIONS[1], OPTIONS[-1]):
        stream = toy._stream(dataclasses.replace(options, search="ctc_prefix_beam"), options.chunk_size, None)
        texts, caches, held = [], 0, 0
        for _ in range(3):
            stream.accept_waveform(RATE, samples)
            toy.decode_streams([stream])
            texts += [segment.text for segment in stream.take_segments()]
            caches = max(
                caches, stream.state.caches.num_cached, stream.state.caches.offset if options.chunk_size else 0
            )
            held = max(held, num_frames_held(stream))
        assert caches <= 6 * 25 + 32  # an utterance, and the chunk in which it ends
        assert held <= 30 * 25 + 10 * 25
        stream.input_finished()
        toy.decode_streams([stream])
        texts += [segment.text for segment in stream.take_segments()]
        assert " ".join(texts).split() == list("ABCD" * 12 * 3)


def test_the_frame_of_an_endpoint_does_not_depend_on_chunks(toy):
    samples, _ = say("AB", [0.3, 2.0])
    ends = set()
    for chunk_size in (1, 3, 16, 40):
        found = feed(toy, samples, options=dataclasses.replace(CHUNKED, chunk_size=chunk_size))
        ends.add(tuple((segment.text, segment.start, segment.end) for segment in found))
    assert len(ends) == 1


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
    assert toy.transcribe(samples, hotwords=["A"]).segments[0].score - scores[1] == pytest.approx(1.5, abs=0.1)
    with pytest.raises(ValueError, match="hotword 'Z': the vocabulary has no 'Z'"):
        toy.create_stream(hotwords=["Z"])
    with pytest.raises(ValueError, match="hotwords need a prefix beam search"):
        toy.create_stream(DecodingOptions(search="ctc_greedy"), hotwords=["A"])
