"""Comparison of other runtimes with the Python runtime."""

import dataclasses

import pytest

from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer


def recognized(bundle, model, samples, rate=16_000, hotwords=None, endpoint=None, **options):
    """Return the segments that Python finds in a stream of samples; other options default to those of the programs."""
    options = {"chunk_size": 16, "num_left_chunks": 4, "endpoint": endpoint or EndpointConfig()} | options
    recognizer = Recognizer(bundle, model, DecodingOptions(**options))
    stream = recognizer.create_stream(hotwords=hotwords)
    stream.accept_waveform(rate, samples)
    stream.input_finished()
    recognizer.decode_streams([stream])
    return stream.take_segments()


def assert_same_segments(found, expected):
    """Check that segments from JSON equal Python's; scores and confidences to single precision."""
    assert len(found) == len(expected)
    compared = {"words": ("word", "start", "end"), "phrases": ("phrase", "start", "end"), "nbest": ("tokens", "times")}
    for theirs, ours in zip(found, map(dataclasses.asdict, expected), strict=True):
        for field in ("text", "tokens", "segment", "times", "committed", "revised"):
            assert theirs[field] == ours[field]
        for field, names in compared.items():
            one, other = ([[each[name] for name in names] for each in own[field]] for own in (theirs, ours))
            assert one == other
        for field, name, limit in (("words", "confidence", 1e-3), ("nbest", "score", 0.02)):  # of a hundred tokens
            one, other = ([each[name] for each in own[field]] for own in (theirs, ours))
            assert one == pytest.approx(other, abs=limit)
        assert theirs["score"] == pytest.approx(ours["score"], abs=0.02)
