"""The caches of the encoder, for one stream and for a batch. Runs no graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, eq=False)
class Caches:
    """The encoder's memory of the audio before a chunk, for a batch of streams. Never modified in place.

    Attributes:
        offset: position of the next chunk in encoder frames, int64 [batch].
        att: keys and values, float32 [blocks, batch, kv_heads, cache, 2*head_dim].
        cnn: last frames before the depthwise convolution, float32 [blocks, batch, conv_dim, kernel-1], or None.
    """

    offset: npt.NDArray[np.int64]
    att: npt.NDArray[np.float32]
    cnn: npt.NDArray[np.float32] | None


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

    def views(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """Views of `Caches.att` and `Caches.cnn` for this stream."""
        caches, index, _ = self.place
        first = caches.att.shape[3] - self.num_cached
        cnn = None if caches.cnn is None else caches.cnn[:, index : index + 1]
        return caches.att[:, index : index + 1, :, first:], cnn

    def leave(self) -> None:
        """Copy the row out of its batch."""
        att, cnn = self.views()
        own = Caches(offset=np.array([self.offset]), att=att.copy(), cnn=None if cnn is None else cnn.copy())
        self.place = (own, 0, ())


def split_rows(caches: Caches, num_cached: Sequence[int]) -> list[CacheRow]:
    """Caches of each stream of a batch, given the number of cached frames of each. Copies nothing."""
    mates: list[weakref.ref[CacheRow]] = []
    rows = [CacheRow(caches, index, num, mates) for index, num in enumerate(num_cached)]
    mates += map(weakref.ref, rows)
    return rows


def join_rows(rows: Sequence[CacheRow]) -> Caches:
    """Caches of several streams as a batch. Copies nothing if they are exactly the rows of one batch.

    Shorter attention caches are padded at the front. This is valid only if they reach back to the start of their
    stream: the padding is then at negative positions, which the graph masks. The streams of a batch must therefore have
    the same left context.
    """
    offset = np.array([row.offset for row in rows], np.int64)
    longest = max(row.num_cached for row in rows)
    places = [row.place for row in rows]
    last = places[0][0]
    if len(rows) == len(last.offset) and all(place[:2] == (last, index) for index, place in enumerate(places)):
        att = np.ascontiguousarray(last.att[:, :, :, last.att.shape[3] - longest :])
        return Caches(offset=offset, att=att, cnn=last.cnn)
    views = [row.views() for row in rows]
    blocks, _, heads, _, width = last.att.shape
    att = np.zeros((blocks, len(rows), heads, longest, width), np.float32)
    for index, (view, _) in enumerate(views):
        att[:, index : index + 1, :, longest - view.shape[3] :] = view
    cnn = [view for _, view in views if view is not None]
    mates = (reference() for _, _, references in places for reference in references)
    for left in {mate for mate in mates if mate is not None} - set(rows):
        left.leave()
    return Caches(offset=offset, att=att, cnn=np.concatenate(cnn, axis=1) if cnn else None)
