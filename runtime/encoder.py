"""The encoder over arrays: one step with explicit caches, and the windows that chunks are cut from. No audio here."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from u2moe.runtime.manifest import ModelConfig
    from u2moe.runtime.session import Session


@dataclass(frozen=True, kw_only=True, eq=False)
class Caches:
    """What an encoder remembers of a batch of streams. Never changed in place.

    Attributes:
        offset: encoder frames before the next chunk, its position: int64 [batch].
        att: keys and values, float32 [blocks, batch, kv_heads, cache, 2*head_dim].
        cnn: last frames before the depthwise convolution, float32 [blocks, batch, conv_dim, kernel-1], or None.
    """

    offset: npt.NDArray[np.int64]
    att: npt.NDArray[np.float32]
    cnn: npt.NDArray[np.float32] | None


class CacheRow:
    """Caches of one stream, as a row of those of a batch for as long as its streams go on together.

    So a batch that stays the same is neither taken apart nor joined between its chunks: with eight streams that took a
    tenth of the time. When it changes, `join_rows` copies rows, those of streams that are left behind too: no stream
    keeps the memory of others for long.

    Attributes:
        offset: encoder frames before the next chunk.
        num_cached: frames of keys and values. Before them the batch may hold more, at negative positions.
    """

    def __init__(self, caches: Caches, index: int, num_cached: int, mates: Sequence[weakref.ref[CacheRow]]) -> None:
        """Start as row `index` of `caches`, whose rows are `mates`."""
        self.place = (caches, index, mates)  # one attribute: another thread may move the row while it is read
        self.offset = int(caches.offset[index])
        self.num_cached = num_cached

    def begin_anew(self, num_frames: int) -> None:
        """Go on as if the stream had begun with its last `num_frames` frames: position zero is there."""
        self.offset = num_frames
        self.num_cached = min(num_frames, self.num_cached)

    def views(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """`Caches.att` and `Caches.cnn` of this stream alone, not copied."""
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
    """Caches of each stream of a batch, given how many of the cached frames are its own. Copies nothing."""
    mates: list[weakref.ref[CacheRow]] = []
    rows = [CacheRow(caches, index, num, mates) for index, num in enumerate(num_cached)]
    mates += map(weakref.ref, rows)
    return rows


def join_rows(rows: Sequence[CacheRow]) -> Caches:
    """Caches of several streams as those of a batch. Copies nothing if they are all that were split from one.

    Shorter attention caches are padded in front. That is only right where they reach back to the start of their stream:
    then the padding is at negative positions, which the graph leaves out. So a batch must share its left context.
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


