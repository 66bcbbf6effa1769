"""Comparison of other runtimes with the Python runtime."""

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
    for theirs, ours in zip(found, expected, strict=True):
        for field in ("text", "tokens", "segment", "times", "committed", "revised"):
            assert theirs[field] == getattr(ours, field)
        words = [(word["word"], word["start"], word["end"]) for word in theirs["words"]]
        assert words == [(word.word, word.start, word.end) for word in ours.words]
        phrases = [(each["phrase"], each["start"], each["end"]) for each in theirs["phrases"]]
        assert phrases == [(each.phrase, each.start, each.end) for each in ours.phrases]
        confidences = [word["confidence"] for word in theirs["words"]]
        assert confidences == pytest.approx([word.confidence for word in ours.words], abs=1e-3)
        assert [item["tokens"] for item in theirs["nbest"]] == [item.tokens for item in ours.nbest]
        assert [item["times"] for item in theirs["nbest"]] == [item.times for item in ours.nbest]
        assert [theirs["score"], *(item["score"] for item in theirs["nbest"])] == pytest.approx(
            [ours.score, *(item.score for item in ours.nbest)], abs=0.02
        )  # sums over a hundred tokens
