"""Encoder for bundles of fixed shape. Runs `static.onnx` with onnxruntime or an external runner."""

from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from u2moe.runtime.bundle.files import BundleFiles
from u2moe.runtime.bundle.manifest import MASKED, ModelConfig, StaticForm, StaticHistory, StaticRate, step_of
from u2moe.runtime.errors import BundleError, ProviderError, StreamError
from u2moe.runtime.model.device import Value
from u2moe.runtime.model.encoder import Caches, Encoder

Array = npt.NDArray[Any]


class Runner(Protocol):
    """Interface of an external runner of `static.onnx`, for example one that runs a version compiled for a device."""

    def run(self, inputs: dict[str, npt.NDArray[np.float32]], /) -> Mapping[str, npt.NDArray[np.float32]]:
        """Run the graph with all inputs by name. Returns all outputs by name. `static.json` lists the names."""
        ...


class StaticEncoder(Encoder):
    """An `Encoder` with a fixed chunk size and a fixed left context. It also computes log-probabilities.

    Between calls, caches have the same layout as in bundles with dynamic shapes, so streams can join and leave batches
    as usual. The graph runs separately for each stream of a batch. The initial caches are among the bundle's `files`.
    """

    runner: Runner

    def __init__(self, runner: Runner, config: ModelConfig, form: StaticForm, files: BundleFiles) -> None:
        self.runner = runner
        self.config = config
        self.form = form
        self.starts = _read_starts(files, config, form)
        self._outputs = {each.name: tuple(map(config.axis, each.axes)) for each in form.graph(config).outputs}
        self._rate = config.subsampling_rate // config.frame_reduction

    def step(
        self,
        chunk: npt.NDArray[np.float32],
        caches: Caches,
        *,
        required_cache_size: int,  # noqa: ARG002 - the form fixes it
        chunk_lens: npt.NDArray[np.int64] | None = None,
    ) -> tuple[npt.NDArray[np.float32], Caches]:
        """Encode a chunk; see `Encoder`. The caches also contain the log-probabilities [batch, time, vocab]."""
        rows, offsets = list[dict[str, Array]](), list[int]()
        reduction = self.config.frame_reduction
        for row, features in enumerate(chunk):
            length = len(features) if chunk_lens is None else int(chunk_lens[row])
            own = {name: np.asarray(tensor[:, row]) for name, tensor in caches.tensors.items()}
            frames = (length - self.config.window) // self._rate + 1
            position = self.position(int(caches.offset[row]), frames)
            given: object = self.runner.run(self.feeds(features[:length], position, own))
            if not isinstance(given, Mapping):
                raise ProviderError(f"static: found {type(given).__name__}, expected a dict of outputs by name")
            outputs = {name: _checked(name, given.get(name), shape) for name, shape in self._outputs.items()}
            rows.append(outputs | {f"r_{name}": self._taken(outputs[f"r_{name}"], own[name]) for name in own})
            offsets.append(position // reduction + -(-frames // reduction))
        found = {name: np.stack([outputs[name] for outputs in rows], axis=1) for name in self._outputs}
        offset, log_probs = np.array(offsets, np.int64), found["log_probs"][0]
        tensors: dict[str, Value] = {name: found[f"r_{name}"] for name in caches.tensors}
        output: npt.NDArray[np.float32] = found["output"][0]
        return output, replace(caches, offset=offset, tensors=tensors, log_probs=log_probs)

    def whole(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:  # noqa: ARG002 - always fails
        """Raise StreamError, because the graph supports only one chunk size."""
        raise StreamError(f"this bundle supports only chunks of {self.form.chunk_size} frames, not full context")

    def position(self, offset: int, frames: int) -> int:
        """Return the position of a chunk of `frames` frames, both after the subsampling; see `contract.encoder`."""
        in_encoder_frames = (offset, self.config.max_position, self.form.first_position)
        offset, limit, base = (each * self.config.frame_reduction for each in in_encoder_frames)
        if offset + frames <= limit:
            return offset
        if offset <= limit:
            return min(offset, base)
        return base + (offset - limit // frames * frames) % max((limit - base) // frames * frames, 1)

    def feeds(self, features: Array, position: int, tensors: Mapping[str, Array]) -> dict[str, npt.NDArray[np.float32]]:
        """Return the inputs of the graph by name, in the graph's order.

        Args:
            features: window [frames, mel]; may be shorter at the end of a stream.
            position: position of the chunk, in frames after the subsampling.
            tensors: caches [blocks, ...] as in bundles with dynamic shapes; those of keys and values may be shorter.
        """
        config, form = self.config, self.form
        chunk = np.zeros((1, config.num_features(form.chunk_size), config.feature_size), np.float32)
        chunk[0, : len(features)] = features
        feeds = {"chunk": chunk}
        num_frames = (len(features) - config.window) // self._rate + 1
        cached = {step_of(config, each): tensors[each.name] for each in config.caches if each.time_axis is not None}
        for rate in form.rates:
            feeds |= self._of_rate(rate, position, num_frames, cached[rate.step].shape[-2])
        for history in form.histories:
            feeds[history.cache] = self._history(history, tensors[history.cache], position)
        for cache in config.caches:
            if cache.time_axis is not None:
                shape = form.cache_shape(config, cache)
                kept = tensors[cache.name][..., -shape[2] :, :]
                feeds[cache.name] = np.zeros(shape, np.float32)
                feeds[cache.name][:, :, shape[2] - kept.shape[-2] :] = kept.reshape(1, shape[1], *kept.shape[-2:])
        return {tensor.name: feeds[tensor.name] for tensor in form.graph(config).inputs}

    def _of_rate(self, rate: StaticRate, position: int, num_frames: int, num_cached: int) -> dict[str, Array]:
        """Return the inputs for one rate: the mask and, if needed, the positions of the keys."""
        left, own = self.form.left_frames(self.config, rate.step), self.form.frames(self.config, rate.step)
        places = np.arange(-left, own)
        positions = position + places * rate.step
        exists = (positions >= 0) & (places >= -num_cached) & (places < -(-num_frames // rate.step))
        feeds: dict[str, Array] = {rate.mask: np.where(exists, 0, MASKED).astype(np.float32).reshape(1, 1, 1, -1)}
        if rate.positions:
            angles = positions.astype(np.float32)[:, np.newaxis] * np.array(self.form.frequencies, np.float32)
            waves = np.stack([np.sin(angles), np.cos(angles)], axis=2 if self.form.interleaved else 1)
            feeds[rate.positions] = waves.reshape(1, len(places), -1)
        return feeds

    def _history(self, history: StaticHistory, tensor: Array, position: int) -> Array:
        """Return the frames before a chunk, shaped as the graph's input. Those before a stream are from the bundle."""
        blocks, channels, past = tensor.shape
        exists = position + np.arange(-past, 0) * np.array(history.steps)[:, np.newaxis] >= 0
        start = self.starts[history.cache].reshape(blocks, past, channels)
        return np.where(exists[..., np.newaxis], tensor.transpose(0, 2, 1), start).reshape(1, blocks * past, channels)

    def _taken(self, found: Array, tensor: Array) -> Array:
        """Return the new cache `found` in the layout of `tensor`, the previous cache, without unfilled frames."""
        if found.ndim == 3:
            return found.reshape(len(tensor), -1, tensor.shape[1]).transpose(0, 2, 1)
        left = found.shape[2]
        num_kept = min(tensor.shape[-2] + left // self.form.num_left_chunks, left)
        return found.reshape(*tensor.shape[:2], *found.shape[2:])[..., left - num_kept :, :]


def _checked(name: str, value: object, shape: tuple[int | None, ...]) -> Array:
    """Return a runner's output if its type and shape are right; otherwise raise a ProviderError."""
    array = np.asarray(value)
    if value is None or array.dtype != np.float32 or array.shape != shape:
        seen = "nothing" if value is None else f"{array.dtype} {list(array.shape)}"
        raise ProviderError(f"static: output {name}: found {seen}, expected float32 {list(shape)}")
    return array


def _read_starts(files: BundleFiles, config: ModelConfig, form: StaticForm) -> dict[str, npt.NDArray[np.float32]]:
    """Read the initial contents of caches, by name. Raises BundleError for a file of another type or shape."""
    starts, caches = {}, {cache.name: cache for cache in config.caches}
    for history in form.histories:
        shape = form.cache_shape(config, caches[history.cache])
        where = files.folder / history.start
        try:
            array = np.load(BytesIO(files.read(history.start, 1 << 30)), allow_pickle=False)
        except ValueError as error:
            raise BundleError(f"{where}: is not a numpy array: {error}") from error
        if array.dtype != np.float32 or array.shape != shape:
            raise BundleError(f"{where}: found {array.dtype} {list(array.shape)}, expected float32 {list(shape)}")
        starts[history.cache] = array
    return starts
