import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime import Bundle
from u2moe.runtime.bundle.contract import Cache
from u2moe.runtime.errors import StreamError
from u2moe.runtime.model.encoder import Caches, Windows, check_chunks, join_rows, required_cache_size, split_rows


def features(num_frames, seed=0):
    return np.random.default_rng(seed).standard_normal((num_frames, 80)).astype(np.float32) * 2 + 8


def upstream_windows(num_frames, chunk_size, subsampling, right_context):
    """Return start and end of every window, as in WeNet's forward_chunk_by_chunk."""
    context = right_context + 1
    window, stride = (chunk_size - 1) * subsampling + context, chunk_size * subsampling
    return [(s, min(s + window, num_frames)) for s in range(0, num_frames - context + 1, stride)]


@given(
    num_frames=st.integers(0, 200), chunk_size=st.integers(1, 20),
    sizes=st.sampled_from([(4, 6), (6, 10), (8, 14), (1, 0)]), splits=st.lists(st.integers(0, 80), max_size=20),
)  # fmt: skip
def test_windows_of_any_split_are_upstreams(bundle, num_frames, chunk_size, sizes, splits):
    config = dataclasses.replace(bundle.manifest.model, subsampling_rate=sizes[0], right_context=sizes[1])
    frames = np.arange(num_frames, dtype=np.float32)[:, None]
    windows, found, start = Windows(config, chunk_size), [], 0
    for length in [*splits, num_frames]:
        windows.accept(frames[start : start + length])
        start = min(start + length, num_frames)
        while windows.ready():
            found.append(windows.take()[:, 0])
        assert windows.take() is None
    windows.finish()
    while (window := windows.take()) is not None:
        found.append(window[:, 0])
    expected = upstream_windows(num_frames, chunk_size, *sizes)
    assert [(int(w[0]), int(w[-1]) + 1) for w in found] == expected
    assert all(np.array_equal(w, np.arange(w[0], w[0] + len(w))) for w in found)


def test_whole_utterances_are_one_window_and_some_chunks_refused(bundle):
    windows = Windows(bundle.manifest.model, None)
    windows.accept(features(500))
    assert windows.take() is None
    windows.finish()
    assert windows.take().shape == (500, 80)
    assert windows.take() is None
    windows = Windows(bundle.manifest.model, None)
    windows.accept(features(6))
    windows.finish()
    assert windows.take() is None
    config = bundle.manifest.model
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        check_chunks(config, 0, -1)
    with pytest.raises(ValueError, match="num_left_chunks must be"):
        check_chunks(config, 16, -2)
    with pytest.raises(StreamError, match="cannot stream"):
        check_chunks(dataclasses.replace(config, streaming=False), 16, -1)
    assert [required_cache_size(16, n) for n in (-1, 0, 4)] == [-1, 0, 64]


def test_cache_of_bounded_left_context_may_be_padded_at_the_front(model):
    """Cached frames at negative positions do not exist; streams of different age can therefore share a batch."""
    chunk = features(67)[None]
    _output, caches = model.encoder.step(chunk, model.encoder.start(), required_cache_size=32)
    att = caches.tensors["att_cache"]
    att = np.concatenate((np.full((*att.shape[:3], 32 - 16, att.shape[4]), 7.0, np.float32), att), axis=3)
    padded = dataclasses.replace(caches, tensors=caches.tensors | {"att_cache": att})
    chunk = features(67, seed=1)[None]
    grown, _ = model.encoder.step(chunk, caches, required_cache_size=32)
    fixed, _ = model.encoder.step(chunk, padded, required_cache_size=32)
    # The same sums over more terms, which are exactly zero: only the order of rounding may differ.
    np.testing.assert_allclose(fixed, grown, atol=2e-6)


