"""The phases of an utterance, from audio to result, and the calls of a pipeline's observer."""

import contextlib
import dataclasses
import threading

import numpy as np
import pytest
from feeding import CHUNKED, LIMIT_S, RATE, feed
from hypothesis import given
from hypothesis import strategies as st
from tones import ToyBundle, ToyModel, say, toy_recognizer

from u2moe.runtime import DecodingOptions, EndpointConfig, Recognizer, StreamError, Transcriber
from u2moe.runtime.decoding.pipeline import Observer
from u2moe.runtime.decoding.stream_state import StreamState


@given(st.integers(1, 20), st.lists(st.integers(1, 30_000), max_size=4))
def test_what_is_missing_completes_a_window(chunk_size, lengths):
    """Less audio is not enough for a window; this much is."""
    toy = toy_recognizer()
    stream = toy.create_stream(dataclasses.replace(CHUNKED, chunk_size=chunk_size))
    for length in lengths:
        stream.accept_waveform(RATE, np.zeros(length, np.float32))
        toy.decode_streams([stream])
    missing_s = stream.missing_s
    assert 0 < missing_s <= 0.04 * chunk_size + 0.055
    stream.accept_waveform(RATE, np.zeros(round(missing_s * RATE) - 1, np.float32))
    assert not stream.is_ready
    stream.accept_waveform(RATE, np.zeros(1, np.float32))
    assert stream.is_ready
    assert stream.missing_s == 0


@pytest.mark.parametrize("options", [CHUNKED, DecodingOptions(endpoint=EndpointConfig())])
def test_an_observer_sees_every_utterance_once_and_changes_nothing(options):
    seen, searches = [], []

    @contextlib.contextmanager
    def searching():
        searches.append(len(seen))
        yield

    observed = Recognizer(ToyBundle(), ToyModel(), observer=Observer(searching=searching, concluded=seen.append))
    samples, _ = say("ABCDA", [0.3, 0.3, 1.5, 0.3, 5.0])
    segments = observed.transcribe(samples, options=options).segments
    assert segments == toy_recognizer().transcribe(samples, options=options).segments
    assert [utterance.result for utterance in seen if utterance.result.text] == segments
    position = 0
    for utterance in seen:
        assert utterance.start == position
        assert options.chunk_size or utterance.window_start <= utterance.start
        position += utterance.num_frames
    assert position == ((len(samples) - 400) // 160 + 1 - 7) // 4 + 1
    assert len(searches) > len(seen)


def test_a_reset_waits_for_the_thread_that_decodes():
    """The work in progress belongs to the previous source."""
    begun, may_go_on = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def searching():
        begun.set()
        assert may_go_on.wait(LIMIT_S)
        yield

    toy = Recognizer(ToyBundle(), ToyModel(19.0), observer=Observer(searching=searching))
    stream = toy.create_stream(CHUNKED)
    stream.accept_waveform(RATE, say("AB", [0.3, 0.3])[0])
    decoding = threading.Thread(target=toy.decode_streams, args=([stream],))
    decoding.start()
    assert begun.wait(LIMIT_S)
    resetting = threading.Thread(target=stream.reset)
    resetting.start()
    resetting.join(0.2)
    assert resetting.is_alive()
    may_go_on.set()
    for thread in (decoding, resetting):
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert (stream.duration, stream.get_result().text, stream.is_ready) == (0.0, "", False)
    stream.accept_waveform(RATE, say("C", [0.3])[0])
    stream.input_finished()
    toy.decode_streams([stream])
    assert [segment.text for segment in stream.take_segments()] == ["C"]


def test_a_reset_is_refused_within_decoding():
    streams = []
    toy = Recognizer(ToyBundle(), ToyModel(19.0), observer=Observer(concluded=lambda _: streams[0].reset()))
    streams.append(toy.create_stream(CHUNKED))
    streams[0].accept_waveform(RATE, say("A", [0.3])[0])
    streams[0].input_finished()
    with pytest.raises(StreamError, match="cannot be reset by the thread that is decoding it"):
        toy.decode_streams(streams)


def test_a_stream_is_decoded_with_its_own_model(toy):
    stream = toy.create_stream(CHUNKED)
    with pytest.raises(ValueError, match="this stream belongs to another model"):
        toy_recognizer().decode_streams([stream])


@pytest.mark.parametrize("options", [{"beam_size": 5}, {}, 0, "greedy"])
def test_options_of_another_type_are_refused(toy, options):
    for take in (toy.create_stream, toy.create_recording_stream, lambda own: toy.transcribe(np.zeros(9), options=own)):
        with pytest.raises(ValueError, match="options must be DecodingOptions or None, got "):
            take(options)
    with pytest.raises(ValueError, match="options must be DecodingOptions or None, got "):
        Transcriber(toy, options=options)
    with pytest.raises(ValueError, match="vad must be a VoiceActivityDetector or None, got 5"):
        toy.transcribe(np.zeros(9), vad=5)


def test_hotwords_and_options_are_those_of_the_stream(toy):
    stream = toy.create_stream(CHUNKED, hotwords=["A"])
    assert isinstance(stream.state, StreamState)
    assert stream.options == dataclasses.replace(
        CHUNKED, search="ctc_prefix_beam", padding_s=0.0, beam_size=10, ctc_weight=0.3, reverse_weight=0.3,
        blank_penalty=0.0, language_model="none",
    )  # fmt: skip
    assert stream.state.context is not None
    samples, _ = say("A", [0.3])
    assert [segment.text for segment in feed(toy, samples)] == ["A"]
    assert np.isfinite(stream.duration)
