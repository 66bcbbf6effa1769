"""The encoder over arrays: one step with explicit caches, and the windows that chunks are cut from. No audio here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from u2moe.runtime.manifest import ModelConfig
    from u2moe.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Caches:
    """What an encoder remembers of one stream, or of a batch of them. Never changed in place.

    Attributes:
        offset: encoder frames before the next chunk, its position: int64 [batch].
        att: keys and values, float32 [blocks, batch, kv_heads, cache, 2*head_dim].
        cnn: last frames before the depthwise convolution, float32 [blocks, batch, conv_dim, kernel-1], or None.
    """

    offset: npt.NDArray[np.int64]
    att: npt.NDArray[np.float32]
    cnn: npt.NDArray[np.float32] | None


def join_caches(caches: Sequence[Caches]) -> Caches:
    """Caches of several streams as those of a batch.

    Shorter attention caches are padded in front. That is only right where they reach back to the start of their stream:
    then the padding is at negative positions, which the graph leaves out. So a batch must share its left context.
    """
    longest = max(item.att.shape[3] for item in caches)
    blocks, _, heads, _, width = caches[0].att.shape
    att = np.zeros((blocks, len(caches), heads, longest, width), np.float32)
    for row, item in enumerate(caches):
        att[:, row, :, longest - item.att.shape[3] :] = item.att[:, 0]
    cnn = [item.cnn for item in caches if item.cnn is not None]
    return Caches(
        offset=np.concatenate([item.offset for item in caches]),
        att=att,
        cnn=np.concatenate(cnn, axis=1) if cnn else None,
    )


def take_row(caches: Caches, row: int, num_cached: int) -> Caches:
    """Caches of one stream of a batch, with its last `num_cached` frames."""
    first = caches.att.shape[3] - num_cached
    return Caches(
        offset=caches.offset[row : row + 1],
        att=caches.att[:, row : row + 1, :, first:].copy(),
        cnn=None if caches.cnn is None else caches.cnn[:, row : row + 1].copy(),
    )


def begin_anew(caches: Caches, num_frames: int) -> Caches:
    """Caches of one stream as if it had begun with its last `num_frames` frames: position zero is there."""
    num_cached = min(num_frames, caches.att.shape[3])
    row = take_row(caches, 0, num_cached)
    return Caches(offset=np.full(1, num_frames, np.int64), att=row.att, cnn=row.cnn)


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
    """

    def __init__(self, config: ModelConfig, chunk_size: int | None) -> None:
        num_frames = sys.maxsize if chunk_size is None else chunk_size * config.subsampling_rate
        self._length = num_frames - config.subsampling_rate + config.window
        self._stride = num_frames
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
        return self._num_frames >= (self._shortest if self._finished else self._length)

    def take(self) -> npt.NDArray[np.float32] | None:
        """The next window [frames, mel], or None before there is one."""
        if not self.ready:
            return None
        frames = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        rest = frames[self._stride :]
        self._skip = 0 if self._finished else max(self._stride - len(frames), 0)
        self._parts = [rest] if len(rest) else []
        self._num_frames = len(rest)
        return frames[: self._length]

    def put_back(self, features: npt.NDArray[np.float32]) -> None:
        """Features [frames, mel] before those that are left: the next window begins with them."""
        self._parts.insert(0, features)
        self._num_frames += len(features)
