"""Encodes features: one chunk with explicit caches, or a whole utterance. Also divides features into windows."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.contract import Cache
from u2moe.runtime.bundle.manifest import ModelConfig
from u2moe.runtime.errors import StreamError
from u2moe.runtime.model.device import Value, joined
from u2moe.runtime.model.session import Session


class Encoder:
    """The encoder graph. It maps features and caches to encoder output and new caches."""

    runner: object

    def __init__(self, session: Session, config: ModelConfig) -> None:
        self.session = self.runner = session
        self.config = config

    @property
    def sessions(self) -> tuple[Session, ...]:
        """Sessions that run the graph; empty for an external runner."""
        return (self.runner,) if isinstance(self.runner, Session) else ()

    @property
    def providers(self) -> tuple[str, ...]:
        """Execution providers in use. For an external runner, this is the name of its class."""
        return self.runner.providers if isinstance(self.runner, Session) else (type(self.runner).__name__,)

    def start(self, batch: int = 1) -> Caches:
        """Return the caches of `batch` streams before their first chunk."""
        shapes = {cache.name: (cache.num_blocks, batch, *cache.shape) for cache in self.config.caches}
        tensors: dict[str, Value] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return Caches(offset=np.zeros(batch, np.int64), tensors=tensors, layout=self.config.caches)

    def step(
        self,
        chunk: npt.NDArray[np.float32],
        caches: Caches,
        *,
        required_cache_size: int,
        chunk_lens: npt.NDArray[np.int64] | None = None,
    ) -> tuple[Value, Caches]:
        """Encode one chunk of every stream in a batch. Returns output [batch, time, dim] and the next caches.

        Both are on the host, or both are on the device.

        Args:
            chunk: features [batch, frames, mel], at least `config.window` frames.
            caches: from `start` or the previous step.
            required_cache_size: number of encoder frames of left context to keep for the next step; negative: all.
            chunk_lens: number of valid frames in each row [batch]; None: all frames are valid.
        """
        lens = np.full(len(chunk), chunk.shape[1], np.int64) if chunk_lens is None else chunk_lens
        feeds: dict[str, Value | npt.NDArray[np.int64]] = {"chunk": chunk, "chunk_lens": lens}
        if not self.config.streaming:
            return self.session.run(feeds)["output"], caches
        feeds |= {"offset": caches.offset, "required_cache_size": np.array(required_cache_size, np.int64)}
        result = self.session.run(feeds | caches.tensors)
        tensors = {name: result[f"r_{name}"] for name in caches.tensors}
        return result["output"], Caches(offset=result["next_offset"], tensors=tensors, layout=caches.layout)

    def whole(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Encode one utterance [frames, mel] with full context in one call. Returns [time, dim]."""
        if len(features) < self.config.window:
            return np.zeros((0, self.config.output_size), np.float32)
        output, _ = self.step(features[np.newaxis], self.start(), required_cache_size=0)
        return np.asarray(output[0])

    def chunked(
        self, features: npt.NDArray[np.float32], chunk_size: int, num_left_chunks: int
    ) -> npt.NDArray[np.float32]:
        """Encode one utterance [frames, mel] chunk by chunk, as in a stream. Returns [time, dim]."""
        windows = Windows(self.config, chunk_size)
        windows.accept(features)
        windows.finish()
        outputs = [np.zeros((0, self.config.output_size), np.float32)]
        caches, required = self.start(), required_cache_size(chunk_size, num_left_chunks)
        while (window := windows.take()) is not None:
            output, caches = self.step(window[np.newaxis], caches, required_cache_size=required)
            outputs.append(np.asarray(output[0]))
        return np.concatenate(outputs)


def required_cache_size(chunk_size: int, num_left_chunks: int) -> int:
    """Return the number of encoder frames of left context; -1: all."""
    return chunk_size * num_left_chunks if num_left_chunks >= 0 else -1


