"""Streams that are decoded together have the same results as separately."""

import dataclasses
import gc

import numpy as np
import onnxruntime
import pytest
from feeding import CHUNKED, RATE, TINY, check_equal, feed, feed_together
from tones import say

from u2moe.runtime import Recognizer, SessionSettings
from u2moe.runtime.model.device import DeviceArray
from u2moe.runtime.model.encoder import join_rows, split_rows

pytestmark = pytest.mark.slow


def test_many_streams_go_through_the_encoder_together(toy):
    sounds = [say("ABCD"[i % 4 :] + "ABCD", [0.2 + 0.1 * i] * (8 - i % 4))[0][: 30_000 + 1500 * i] for i in range(20)]
    expected = [feed(toy, samples) for samples in sounds]
    toy.model.session.batches.clear()
    assert feed_together(toy, sounds) == expected
    assert max(toy.model.session.batches) > 15
    toy.model.session.batches.clear()
    mixed = [(CHUNKED, dataclasses.replace(CHUNKED, chunk_size=8))[i % 2] for i in range(20)]
    feed_together(toy, sounds, mixed)
    assert 5 < max(toy.model.session.batches) <= 10
    toy.model.session.batches.clear()
    contexts = [(CHUNKED, dataclasses.replace(CHUNKED, num_left_chunks=-1))[i % 2] for i in range(20)]
    assert feed_together(toy, sounds, contexts) == expected  # the toy uses no context, but checks its cache
    assert 5 < max(toy.model.session.batches) <= 10


def loaded(bundle, **settings):
    return Recognizer(bundle, bundle.load(SessionSettings(**settings)))


@pytest.fixture(scope="module", params=["float32", "int8", "int8 alone"])
def recognizer(request, bundle, quantized):
    """Make recognisers of the tiny bundle: native kernels if installed, or only onnxruntime."""
    precision, _, alone = request.param.partition(" ")
    bundle = bundle if precision == "float32" else quantized(precision)
    return loaded(bundle, kernels="onnxruntime" if alone else None)


def check_all(found, expected):
    for own, other in zip(found, expected, strict=True):
        check_equal(own, other)


def test_recordings_of_like_length_share_a_call_with_full_context(recognizer, sound, monkeypatch):
    encoder, calls = recognizer.model.encoder, []
    step = encoder.step
    monkeypatch.setattr(
        encoder, "step", lambda chunk, *args, **options: calls.append(chunk.shape) or step(chunk, *args, **options)
    )
    lengths = [20_000, 50_000, 20_900, 52_000, 21_800, 51_000, 30_000]
    sounds = [np.roll(sound, 5000 * i)[:length] * (0.2 + 0.2 * i) for i, length in enumerate(lengths)]
    alone = [recognizer.transcribe(samples).segments for samples in sounds]
    calls.clear()
    streams = [recognizer.create_recording_stream() for _ in sounds]
    for stream, samples in zip(streams, sounds, strict=True):
        stream.accept_waveform(RATE, samples)
        stream.input_finished()
    recognizer.decode_streams(streams)
    assert [batch for batch, *_ in calls] == [3, 1, 3]
    check_all([stream.take_segments() for stream in streams], alone)


@pytest.mark.parametrize("num_left_chunks", [2, 0, -1])
def test_batches_may_change_from_chunk_to_chunk(recognizer, sound, num_left_chunks):
    """Streams start, end, pause and change places: caches must stay with their stream. Their loudness differs, which
    would reveal shared scales of activations."""
    options, random = dataclasses.replace(TINY, num_left_chunks=num_left_chunks), np.random.default_rng(0)
    sounds = [np.roll(sound, 5000 * i)[: 30_000 + 4567 * i] * (0.2 + 0.2 * i) for i in range(5)]
    alone = [feed(recognizer, samples, options=options) for samples in sounds]
    streams = [recognizer.create_stream(options) for _ in sounds]
    segments = [[] for _ in sounds]
    parts = [list(np.array_split(samples, 5)) for samples in sounds]
    while any(parts):
        waiting = [i for i in range(5) if parts[i]]
        chosen = random.permutation(waiting)[: random.integers(1, len(waiting) + 1)].tolist()
        for i in chosen:
            streams[i].accept_waveform(RATE, parts[i].pop(0))
            if not parts[i]:
                streams[i].input_finished()
        recognizer.decode_streams([streams[i] for i in chosen])
        for i in chosen:
            segments[i] += streams[i].take_segments()
    check_all(segments, alone)


