"""The caches of the encoder, for one stream and for a batch. Runs no graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.contract import Cache


@dataclass(frozen=True, kw_only=True, eq=False)
class Caches:
    """The encoder's memory of the audio before a chunk, for a batch of streams. Never modified in place.

    Attributes:
        offset: position of the next chunk in encoder frames, int64 [batch].
        tensors: what the manifest lists, by name, float32 [blocks, batch, ...].
        layout: the manifest's list.
    """

    offset: npt.NDArray[np.int64]
    tensors: dict[str, npt.NDArray[np.float32]]
    layout: tuple[Cache, ...]

    def last(self, num_cached: int, rows: slice = slice(None)) -> dict[str, npt.NDArray[np.float32]]:
        """Views of some rows, where an axis grows with time of its frames for the last `num_cached` encoder frames."""
        views = {}
        for cache in self.layout:
            view = self.tensors[cache.name][:, rows]
            if cache.time_axis is not None:
                surplus = max(view.shape[cache.time_axis] - cache.num_frames(num_cached), 0)
                view = view[(slice(None),) * cache.time_axis + (slice(surplus, None),)]
            views[cache.name] = view
        return views


class CacheRow:
    """Caches of one stream, as a row in the caches of its batch for as long as the batch stays the same.

    An unchanged batch is neither split nor joined between chunks, which took a tenth of the time with eight streams.
    When it changes, `join_rows` copies the rows, including those of streams that have left, so that no stream keeps
    the memory of others alive.

    Attributes:
        offset: encoder frames before the next chunk.
        num_cached: frames of keys and values. The batch may hold padding before them, at negative positions.
    """

    def __init__(self, caches: Caches, index: int, num_cached: int, mates: Sequence[weakref.ref[CacheRow]]) -> None:
        """Start as row `index` of `caches`, whose rows are `mates`."""
        self.place = (caches, index, mates)  # a single attribute, because another thread may move the row during a read
        self.offset = int(caches.offset[index])
        self.num_cached = num_cached

    def begin_anew(self, num_frames: int) -> None:
        """Continue as if the stream had begun with its last `num_frames` frames, the first at position zero."""
        self.offset = num_frames
        self.num_cached = min(num_frames, self.num_cached)

    def views(self) -> dict[str, npt.NDArray[np.float32]]:
        """Views of `Caches.tensors` for this stream."""
        caches, index, _ = self.place
        return caches.last(self.num_cached, slice(index, index + 1))

    def leave(self) -> None:
        """Copy the row out of its batch."""
        own = {name: view.copy() for name, view in self.views().items()}
        self.place = (Caches(offset=np.array([self.offset]), tensors=own, layout=self.place[0].layout), 0, ())


def split_rows(caches: Caches, num_cached: Sequence[int]) -> list[CacheRow]:
    """Caches of each stream of a batch, given the number of cached frames of each. Copies nothing."""
    mates: list[weakref.ref[CacheRow]] = []
    rows = [CacheRow(caches, index, num, mates) for index, num in enumerate(num_cached)]
    mates += map(weakref.ref, rows)
    return rows


def join_rows(rows: Sequence[CacheRow]) -> Caches:
    """Caches of several streams as a batch. Copies nothing if they are exactly the rows of one batch.

    Shorter caches of keys and values are padded at the front. This is valid only if they reach back to the start of
    their stream: the padding is then at negative positions, which the graph masks. The streams of a batch must
    therefore have the same left context.
    """
    offset = np.array([row.offset for row in rows], np.int64)
    longest = max(row.num_cached for row in rows)
    places = [row.place for row in rows]
    last = places[0][0]
    if len(rows) == len(last.offset) and all(place[:2] == (last, index) for index, place in enumerate(places)):
        tensors = {name: np.ascontiguousarray(view) for name, view in last.last(longest).items()}
        return Caches(offset=offset, tensors=tensors, layout=last.layout)
    views = [row.views() for row in rows]
    tensors = {cache.name: _joined(cache, [view[cache.name] for view in views]) for cache in last.layout}
    mates = (reference() for _, _, references in places for reference in references)
    for left in {mate for mate in mates if mate is not None} - set(rows):
        left.leave()
    return Caches(offset=offset, tensors=tensors, layout=last.layout)


def _joined(cache: Cache, rows: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """Rows as a batch, shorter ones padded at the front."""
    if (axis := cache.time_axis) is None:
        return np.concatenate(rows, axis=1)
    shape = list(rows[0].shape)
    shape[1], shape[axis] = len(rows), max(row.shape[axis] for row in rows)
    joined = np.zeros(shape, np.float32)
    for index, row in enumerate(rows):
        place = [slice(None)] * len(shape)
        place[1], place[axis] = slice(index, index + 1), slice(shape[axis] - row.shape[axis], None)
        joined[tuple(place)] = row
    return joined
