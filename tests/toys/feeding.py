"""Streams fed in portions, alone and together, and properties of their segments."""

import threading

import numpy as np
import pytest

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule

RATE = 16_000
LIMIT_S = 60
"""A test that might hang fails after this time."""

RULES = EndpointConfig(
    rule1=EndpointRule(min_trailing_silence=2.4),
    rule2=EndpointRule(must_contain_nonsilence=True, min_trailing_silence=0.8),
    rule3=EndpointRule(min_utterance_length=6.0),
)
CHUNKED = DecodingOptions(chunk_size=16, num_left_chunks=2, endpoint=RULES)


def cut_after(seconds, chunk_size):
    """Return options for utterances of this length, for the tiny model and noise."""
    endpoint = EndpointConfig(rule1=None, rule2=None, rule3=EndpointRule(min_utterance_length=seconds))
    return DecodingOptions(chunk_size=chunk_size, num_left_chunks=2, endpoint=endpoint)


TINY, OPTIONS = cut_after(1.5, 16), cut_after(1.2, 8)
"""Options for streams, and for transcribers."""


def feed(recognizer, samples, splits=(), options=CHUNKED):
    """Return the segments of a stream that is fed in portions and decoded after each."""
    stream, segments = recognizer.create_stream(options), []
    for part in np.split(samples, np.cumsum(splits, dtype=int)):
        stream.accept_waveform(RATE, part)
        recognizer.decode_streams([stream])
        assert stream.is_endpoint() == bool(stream.state.segments)
        segments += stream.take_segments()
        assert not stream.is_endpoint()
        assert not stream.get_result().is_final
    stream.input_finished()
    recognizer.decode_streams([stream])
    assert stream.get_result().is_final
    return segments + stream.take_segments()


def feed_together(recognizer, sounds, options=None, step=7000):
    """Return the segments of many streams, which begin one after another."""
    options = options or [CHUNKED] * len(sounds)
    streams = [recognizer.create_stream(item) for item in options]
    segments = [[] for _ in sounds]
    for start in range(0, max(map(len, sounds)) + step * len(sounds), step):
        for number, (stream, samples) in enumerate(zip(streams, sounds, strict=True)):
            begin = start - step * (number % 5)
            if begin >= 0:
                stream.accept_waveform(RATE, samples[begin : begin + step])
        recognizer.decode_streams(streams)
        for stream, own in zip(streams, segments, strict=True):
            own.extend(stream.take_segments())
    for stream in streams:
        stream.input_finished()
    recognizer.decode_streams(streams)
    return [own + stream.take_segments() for stream, own in zip(streams, segments, strict=True)]


def check_equal(found, expected):
    """Check for the same tokens at the same times; floats may differ by rounding in products of other heights. With
    real models in batches of another composition, some processors round the last bits differently."""
    for one, other in zip(found, expected, strict=True):
        for field in ("text", "tokens", "times", "segment", "is_final", "start", "end"):
            assert getattr(one, field) == getattr(other, field)
        assert one.score == pytest.approx(other.score, abs=1e-3)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-3)


def check_segments(segments, duration):
    assert [segment.segment for segment in segments] == list(range(len(segments)))
    assert all(segment.is_final and segment.text for segment in segments)
    edges = [edge for segment in segments for word in segment.words for edge in (word.start, word.end)]
    assert edges == sorted(edges)
    assert all(0 <= edge <= duration for edge in edges)
    peaks = [time for segment in segments for time in segment.times]
    assert peaks == sorted(peaks)
    for segment in segments:
        assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)
        assert segment.nbest[0].tokens == segment.tokens


class Gate:
    """A callback that blocks its thread until it is opened; it collects its arguments."""

    def __init__(self):
        self.calls, self.reached, self.open = [], threading.Event(), threading.Event()

    def __call__(self, argument):
        self.calls.append(argument)
        self.reached.set()
        assert self.open.wait(LIMIT_S)


def partials(recognizer, samples, splits, options, others=()):
    """Return the committed words after each chunk, by segment and by encoder frame; and the final results."""
    stream, seen, finals, left = recognizer.create_stream(options), {}, [], len(samples)
    for part in np.split(samples, np.cumsum(splits, dtype=int)):
        stream.accept_waveform(RATE, part)
        for other in others:
            other.accept_waveform(RATE, part[::-1])
        left -= len(part)
        if not left:
            stream.input_finished()
        recognizer.decode_streams([stream, *others])
        finals += stream.take_segments()
        found = stream.get_result()
        if not found.is_final:
            seen[found.segment, stream.state.utterance.end] = found
        if not left:
            break
    return seen, finals


def feed_each(transcriber, blocks):
    for block in blocks:
        transcriber.feed(RATE, block)


def results_of(recognizer, blocks):
    """Return the texts of changing partial results, and the segments, of a stream."""
    stream, shown, partial, segments = recognizer.create_stream(OPTIONS), "", [], []
    for block in blocks:
        stream.accept_waveform(RATE, block)
        recognizer.decode_streams([stream])
        new = stream.take_segments()
        shown = "" if new else shown
        segments += new
        if stream.get_result().text != shown:
            shown = stream.get_result().text
            partial.append((stream.get_result().segment, shown))
    stream.input_finished()
    recognizer.decode_streams([stream])
    return partial, segments + stream.take_segments()


def fail_at(recognizer, number, error):
    """Make the recogniser fail after its `number`th decoding."""
    calls, decode = [], recognizer.decode_streams

    def decode_streams(streams):
        calls.append(streams)
        decode(streams)
        if len(calls) == number:
            raise error

    recognizer.decode_streams = decode_streams
