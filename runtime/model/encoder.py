"""The encoder on arrays: one step with explicit caches, and whole utterances. No audio and no state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.manifest import ModelConfig
from u2moe.runtime.errors import StreamError
from u2moe.runtime.model.caches import Caches
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.windows import Windows


class Encoder:
    """Encoder graph: features and caches in, encoder output and new caches out."""

    def __init__(self, session: Session, config: ModelConfig) -> None:
        self.session = session
        self.config = config

    def start(self, batch: int = 1) -> Caches:
        """Caches of streams before their first chunk."""
        layout = self.config.caches
        tensors = {cache.name: np.zeros((cache.num_blocks, batch, *cache.shape), np.float32) for cache in layout}
        return Caches(offset=np.zeros(batch, np.int64), tensors=tensors, layout=layout)

    def step(
        self,
        chunk: npt.NDArray[np.float32],
        caches: Caches,
        *,
        required_cache_size: int,
        chunk_lens: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.float32], Caches]:
        """Encode one chunk of every stream of a batch.

        Args:
            chunk: features [batch, frames, mel], at least `config.window` frames.
            caches: from `start` or the previous step.
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
        feeds["offset"] = caches.offset
        feeds["required_cache_size"] = np.array(required_cache_size, np.int64)
        result = self.session.run(feeds | caches.tensors)
        tensors = {name: result[f"r_{name}"] for name in caches.tensors}
        return result["output"], Caches(offset=result["next_offset"], tensors=tensors, layout=caches.layout)

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
    """Raise ValueError for chunks out of range, and StreamError for chunks that the encoder does not support."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if num_left_chunks < -1:
        raise ValueError(f"num_left_chunks must be at least 0, or -1 for all, got {num_left_chunks}")
    if not config.streaming:
        raise StreamError("this bundle's encoder cannot stream: it was trained for full context (chunk_size=None)")
    if chunk_size % config.chunk_multiple:
        multiple = config.chunk_multiple
        raise StreamError(f"chunk_size must be a multiple of {multiple} for this encoder, got {chunk_size}")