class Encoder:
    """Encoder graph: features and caches in, encoder output and new caches out."""

    def __init__(self, session: Session, config: ModelConfig) -> None:
        self.session = session
        self.config = config

    def start(self, batch: int = 1) -> Caches:
        """Caches of streams that have heard nothing."""
        config = self.config
        return Caches(
            offset=np.zeros(batch, np.int64),
            att=np.zeros((config.num_blocks, batch, config.num_kv_heads, 0, config.kv_dim), np.float32),
            cnn=(
                np.zeros((config.num_blocks, batch, config.conv_dim, config.conv_cache), np.float32)
                if config.convolution
                else None
            ),
        )

    def step(
        self,
        chunk: npt.NDArray[np.float32],
        caches: Caches,
        *,
        required_cache_size: int,
        chunk_lens: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.float32], Caches]:
        """Encode one chunk of every stream of a batch.

        When the left context is bounded, a position that would pass `config.max_position` is moved back first. Keys are
        cached without positions, so cached frames and their distances stay what they were.

        Args:
            chunk: features [batch, frames, mel], at least `config.window` frames.
            caches: from `start` or the step before.
            required_cache_size: encoder frames of left context to keep for the next step; negative: all.
            chunk_lens: valid frames of each row [batch]; None: all.

        Returns:
            Encoder output [batch, time, dim], and the caches for the next step.
        """
        config = self.config
        num_rows, num_frames = chunk.shape[:2]
        feeds: dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int64]] = {
            "chunk": chunk,
            "chunk_lens": np.full(num_rows, num_frames, np.int64) if chunk_lens is None else chunk_lens,
        }
        if not config.streaming:
            whole: npt.NDArray[np.float32] = self.session.run(feeds)["output"]
            return whole, caches
        offset = caches.offset
        if required_cache_size >= 0:
            time = (num_frames - config.window) // config.subsampling_rate + 1
            based = max(caches.att.shape[3], config.conv_cache)
            offset = np.where(offset + time > config.max_position, np.minimum(offset, based), offset)
        feeds["offset"] = offset
        feeds["required_cache_size"] = np.array(required_cache_size, np.int64)
        feeds["att_cache"] = caches.att
        if caches.cnn is not None:
            feeds["cnn_cache"] = caches.cnn
        result = self.session.run(feeds)
        return result["output"], Caches(
            offset=offset + result["output_lens"], att=result["r_att_cache"], cnn=result.get("r_cnn_cache")
        )

    def whole(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Encode one utterance [frames, mel] with full context in one call: [time, dim]."""
        if len(features) < self.config.window:
            return np.zeros((0, self.config.output_size), np.float32)
        output, _ = self.step(features[np.newaxis], self.start(), required_cache_size=0)
        first: npt.NDArray[np.float32] = output[0]
        return first

    def chunked(
        self, features: npt.NDArray[np.float32], chunk_size: int, num_left_chunks: int
    ) -> npt.NDArray[np.float32]:
        """Encode one utterance [frames, mel] chunk by chunk, as a stream does: [time, dim]."""
        windows = Windows(self.config, chunk_size)
        windows.accept(features)
        windows.finish()
        outputs = [np.zeros((0, self.config.output_size), np.float32)]
        caches = self.start()
        while (window := windows.take()) is not None:
            output, caches = self.step(
                window[np.newaxis], caches, required_cache_size=required_cache_size(chunk_size, num_left_chunks)
            )
            outputs.append(output[0])
        return np.concatenate(outputs)


def required_cache_size(chunk_size: int, num_left_chunks: int) -> int:
    """Encoder frames of left context; -1: all."""
    return chunk_size * num_left_chunks if num_left_chunks >= 0 else -1


def check_chunks(config: ModelConfig, chunk_size: int, num_left_chunks: int) -> None:
    """Refuse chunks that make no sense (ValueError), or that the encoder cannot do (StreamError)."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if num_left_chunks < -1:
        raise ValueError(f"num_left_chunks must be at least 0, or -1 for all, got {num_left_chunks}")
    if not config.streaming:
        raise StreamError("this bundle's encoder cannot stream: it was trained for full context (chunk_size=None)")


class Windows:
    """Cuts features into the overlapping windows that chunks of `chunk_size` encoder frames are computed from.

    Windows start every `chunk_size * subsampling_rate` frames and are `(chunk_size-1) * subsampling_rate +
    right_context + 1` frames long; the last may be shorter, but less than `right_context + 1` yields nothing.
    With `chunk_size` None there is one window: all features, once they are finished.

    Attributes:
        length: frames of a window that is not the last.
        stride: frames from the start of one window to that of the next.
    """

    def __init__(self, config: ModelConfig, chunk_size: int | None) -> None:
        num_frames = sys.maxsize if chunk_size is None else chunk_size * config.subsampling_rate
        self.length = num_frames - config.subsampling_rate + config.window
        self.stride = num_frames
        self._shortest = config.window
        self._parts: list[npt.NDArray[np.float32]] = []
        self._num_frames = 0
        self._skip = 0
        self._finished = False

    def accept(self, features: npt.NDArray[np.float32]) -> None:
        """Append features [frames, mel]."""
        # A stride longer than the window (never for the convolutions of WeNet) leaves frames to skip.
        skipped = min(self._skip, len(features))
        self._skip -= skipped
        if len(features) > skipped:
            self._parts.append(features[skipped:])
            self._num_frames += len(features) - skipped

    def finish(self) -> None:
        """Say that no features follow, so that the last window may be short."""
        self._finished = True

    @property
    def ready(self) -> bool:
        """Whether `take` returns a window."""
        return self._num_frames >= (self._shortest if self._finished else self.length)

    def take(self) -> npt.NDArray[np.float32] | None:
        """The next window [frames, mel], or None before there is one."""
        if not self.ready:
            return None
        frames = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        rest = frames[self.stride :]
        self._skip = 0 if self._finished else max(self.stride - len(frames), 0)
        self._parts = [rest] if len(rest) else []
        self._num_frames = len(rest)
        return frames[: self.length]

    def put_back(self, features: npt.NDArray[np.float32]) -> None:
        """Features [frames, mel] before those that are left: the next window begins with them."""
        self._parts.insert(0, features)
        self._num_frames += len(features)