@pytest.mark.parametrize(("time", "nums_chunks"), [(1, (3, 9, 14, 22)), (3, (0, 1, 5, 6)), (4, (3, 150, 290, 301))])
def test_padding_of_caches_changes_no_bit(recognizer, time, nums_chunks):
    """Short chunks, with more keys than onnxruntime adds in one block."""
    encoder, rng = recognizer.model.encoder, np.random.default_rng(time)
    config = encoder.config
    num_frames = config.window + (time - 1) * config.subsampling_rate
    noise = [rng.normal(8, 3, (1, num_frames, config.feature_size)).astype(np.float32) for _ in nums_chunks]
    rows, alone = [], []
    for chunk, num_chunks in zip(noise, nums_chunks, strict=True):
        num_cached = num_chunks * time
        start = encoder.start()
        (cache,) = (cache for cache in start.layout if cache.time_axis is not None)
        shape = list(start.tensors[cache.name].shape)
        shape[cache.time_axis] = cache.num_frames(num_cached)
        tensors = start.tensors | {cache.name: rng.normal(size=shape).astype(np.float32)}
        caches = dataclasses.replace(start, offset=np.array([num_cached]), tensors=tensors)
        rows += split_rows(caches, [num_cached])
        alone.append(encoder.step(chunk, caches, required_cache_size=-1)[0])
    together, _ = encoder.step(np.concatenate(noise), join_rows(rows), required_cache_size=-1)
    np.testing.assert_array_equal(together, np.concatenate(alone))


@pytest.fixture(scope="module", params=["float32", "int8", "int8 alone", "falls back"])
def pair(request, bundle, quantized):
    """Make two recognisers of a bundle: one keeps values as arrays, the other in device memory."""
    bundle = quantized("int8") if request.param.startswith("int8") else bundle
    kernels, providers = "onnxruntime" if "alone" in request.param else None, ["CPUExecutionProvider"]
    if request.param == "falls back":  # a provider that leaves all nodes to the CPU
        if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has no provider that starts everywhere")
        providers.insert(0, "AzureExecutionProvider")
    bound = loaded(bundle, kernels=kernels, providers=providers, io_binding=True if len(providers) == 1 else None)
    return loaded(bundle, kernels=kernels), bound


@pytest.mark.parametrize(("num_left_chunks", "search"), [(2, "attention_rescoring"), (-1, "attention")])
def test_values_on_a_device_change_no_bit(pair, sound, num_left_chunks, search):
    options = dataclasses.replace(TINY, num_left_chunks=num_left_chunks, search=search, beam_size=4)
    whole = dataclasses.replace(options, chunk_size=None, num_left_chunks=-1)
    sounds = [np.roll(sound, 5000 * i)[: 30_000 + 4567 * i] for i in range(2 if search == "attention" else 4)]
    for call in (
        lambda recognizer: feed(recognizer, sound[:30_000], [1, 7000, 15_234, 160], options=options),
        lambda recognizer: feed_together(recognizer, sounds, [options] * len(sounds)),
        lambda recognizer: [recognizer.transcribe(samples, options=whole) for samples in sounds[:1]],
        lambda recognizer: [own.tolist() for own in recognizer.model.rescore(np.ones((9, 64)), [[5, 6], []])],
    ):
        expected, found = map(call, pair)
        assert found == expected


def test_device_memory_of_a_stream_is_its_own_rows_and_freed_with_it(pair, sound):
    _, recognizer = pair
    before = {id(item) for item in gc.get_objects() if type(item) is DeviceArray}
    streams = [recognizer.create_stream(TINY) for _ in range(5)]
    for number, stream in enumerate(streams):
        stream.accept_waveform(RATE, sound[: 20_000 + 4000 * number])
    recognizer.decode_streams(streams)
    idle, *others = streams
    for stream in others:
        stream.accept_waveform(RATE, sound[:15_000])
    recognizer.decode_streams(others)
    for tensor in idle.state.caches.views().values():
        assert isinstance(tensor, DeviceArray)
        assert tensor.tensor.shape()[1] == 1
    for output in idle.state.utterance._outputs[1:]:
        assert output.whole() is output
    del streams, others, idle, stream, tensor, output
    gc.collect()
    assert not [item for item in gc.get_objects() if type(item) is DeviceArray and id(item) not in before]


def test_utterances_that_end_together_are_rescored_together(recognizer, sound, monkeypatch):
    """Streams of similar length share a call, and get the same results as separately."""
    options = dataclasses.replace(TINY, endpoint=None)
    sounds = [sound[:40_000], sound[::-1][:40_000], sound[:15_000], 0.999 * sound[:40_000]]
    alone = [feed_together(recognizer, [samples], [options])[0] for samples in sounds]
    calls = []
    run = recognizer.model._decoder.run
    monkeypatch.setattr(recognizer.model._decoder, "run", lambda feeds: calls.append(len(feeds["hyps"])) or run(feeds))
    check_all(feed_together(recognizer, sounds, [options] * 4), alone)
    assert len(calls) < sum(calls) == 4
