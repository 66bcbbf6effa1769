"""Streams: audio in any portions, partial and final results, resets, and the calls of a pipeline's observer."""

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest
from feeding import CHUNKED, LIMIT_S, RATE, Gate
from hypothesis import given, settings
from hypothesis import strategies as st
from tones import ToyBundle, ToyModel, say, toy_recognizer

from u2moe.runtime import AudioError, DecodingOptions, EndpointConfig, Recognizer, StreamError, Transcriber
from u2moe.runtime.decoding.pipeline import Observer
from u2moe.runtime.model.model import Model

WHOLE = DecodingOptions(chunk_size=16, num_left_chunks=2)


def recognise(recognizer, samples, splits=(), *, options=WHOLE, rate=RATE, stream=None):
    """Return the final result of samples that arrive in portions and are decoded after each."""
    stream = stream or recognizer.create_stream(options)
    start = 0
    for length in splits:
        stream.accept_waveform(rate, samples[start : start + length])
        start += length
        recognizer.decode_streams([stream])
    stream.accept_waveform(rate, samples[start:])
    stream.input_finished()
    recognizer.decode_streams([stream])
    return stream.get_result()


@pytest.mark.slow
@settings(max_examples=8)
@given(
    splits=st.lists(st.integers(0, 9000), max_size=15), rate=st.sampled_from([16_000, 8000, 44_100]),
    search=st.sampled_from(["attention_rescoring", "ctc_prefix_beam", "ctc_greedy"]),
)  # fmt: skip
def test_any_split_gives_the_same_result(recognizer, sound, splits, rate, search):
    options = dataclasses.replace(WHOLE, search=search)
    stream, as_int16 = recognizer.create_stream(options), (sound * 32767).astype(np.int16)
    whole = recognise(recognizer, as_int16, rate=rate, stream=stream)
    assert whole.text
    assert recognise(recognizer, as_int16.astype(np.float32) / 32768, splits, options=options, rate=rate) == whole
    assert stream.duration == pytest.approx(len(sound) / rate, abs=1e-4)  # also what the resampler holds back


