import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from u2moe.runtime import AudioError, DecodingOptions, Recognizer, StreamError
from u2moe.runtime.model.model import Model

CHUNKED = DecodingOptions(chunk_size=16, num_left_chunks=2)


def recognise(recognizer, samples, splits=(), *, options=CHUNKED, rate=16_000, stream=None):
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
@settings(max_examples=15)
@given(
    splits=st.lists(st.integers(0, 9000), max_size=15),
    rate=st.sampled_from([16_000, 8000, 44_100]),
    search=st.sampled_from(["attention_rescoring", "ctc_prefix_beam", "ctc_greedy"]),
)
def test_any_split_gives_the_same_result(recognizer, sound, splits, rate, search):
    options = dataclasses.replace(CHUNKED, search=search)
    whole = recognise(recognizer, sound, options=options, rate=rate)
    assert whole.text
    assert recognise(recognizer, sound, splits, options=options, rate=rate) == whole


@pytest.mark.parametrize("num_samples", [0, 1, 399, 400, 1359, 1360, 5000, 11_119, 11_120, 11_121, 17_000])
@pytest.mark.parametrize("chunk_size", [1, 16])
def test_a_stream_hears_every_frame_that_the_file_has(recognizer, sound, num_samples, chunk_size):
    options = DecodingOptions(chunk_size=chunk_size, search="ctc_prefix_beam")
    stream = recognizer.create_stream(options)
    result = recognise(recognizer, sound[:num_samples], stream=stream)
    num_frames = (num_samples - 400) // 160 + 1 if num_samples >= 400 else 0
    assert stream.state.utterance.end == max((num_frames - 7) // 4 + 1, 0)
    assert result.is_final
    assert recognizer.transcribe(sound[:num_samples], options=options).text == result.text


def test_partial_results_grow_and_the_final_one_is_rescored(recognizer, sound):
    stream = recognizer.create_stream(CHUNKED)
    assert not stream.get_result().is_final
    lengths = []
    for start in range(0, len(sound), 4000):
        stream.accept_waveform(16_000, sound[start : start + 4000])
        recognizer.decode_streams([stream])
        result = stream.get_result()
        assert not result.is_final
        assert stream.get_result() is result
        assert result.times == sorted(result.times)
        lengths.append(len(result.tokens))
    assert lengths[0] == 0
    assert lengths[-1] > 3
    first_pass = stream.state.utterance.search.hypotheses()
    stream.input_finished()
    recognizer.decode_streams([stream])
    final = stream.get_result()
    assert final.is_final
    assert final.confidence is not None
    assert len(final.nbest) == 10
    assert final.nbest[0].attention_score is not None
    assert [a.score for a in final.nbest] == sorted((a.score for a in final.nbest), reverse=True)
    assert len(first_pass) == 10


def test_a_stream_is_not_used_after_its_end_but_after_a_reset(recognizer, sound):
    stream = recognizer.create_stream()
    stream.accept_waveform(16_000, sound)
    stream.input_finished()
    with pytest.raises(StreamError, match="finished: reset the stream"):
        stream.accept_waveform(16_000, sound)
    assert stream.duration == len(sound) / 16_000  # nothing was appended
    with pytest.raises(StreamError, match="already finished"):
        stream.input_finished()
    recognizer.decode_streams([stream])
    with pytest.raises(StreamError, match="finished"):
        stream.accept_waveform(16_000, sound)
    expected = recognise(recognizer, sound[:30_000])
    stream = recognizer.create_stream(CHUNKED)
    recognise(recognizer, sound[10_000:], stream=stream)
    stream.reset()
    assert stream.get_result().text == ""
    assert recognise(recognizer, sound[:30_000], stream=stream) == expected
    stream.reset()
    stream.accept_waveform(44_100, sound)  # another utterance may have another rate
    stream.reset()
    assert recognise(recognizer, sound[:30_000], stream=stream) == expected


def test_bad_samples_change_nothing_and_some_bundles_cannot_stream(recognizer, sound, bundle, model):
    expected = recognise(recognizer, sound)
    stream = recognizer.create_stream(CHUNKED)
    stream.accept_waveform(16_000, sound[:20_000])
    for bad in (np.full(5, np.nan, np.float32), np.zeros((5, 2), np.float32), np.zeros(5, np.int32)):
        with pytest.raises(AudioError):
            stream.accept_waveform(16_000, bad)
    with pytest.raises(AudioError, match="sample rate changed from 16000 to 8000"):
        stream.accept_waveform(8000, sound)
    assert recognise(recognizer, sound[20_000:], stream=stream) == expected
    config = dataclasses.replace(model.config, streaming=False)
    offline = Model(
        dataclasses.replace(bundle.manifest, model=config), model.encoder.session, model._ctc, model._decoder
    )
    recognizer = Recognizer(bundle, offline)
    with pytest.raises(StreamError, match="cannot stream"):
        recognizer.create_stream()
    with pytest.raises(StreamError, match="cannot stream"):
        recognizer.transcribe(np.zeros(9000, np.float32), options=CHUNKED)


def test_int16_is_recognised_as_float_and_decoding_again_does_nothing(recognizer, sound):
    as_int16 = (sound * 32767).astype(np.int16)
    as_float = as_int16.astype(np.float32) / 32768
    assert recognise(recognizer, as_int16) == recognise(recognizer, as_float)
    stream = recognizer.create_stream(CHUNKED)
    result = recognise(recognizer, sound, stream=stream)
    recognizer.decode_streams([stream, stream])
    recognizer.decode_streams([])
    assert stream.get_result() is result


@pytest.mark.slow
def test_a_long_stream_keeps_its_size(export_quickly, golden_checkpoint, tmp_path, sound):
    """After three minutes, caches and state are as large as after ten seconds."""
    recognizer = Recognizer.from_pretrained(
        export_quickly(golden_checkpoint("moe_tiny"), tmp_path / "bundle", max_position=300)
    )
    stream = recognizer.create_stream(DecodingOptions(chunk_size=64, num_left_chunks=1, search="ctc_greedy"))
    offsets = []
    for _ in range(45):
        stream.accept_waveform(16_000, sound)
        recognizer.decode_streams([stream])
        offsets.append(stream.state.caches.offset)
        assert stream.state.caches.num_cached <= 64
        assert stream.state.caches.place[0].tensors["att_cache"].shape[3] <= 64
        assert stream.state.extractor._windows._num_frames < 400
        assert sum(map(len, stream.state.utterance._outputs)) == 0
    assert max(offsets) <= 300
    assert stream.state.utterance.end > 4400
    assert stream.duration == 180.0


@pytest.mark.parametrize("rate", [8000, 44_100])
def test_the_last_samples_of_another_rate_are_heard_too(recognizer, sound, rate):
    """The filter of the resampler keeps some samples until the end."""
    stream = recognizer.create_stream()
    stream.accept_waveform(rate, sound)
    held_back = len(sound) / rate - stream.duration
    stream.input_finished()
    assert held_back > 0.001
    assert stream.duration == pytest.approx(len(sound) / rate, abs=1e-4)
