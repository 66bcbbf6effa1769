"""Silence around sources that begin or end within a sound."""

import dataclasses
import threading

import numpy as np
import pytest
from feeding import CHUNKED, RATE, feed
from hypothesis import given
from hypothesis import strategies as st
from manifests import with_decoding
from tones import say, toy_recognizer

from u2moe.runtime import Bundle, DecodingOptions
from u2moe.runtime.audio.padding import Padding, padded
from u2moe.runtime.bundle.manifest import FeatureConfig
from u2moe.runtime.decoding.language_model_weights import EncodedRecordings
from u2moe.runtime.model.features import fbank
from u2moe.runtime.result import moved

PADDING_S = 0.3
FEATURES = FeatureConfig()
NUM = round(PADDING_S * RATE)
QUIET = np.full(RATE // 10, 0.25, np.float32)
"""A constant offset is quiet."""
LOUD = np.resize(np.float32([0.25, 0.26]), RATE // 10)


def with_padding(options, padding_s=PADDING_S):
    return dataclasses.replace(options, padding_s=padding_s)


@pytest.mark.parametrize(("first", "num_before"), [(QUIET, 0), (LOUD, NUM)])
@pytest.mark.parametrize(("last", "num_after"), [(QUIET, 0), (LOUD, NUM)])
@given(st.lists(st.integers(0, 700), max_size=5))
def test_silence_comes_where_a_source_is_in_the_middle_of_a_sound(first, num_before, last, num_after, lengths):
    """Only the first and the last 25 ms count, however the samples are split."""
    samples = np.concatenate([first, LOUD, QUIET, LOUD, last])
    padding = Padding(PADDING_S, FEATURES.sample_rate, FEATURES.frame_len)
    parts = [padding.accept(part) for part in np.split(samples, np.cumsum(lengths))]
    heard = np.concatenate([*parts, padding.finish()])
    assert padding.num_before == num_before
    assert np.array_equal(heard, np.pad(samples, (num_before, num_after)))
    assert np.array_equal(padded(samples, PADDING_S, FEATURES.sample_rate, FEATURES.frame_len), heard)


@pytest.mark.parametrize("num_samples", [0, 1, 2, 399, 400, 401])
def test_a_short_source_is_one_edge(num_samples):
    samples = LOUD[:num_samples]
    expected = np.pad(samples, NUM) if num_samples > 1 else samples  # a single sample is not a sound
    assert np.array_equal(padded(samples, PADDING_S, FEATURES.sample_rate, FEATURES.frame_len), expected)
    assert np.array_equal(padded(samples, 0, FEATURES.sample_rate, FEATURES.frame_len), samples)


@given(st.lists(st.integers(0, 9000), max_size=6), st.sampled_from(["ctc_prefix_beam", "ctc_greedy"]))
def test_a_source_is_heard_with_its_padding(lengths, search):
    """However the samples are split, the result is as if they had zeros around them; only the times differ."""
    toy, options = toy_recognizer(), dataclasses.replace(CHUNKED, search=search)
    samples, starts = say("AB", [0.4, 2.0])
    samples = samples[round((starts[0] + 0.1) * RATE) : round((starts[1] + 0.2) * RATE)]
    expected = feed(toy, np.pad(samples, NUM), [], options)
    found = feed(toy, samples, lengths, with_padding(options))
    assert [result.text for result in found] == ["A", "B"]
    assert found == [_without_padding(result, len(samples) * 1000 // RATE / 1000) for result in expected]


def _without_padding(result, end_s):
    def limit(time):
        return min(max(time, 0.0), end_s)

    own = moved(result, -PADDING_S, result.segment)
    return dataclasses.replace(
        own, start=limit(own.start), end=limit(own.end), committed_end=limit(own.committed_end),
        times=list(map(limit, own.times)),
        words=[dataclasses.replace(word, start=limit(word.start), end=limit(word.end)) for word in own.words],
        nbest=[dataclasses.replace(each, times=list(map(limit, each.times))) for each in own.nbest],
    )  # fmt: skip


def test_times_stay_within_the_source_and_weights_are_found_with_its_padding(recognizer, sound):
    """Even if random weights find words in the silence around it."""
    for options in (DecodingOptions(), DecodingOptions(chunk_size=4), DecodingOptions(search="attention")):
        transcript = recognizer.transcribe(sound[:24_000], options=with_padding(options, 1.0))
        assert transcript.duration == 1.5
        for segment in transcript.segments:
            assert all(0 <= word.start <= word.end <= transcript.duration for word in segment.words)
            assert all(0 <= time <= transcript.duration for time in segment.times)
    bundle, model = recognizer.bundle, recognizer.model
    manifest = with_decoding(bundle.manifest, padding_s=PADDING_S)
    encoded = EncodedRecordings(Bundle(bundle.path, manifest, bundle.tokens), model)
    samples = np.resize(LOUD, RATE)
    encoded.add("A", samples)
    expected = model.encode(fbank(np.pad(samples, NUM), manifest.features))
    assert np.array_equal(encoded.recordings[0].encoder_out, expected)


@pytest.mark.parametrize("padding_s", [0.0, 0.18, 0.6, 2.0])
@given(st.lists(st.integers(1, 3000), max_size=8), st.booleans())
def test_what_is_missing_is_never_too_much(padding_s, lengths, is_loud):
    """No window comes before that much more audio, but possibly later, so nothing waits too long."""
    stream = toy_recognizer().create_stream(with_padding(CHUNKED, padding_s))
    for length in [*lengths, *[160] * 150]:
        missing_s = stream.missing_s
        stream.accept_waveform(RATE, np.resize(LOUD if is_loud else QUIET, length))
        assert not stream.is_ready or length / RATE >= missing_s
        if stream.is_ready:
            return
    raise AssertionError("no window was found")


def test_a_result_has_the_times_of_its_own_source(toy, monkeypatch):
    """No other thread may reset the stream in between."""
    stream = toy.create_stream(with_padding(CHUNKED))
    source, locked = stream.state, []

    def presented(result):
        other = threading.Thread(target=lambda: locked.append(not source.lock.acquire(blocking=False)))
        other.start()
        other.join()
        return result

    monkeypatch.setattr(source, "presented", presented)
    stream.get_result()
    assert locked == [True]


def test_silence_comes_anew_after_a_reset(toy):
    samples, _ = say("AB", [0.4, 2.0])
    stream, results = toy.create_stream(with_padding(CHUNKED)), []
    for _ in range(2):
        stream.accept_waveform(RATE, samples)
        stream.input_finished()
        toy.decode_streams([stream])
        results.append(stream.take_segments())
        stream.reset()
    assert results[0] == results[1] == feed(toy, samples, [], with_padding(CHUNKED))
