import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime import Bundle
from u2moe.runtime.bundle.contract import Cache
from u2moe.runtime.model.encoder import Caches, Windows, join_rows, split_rows


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
    assert [(int(w[0]), int(w[-1]) + 1) for w in found] == upstream_windows(num_frames, chunk_size, *sizes)
    assert all(np.array_equal(w, np.arange(w[0], w[0] + len(w))) for w in found)


def test_a_batch_that_stays_is_not_copied_and_the_rows_that_it_leaves_behind_are():
    """A stream that waits does not keep the memory of others. A stream that begins again forgets earlier frames."""
    random, shapes = np.random.default_rng(0), {"att_cache": (3, 3, 2, 8, 4), "half_cache": (2, 3, 2, 4, 4)}
    tensors = {name: random.random(shape) for name, shape in {**shapes, "cnn_cache": (3, 3, 5, 6)}.items()}
    layout = (
        Cache(name="att_cache", num_blocks=3, shape=(2, 0, 4)),
        Cache(name="half_cache", num_blocks=2, shape=(2, 0, 4), rate=0.5),
        Cache(name="cnn_cache", num_blocks=3, shape=(5, 6)),
    )
    caches = Caches(offset=np.arange(100, 103), tensors=tensors, layout=layout)
    rows = split_rows(caches, [8, 5, 8])
    joined = join_rows(rows)
    assert joined.offset.tolist() == [100, 101, 102]
    for name, tensor in tensors.items():
        assert np.shares_memory(joined.tensors[name], tensor)
        assert joined.tensors[name].shape == tensor.shape
    for row in rows:
        row.begin_anew(3)
    joined = join_rows(rows)
    assert joined.offset.tolist() == [3, 3, 3]
    firsts = {"att_cache": 5, "half_cache": 2, "cnn_cache": 0}
    for name, first in firsts.items():
        assert np.array_equal(joined.tensors[name], tensors[name][:, :, :, first:])
    rows[0].begin_anew(20)
    assert (rows[0].offset, rows[0].num_cached) == (20, 3)
    join_rows(rows[:2][::-1])
    for name, own in rows[2].views().items():
        assert np.array_equal(own, tensors[name][:, 2:, :, firsts[name] :])
        assert not np.shares_memory(own, tensors[name])


@pytest.fixture(scope="module")
def limited(export_quickly, golden_checkpoint, tmp_path_factory):
    @functools.cache
    def encoder(max_position):
        folder = tmp_path_factory.mktemp("limited") / "bundle"
        path = export_quickly(golden_checkpoint("moe_tiny"), folder, max_position=max_position)
        return Bundle.open(path).load().encoder

    return encoder


def test_positions_are_moved_back_when_left_context_is_bounded_but_not_below_what_is_cached(model, limited):
    encoder = limited(100)
    caches, offsets = encoder.start(), []
    for seed in range(10):
        before = caches
        output, caches = encoder.step(features(67, seed)[None], caches, required_cache_size=32)
        counted = dataclasses.replace(before, offset=np.array([16 * seed]))  # as programs do that count without limit
        assert np.array_equal(encoder.step(features(67, seed)[None], counted, required_cache_size=32)[0], output)
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