def caches_of(seed, batch, num_cached, offset=100):
    rng = np.random.default_rng(seed)
    return Caches(
        offset=np.arange(batch) + offset,
        tensors={
            "att_cache": rng.random((3, batch, 2, num_cached, 4), np.float32),
            "half_cache": rng.random((2, batch, 2, (num_cached + 1) // 2, 4), np.float32),
            "cnn_cache": rng.random((3, batch, 5, 6), np.float32),
        },
        layout=(
            Cache(name="att_cache", num_blocks=3, shape=(2, 0, 4)),
            Cache(name="half_cache", num_blocks=2, shape=(2, 0, 4), rate=0.5),
            Cache(name="cnn_cache", num_blocks=3, shape=(5, 6)),
        ),
    )


def test_a_batch_that_stays_is_not_copied_and_a_stream_that_begins_anew_forgets():
    caches = caches_of(0, 3, 8)
    joined = join_rows(split_rows(caches, [8, 5, 8]))
    for name, tensor in caches.tensors.items():
        assert np.shares_memory(joined.tensors[name], tensor)
        assert joined.tensors[name].shape == tensor.shape
    assert joined.offset.tolist() == [100, 101, 102]
    caches = caches_of(0, 2, 8)
    rows = split_rows(caches, [8, 8])
    rows[0].begin_anew(3)
    assert join_rows(rows).offset.tolist() == [3, 101]
    rows[1].begin_anew(5)
    joined = join_rows(rows)
    assert joined.offset.tolist() == [3, 5]
    # five frames: earlier ones are not needed
    assert np.array_equal(joined.tensors["att_cache"], caches.tensors["att_cache"][:, :, :, 3:])
    assert np.array_equal(joined.tensors["half_cache"], caches.tensors["half_cache"][:, :, :, 1:])
    rows[0].begin_anew(20)
    assert (rows[0].offset, rows[0].num_cached) == (20, 3)


@pytest.mark.parametrize("order", [[0, 1], [2, 1, 0], [1, 2, 3, 0], [0, 1, 2, 4]])
def test_another_batch_is_copied_with_the_rows_it_leaves_behind(order):
    caches, other = caches_of(0, 4, 8), caches_of(1, 1, 6)
    rows = [*split_rows(caches, [8, 5, 8, 8]), *split_rows(other, [6])]
    joined = join_rows([rows[index] for index in order])
    left = [rows[index] for index in range(4) if index not in order]
    del rows
    for place, index in enumerate(order):
        num = [8, 5, 8, 8, 6][index]
        source, row = (caches, index) if index < 4 else (other, 0)
        for name, length in (("att_cache", num), ("half_cache", (num + 1) // 2)):
            found, expected = joined.tensors[name][:, place], source.tensors[name][:, row]
            assert np.array_equal(found[:, :, found.shape[2] - length :], expected[:, :, -length:])
            assert not found[:, :, : found.shape[2] - length].any()
        assert np.array_equal(joined.tensors["cnn_cache"][:, place], source.tensors["cnn_cache"][:, row])
        assert joined.offset[place] == source.offset[row]
    for row in left:
        index = row.offset - 100
        own, all_rows = row.views(), {name: tensor[:, index : index + 1] for name, tensor in caches.tensors.items()}
        assert np.array_equal(own["att_cache"], all_rows["att_cache"][:, :, :, 8 - row.num_cached :])
        assert np.array_equal(own["cnn_cache"], all_rows["cnn_cache"])
        assert not any(np.shares_memory(own[name], tensor) for name, tensor in caches.tensors.items())


@pytest.fixture
def limited(export_quickly, golden_checkpoint, tmp_path):
    """A function from a largest position to a moe_tiny encoder with that limit."""

    def encoder(max_position):
        folder = export_quickly(golden_checkpoint("moe_tiny"), tmp_path / str(max_position), max_position=max_position)
        return Bundle.open(folder).load().encoder

    return encoder


def test_position_is_moved_back_when_left_context_is_bounded_but_not_below_what_is_cached(model, limited):
    encoder = limited(100)
    caches, offsets = encoder.start(), []
    for seed in range(40):
        before = caches
        output, caches = encoder.step(features(67, seed)[None], caches, required_cache_size=32)
        offsets.append(int(caches.offset[0]))
        assert np.isfinite(output).all()
        assert caches.tensors["att_cache"].shape[3] == min(16 * (seed + 1), 32)
        if offsets[-1] < int(before.offset[0]):
            moved = dataclasses.replace(before, offset=np.array([32]))
            expected, _ = model.encoder.step(features(67, seed)[None], moved, required_cache_size=32)
            assert np.array_equal(output, expected)
    assert max(offsets) <= 100
    assert offsets[:8] == [16, 32, 48, 64, 80, 96, 48, 64]
    encoder = limited(1)
    for left, based in ((0, model.config.caches[1].shape[1]), (16, 16), (4096, None)):
        caches = encoder.start()
        for seed in range(4):
            _, caches = encoder.step(features(67, seed)[None], caches, required_cache_size=left)
            expected = 16 * (seed + 1) if based is None else min(16 * seed, based) + 16
            assert caches.offset.tolist() == [expected]


def test_a_program_that_counts_frames_without_limit_gets_the_same_output(limited):
    encoder = limited(100)
    for chunk, left in ((16, 32), (8, 0), (25, 50)):
        caches = counted = encoder.start()
        for seed in range(40):
            window = features(4 * chunk + 3, seed)[None]
            expected, caches = encoder.step(window, caches, required_cache_size=left)
            output, after = encoder.step(window, counted, required_cache_size=left)
            counted = dataclasses.replace(after, offset=counted.offset + chunk)
            np.testing.assert_array_equal(output, expected)
        assert counted.offset.tolist() == [40 * chunk]
        assert caches.offset[0] <= 100


@pytest.mark.slow
def test_position_goes_on_when_left_context_is_not_bounded(model, limited):
    assert np.array_equal(limited(20).chunked(features(400), 16, -1), model.encode(features(400), 16, -1))
