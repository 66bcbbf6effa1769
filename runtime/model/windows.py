"""Cuts features into the overlapping windows that chunks are computed from. No audio and no graph."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.manifest import ModelConfig


class Windows:
    """Cuts features into the overlapping windows that chunks of `chunk_size` encoder frames are computed from.

    Windows start every `chunk_size * subsampling_rate` frames and are `config.num_features(chunk_size)` frames long;
    the last may be shorter, but less than `config.window` yields nothing.
    With `chunk_size` None there is one window: all features, once they are finished.

    Args:
        config: the model's.
        chunk_size: encoder frames per chunk; None: one chunk.
        knows_last: a full window waits until there is another after it, or the end, so that it is known whether it is
            the last.

    Attributes:
        length: frames per window, except the last one.
        stride: frames from the start of one window to the start of the next.
    """

    def __init__(self, config: ModelConfig, chunk_size: int | None, *, knows_last: bool = False) -> None:
        num_frames = sys.maxsize if chunk_size is None else chunk_size * config.subsampling_rate
        self.length = sys.maxsize if chunk_size is None else config.num_features(chunk_size)
        self.stride = num_frames
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
        """Finish the input, so that the last window may be short."""
        self._finished = True

    def ready(self, num_more: int = 0) -> bool:
        """Whether `take` would return a window after `num_more` more frames."""
        return self._num_frames + num_more >= (self._shortest if self._finished else self._needed)

    @property
    def num_missing(self) -> int:
        """Frames without which there is no next window."""
        return max(self._needed - self._num_frames, 0)

    def take(self) -> npt.NDArray[np.float32] | None:
        """The next window [frames, mel], or None if there is none yet."""
        if not self.ready():
            return None
        frames = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        self._parts = [frames[self.stride :]]
        self._num_frames = len(self._parts[0])
        return frames[: self.length]

    def put_back(self, features: npt.NDArray[np.float32]) -> None:
        """Put features [frames, mel] before the remaining ones: the next window begins with them."""
        self._parts.insert(0, features)
        self._num_frames += len(features)