def check_chunks(config: ModelConfig, chunk_size: int, num_left_chunks: int) -> None:
    """Raise ValueError if a number is out of range, and StreamError if the encoder does not support these chunks."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if num_left_chunks < -1:
        raise ValueError(f"num_left_chunks must be at least 0, or -1 for all, got {num_left_chunks}")
    if not config.streaming:
        raise StreamError("this bundle's encoder cannot stream: it was trained for full context (chunk_size=None)")
    fixed = config.static
    if fixed is not None and (chunk_size != fixed.chunk_size or num_left_chunks not in (-1, fixed.num_left_chunks)):
        raise StreamError(
            f"this bundle supports only chunk_size {fixed.chunk_size} and num_left_chunks {fixed.num_left_chunks}, "
            f"got chunk_size {chunk_size} and num_left_chunks {num_left_chunks}"
        )
    if chunk_size % config.chunk_multiple:
        expected = f"a multiple of {config.chunk_multiple} for this encoder"
        raise StreamError(f"chunk_size must be {expected}, got {chunk_size}")


class Windows:
    """Divides features into overlapping windows, one for each chunk of `chunk_size` encoder frames.

    Windows start every `stride` frames, and are `length` frames long. The last one may be shorter, down to
    `config.window` frames. If `chunk_size` is None, there is one window with all features, available when the input is
    finished.

    With `knows_last`, `take` withholds a full window until it is known whether the window is the last. This is known
    once the next window is certain to follow, or once the input is finished.
    """

    def __init__(self, config: ModelConfig, chunk_size: int | None, *, knows_last: bool = False) -> None:
        self.length = sys.maxsize if chunk_size is None else config.num_features(chunk_size)
        self.stride = sys.maxsize if chunk_size is None else chunk_size * config.subsampling_rate
        self._shortest = config.window
        self._needed = self.stride + self._shortest if knows_last and chunk_size is not None else self.length
        self._parts: list[npt.NDArray[np.float32]] = []
        self._num_frames = 0
        self._finished = False

    def accept(self, features: npt.NDArray[np.float32]) -> None:
        """Append features [frames, mel]."""
        self._parts.append(features)
        self._num_frames += len(features)

    def finish(self) -> None:
        """Finish the input. The last window may then be shorter than the others."""
        self._finished = True

    def ready(self, num_more: int = 0) -> bool:
        """Return whether `take` would return a window after `num_more` more frames."""
        return self._num_frames + num_more >= (self._shortest if self._finished else self._needed)

    @property
    def num_missing(self) -> int:
        """Number of frames still needed for the next window."""
        return max(self._needed - self._num_frames, 0)

    def take(self) -> npt.NDArray[np.float32] | None:
        """Return the next window [frames, mel], or None if it is not complete yet."""
        if not self.ready():
            return None
        frames = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        self._parts = [frames[self.stride :]]
        self._num_frames = len(self._parts[0])
        return frames[: self.length]

    def put_back(self, features: npt.NDArray[np.float32]) -> None:
        """Put features [frames, mel] before the remaining ones, so that the next window begins with them."""
        self._parts.insert(0, features)
        self._num_frames += len(features)


@dataclass(frozen=True, kw_only=True, eq=False)
class Caches:
    """The encoder's memory of the audio before a chunk, for a batch of streams. Never modified in place."""

    offset: npt.NDArray[np.int64]  # position of the next chunk in encoder frames [batch]
    tensors: dict[str, Value]  # caches listed in the manifest, by name, float32 [blocks, batch, ...]
    layout: tuple[Cache, ...]  # their descriptions in the manifest
    log_probs: npt.NDArray[np.float32] | None = None  # of the previous chunk [batch, time, vocab], if any

    def last(self, num_cached: int, rows: slice = slice(None)) -> dict[str, Value]:
        """Return views of the caches in `rows`, with growing axes cut to the last `num_cached` encoder frames."""
        views = {}
        for cache in self.layout:
            view = self.tensors[cache.name][:, rows]
            if cache.time_axis is not None:
                surplus = max(view.shape[cache.time_axis] - cache.num_frames(num_cached), 0)
                view = view[(slice(None),) * cache.time_axis + (slice(surplus, None),)]
            views[cache.name] = view
        return views


class CacheRow:
    """Caches of one stream, stored as a row in the caches of its batch while the batch does not change.

    An unchanged batch is neither split nor joined between chunks. With eight streams, splitting and joining took 10 %
    of the total time. When the batch changes, `join_rows` copies all rows, including those of streams that have left
    the batch. A single row that was not copied would keep the memory of the whole batch alive.
    """

    def __init__(self, caches: Caches, index: int, num_cached: int, mates: Sequence[weakref.ref[CacheRow]]) -> None:
        """Create row `index` of `caches`; `mates` are references to all rows of these caches."""
        self.place = (caches, index, mates)  # a single attribute, because another thread may move the row during a read
        self.offset = int(caches.offset[index])  # encoder frames before the next chunk
        self.num_cached = num_cached  # frames of keys and values; padding before them is at negative positions

    def begin_anew(self, num_frames: int) -> None:
        """Continue as if the stream had begun with its last `num_frames` frames. Positions start at 0 again."""
        self.offset = num_frames
        self.num_cached = min(num_frames, self.num_cached)

    def views(self) -> dict[str, Value]:
        """Return views of `Caches.tensors` for this stream."""
        caches, index, _ = self.place
        return caches.last(self.num_cached, slice(index, index + 1))

    def leave(self) -> None:
        """Copy the row out of its batch."""
        own: dict[str, Value] = {name: view.copy() for name, view in self.views().items()}
        self.place = (Caches(offset=np.array([self.offset]), tensors=own, layout=self.place[0].layout), 0, ())


def split_rows(caches: Caches, num_cached: Sequence[int]) -> list[CacheRow]:
    """Return a row for each stream of a batch, given each stream's number of cached frames. Does not copy."""
    mates: list[weakref.ref[CacheRow]] = []
    rows = [CacheRow(caches, index, num, mates) for index, num in enumerate(num_cached)]
    mates += map(weakref.ref, rows)
    return rows


def join_rows(rows: Sequence[CacheRow]) -> Caches:
    """Return the caches of several streams as a batch. Nothing is copied if `rows` are all rows of one batch, in order.

    Shorter caches of keys and values are padded at the front. This is valid only if they reach back to the start of
    their stream: the padding is then at negative positions, which the graph masks. Therefore, the streams of a batch
    must have the same left context.
    """
    offset = np.array([row.offset for row in rows], np.int64)
    longest = max(row.num_cached for row in rows)
    places = [row.place for row in rows]
    last = places[0][0]
    if len(rows) == len(last.offset) and all(place[:2] == (last, index) for index, place in enumerate(places)):
        return Caches(offset=offset, tensors=last.last(longest), layout=last.layout)
    views = [row.views() for row in rows]
    tensors = {
        cache.name: joined([view[cache.name] for view in views], 1, padded=cache.time_axis, at_front=True)
        for cache in last.layout
    }
    mates = (reference() for _, _, references in places for reference in references)
    for left in {mate for mate in mates if mate is not None} - set(rows):
        left.leave()
    return Caches(offset=offset, tensors=tensors, layout=last.layout)