@pytest.mark.parametrize("num_samples", [0, 1, 399, 400, 1359, 1360, 5000, 11_119, 11_120, 11_121, 17_000])
@pytest.mark.parametrize("chunk_size", [1, 16])
def test_a_stream_hears_every_frame_that_the_file_has(toy, num_samples, chunk_size):
    samples, options = say("AB", [0.1, 0.1])[0][:num_samples], DecodingOptions(chunk_size=chunk_size)
    stream = toy.create_stream(options)
    result = recognise(toy, samples, stream=stream)
    num_frames = (num_samples - 400) // 160 + 1 if num_samples >= 400 else 0
    assert stream.state.utterance.end == max((num_frames - 7) // 4 + 1, 0)
    assert result.is_final
    transcript = toy.transcribe(samples, options=options)
    assert (transcript.text, transcript.duration) == (result.text, num_samples / RATE)
    assert (transcript.text == "") == (transcript.segments == [])


def test_partial_results_grow_and_the_final_one_is_rescored(recognizer, sound):
    stream, lengths = recognizer.create_stream(WHOLE), []
    for samples in np.split(sound, 16):
        stream.accept_waveform(RATE, samples)
        recognizer.decode_streams([stream])
        result = stream.get_result()
        assert not result.is_final
        assert stream.get_result() is result
        assert result.times == sorted(result.times)
        lengths.append(len(result.tokens))
    assert (lengths[0], lengths[-1] > 3) == (0, True)
    stream.input_finished()
    recognizer.decode_streams([stream])
    final = stream.get_result()
    recognizer.decode_streams([stream, stream])  # does nothing
    assert stream.get_result() is final
    assert (final.is_final, len(final.nbest)) == (True, 10)
    assert None not in (final.confidence, *(each.attention_score for each in final.nbest))
    assert [each.score for each in final.nbest] == sorted((each.score for each in final.nbest), reverse=True)


def test_a_stream_is_not_used_after_its_end_but_after_a_reset(recognizer, sound):
    stream = recognizer.create_stream(WHOLE)
    stream.accept_waveform(RATE, sound)
    stream.input_finished()
    with pytest.raises(StreamError, match="finished: reset the stream"):
        stream.accept_waveform(RATE, sound)
    assert stream.duration == len(sound) / RATE  # nothing was appended
    recognizer.decode_streams([stream])
    with pytest.raises(StreamError, match="already finished"):
        stream.input_finished()
    expected = recognise(recognizer, sound[:30_000])
    for rate in (RATE, 44_100):  # another utterance may have another rate
        stream.reset()
        assert stream.get_result().text == ""
        stream.accept_waveform(rate, sound)
        stream.reset()
        assert recognise(recognizer, sound[:30_000], stream=stream) == expected


def test_bad_samples_change_nothing_and_some_bundles_cannot_stream(recognizer, sound, bundle, model):
    expected = recognise(recognizer, sound)
    stream = recognizer.create_stream(WHOLE)
    stream.accept_waveform(RATE, sound[:20_000])
    for bad in (np.full(5, np.nan, np.float32), np.zeros((5, 2), np.float32), np.zeros(5, np.int32)):
        with pytest.raises(AudioError):
            stream.accept_waveform(RATE, bad)
    with pytest.raises(AudioError, match="sample rate changed from 16000 to 8000"):
        stream.accept_waveform(8000, sound)
    assert recognise(recognizer, sound[20_000:], stream=stream) == expected
    manifest = dataclasses.replace(bundle.manifest, model=dataclasses.replace(model.config, streaming=False))
    recognizer = Recognizer(bundle, Model(manifest, model.encoder.session, model._ctc, model._decoder))
    with pytest.raises(StreamError, match="cannot stream"):
        recognizer.create_stream()


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

    def searching():
        searches.append(len(seen))
        return contextlib.nullcontext()

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
    gate = Gate()
    observer = Observer(searching=lambda: gate(None) or contextlib.nullcontext())
    toy = Recognizer(ToyBundle(), ToyModel(19.0), observer=observer)
    stream = toy.create_stream(CHUNKED)
    stream.accept_waveform(RATE, say("AB", [0.3, 0.3])[0])
    with ThreadPoolExecutor(2) as threads:
        decoding = threads.submit(toy.decode_streams, [stream])
        assert gate.reached.wait(LIMIT_S)
        resetting = threads.submit(stream.reset)
        assert not wait([resetting], 0.1).done
        gate.open.set()
        for each in (decoding, resetting):
            each.result(LIMIT_S)
    assert (stream.duration, stream.get_result().text, stream.is_ready) == (0.0, "", False)
    assert recognise(toy, say("C", [0.3])[0], stream=stream).text == "C"


def test_a_stream_is_decoded_with_its_own_model_and_not_reset_meanwhile():
    streams = []
    toy = Recognizer(ToyBundle(), ToyModel(19.0), observer=Observer(concluded=lambda _: streams[0].reset()))
    streams.append(toy.create_stream(CHUNKED))
    streams[0].accept_waveform(RATE, say("A", [0.3])[0])
    streams[0].input_finished()
    with pytest.raises(ValueError, match="this stream belongs to another model"):
        toy_recognizer().decode_streams(streams)
    with pytest.raises(StreamError, match="cannot be reset by the thread that is decoding it"):
        toy.decode_streams(streams)


@pytest.mark.parametrize("options", [{"beam_size": 5}, {}, 0, "greedy"])
def test_options_of_another_type_are_refused(toy, options):
    calls = (lambda own: toy.transcribe(np.zeros(9), options=own), lambda own: Transcriber(toy, options=own))
    for take in (toy.create_stream, toy.create_recording_stream, *calls):
        with pytest.raises(ValueError, match="options must be DecodingOptions or None, got "):
            take(options)
    with pytest.raises(ValueError, match="vad must be a VoiceActivityDetector or None, got 5"):
        toy.transcribe(np.zeros(9), vad=5)
