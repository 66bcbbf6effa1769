"""Voice activity detection with silero VAD, which the user provides."""

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from u2moe.runtime.declarations import Checked, option
from u2moe.runtime.errors import BundleError, ProviderError
from u2moe.runtime.model.calls import NATIVE_CALLS
from u2moe.runtime.model.native import ONNXRUNTIME_ERRORS
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.validation import checked_options

_WINDOW, _CONTEXT = 512, 64
"""Samples in a window, and samples before it that the network reads as context. Each window gets one probability."""
_RATE = 16_000
_MAX_WINDOWS = 256
_FILES = ("silero_vad_16k_sequence.onnx", "silero_vad_16k_op15.onnx", "silero_vad.onnx")
"""Files of the package, fastest first. Older versions contain only the last of these files."""
_LAYOUTS = (({"input", "state", "sr"}, 2), ({"input", "state"}, 2), ({"input", "h", "c"}, 3))
"""Names of the inputs and number of outputs of each known file of silero VAD 5 and 6. The last one takes any number of
windows per run."""


@dataclass(frozen=True, kw_only=True)
class VadOptions(Checked):
    """Thresholds and durations that decide when speech begins and ends.

    Attributes:
        threshold: speech begins when its probability reaches this.
        end_threshold: speech ends when its probability falls below this.
        min_silence: seconds of silence that end a span of speech.
        padding: seconds of silence kept on either side of a span; at most half of `min_silence`.
    """

    threshold: float = option("number", 0.5, above=0, most=1)
    end_threshold: float = option("number", 0.35, above=0, most=1)
    min_silence: float = option("number", 0.6, above=0, unit="seconds")
    padding: float = option("number", 0.3, least=0, unit="seconds")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.end_threshold <= self.threshold < 1:
            expected = f"below 1 and at least end_threshold ({self.end_threshold})"
            raise ValueError(f"threshold must be {expected}, got {self.threshold}")
        if self.padding > self.min_silence / 2:
            raise ValueError(f"padding must be at most half of min_silence ({self.min_silence} s), got {self.padding}")


@dataclass(frozen=True, kw_only=True)
class Speech:
    """A part of a span of speech: samples, float32 [n] at 16 kHz, from index `start` of the recording.

    `begins` and `ends` tell whether it is the first and the last part of the span.
    """

    start: int
    samples: npt.NDArray[np.float32]
    begins: bool
    ends: bool


class VoiceActivityDetector:
    """Finds speech in recordings at 16 kHz. Stateless and thread-safe.

    Args:
        file: silero VAD 5 or 6 as ONNX; None: the file in the installed package silero-vad. Nothing else in the package
            is used, so `pip install --no-deps silero-vad` suffices; torch is not needed.
        options: when speech begins and ends.

    Raises:
        BundleError: the file or the package is missing, or the network is not silero VAD 5 or 6.
    """

    sample_rate = _RATE

    def __init__(self, file: str | os.PathLike[str] | None = None, options: VadOptions | None = None) -> None:
        self.options = checked_options("options", options, VadOptions())
        path = _installed_file() if file is None else Path(file)
        if not path.is_file():
            raise BundleError(f"{path}: no such file")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path),
                SessionSettings(kernels="onnxruntime").session_options(),
                providers=["CPUExecutionProvider"],
                enable_fallback=False,  # otherwise it prints a message and retries
            )
        except ONNXRUNTIME_ERRORS as error:
            raise BundleError(f"{path}: onnxruntime refuses it: {str(error).splitlines()[0][:300]}") from error
        inputs = {node.name: node for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]
        if (set(inputs), len(self._outputs)) not in _LAYOUTS:
            found = f"inputs {', '.join(inputs)} and outputs {', '.join(self._outputs)}"
            raise BundleError(f"{path}: is not silero VAD 5 or 6: found {found}")
        self._states = {
            name: tuple(size if isinstance(size, int) else 1 for size in node.shape)
            for name, node in inputs.items()
            if name not in ("input", "sr")
        }
        self._has_rate = "sr" in inputs
        try:
            self._run(np.zeros((1, _CONTEXT + _WINDOW), np.float32), self._start())
        except ProviderError as error:
            raise BundleError(f"{path}: is not silero VAD 5 or 6: {error}") from error

    def speech(self, blocks: Iterable[npt.NDArray[np.float32]]) -> Iterator[Speech]:
        """Yield each span of speech, with padding around it, in parts as blocks arrive. Silence is dropped.

        Args:
            blocks: consecutive samples at 16 kHz, float32 [n]. The split into blocks does not matter.
        """
        states, context = self._start(), np.zeros(_CONTEXT, np.float32)
        spans = _SpeechSpans(self.options)
        for buffer in _whole_windows(blocks):
            probabilities, states, context = self._probabilities(buffer, states, context)
            yield from spans.accept(buffer, probabilities.tolist())
        yield from spans.finish()

    def _start(self) -> dict[str, npt.NDArray[np.float32]]:
        return {name: np.zeros(shape, np.float32) for name, shape in self._states.items()}

    def _probabilities(
        self, samples: npt.NDArray[np.float32], states: dict[str, npt.NDArray[np.float32]],
        context: npt.NDArray[np.float32],
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[np.float32]], npt.NDArray[np.float32]]:  # fmt: skip
        """Return the speech probability of each window, and the states and the context for the next call."""
        if not len(samples):
            return np.zeros(0, np.float32), states, context
        whole = np.concatenate([context, samples])
        windows = np.lib.stride_tricks.sliding_window_view(whole, _CONTEXT + _WINDOW)[::_WINDOW]
        found = []
        for rows in [windows] if "h" in states else windows[:, None]:
            probabilities, states = self._run(rows, states)
            found.append(probabilities)
        return np.concatenate(found), states, whole[-_CONTEXT:]

    def _run(
        self, rows: npt.NDArray[np.float32], states: dict[str, npt.NDArray[np.float32]]
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[np.float32]]]:
        feeds = {"input": rows, **states}
        if self._has_rate:
            feeds["sr"] = np.array(_RATE, np.int64)
        try:
            with NATIVE_CALLS:
                probabilities, *following = self._session.run(self._outputs, feeds)
        except ONNXRUNTIME_ERRORS as error:
            raise ProviderError(f"the voice activity detector failed: {error}") from error
        return probabilities.reshape(-1), dict(zip(states, following, strict=True))


def _installed_file() -> Path:
    """Find the network file of the package silero-vad. Importing the package instead would also import torch."""
    spec = importlib.util.find_spec("silero_vad")
    folders = [Path(folder) / "data" for folder in (spec.submodule_search_locations or ())] if spec else []
    for file in (folder / name for name in _FILES for folder in folders):
        if file.is_file():
            return file
    raise BundleError(
        "silero-vad is not installed: run pip install --no-deps silero-vad, or give the path of its ONNX file"
    )


class _SpeechSpans:
    """Turns window probabilities into spans of speech. Samples are numbered from the start of the recording."""

    def __init__(self, options: VadOptions) -> None:
        self._options = options
        self._min_silent = math.ceil(options.min_silence / (_WINDOW / _RATE))
        self._padding = round(options.padding * _RATE)
        self._held, self._held_start = np.zeros(0, np.float32), 0
        self._given = 0  # everything before this has been returned or dropped
        self._spoken = 0  # the end of the last window with speech
        self._num_silent = 0
        self._speaks = self._begins = False

    def accept(self, buffer: npt.NDArray[np.float32], probabilities: list[float]) -> Iterator[Speech]:
        """Add complete windows, and yield the speech that is now certain."""
        end = self._held_start + len(self._held)
        self._held = np.concatenate([self._held, buffer])
        for probability in probabilities:
            end += _WINDOW
            going_on = self._speaks and not self._num_silent
            if probability >= (self._options.end_threshold if going_on else self._options.threshold):
                if not self._speaks:
                    self._given = max(self._given, end - _WINDOW - self._padding)
                    self._speaks = self._begins = True
                self._spoken, self._num_silent = end, 0
                continue
            self._num_silent += 1
            if self._speaks and self._num_silent >= self._min_silent:
                yield self._take(self._spoken + self._padding, ends=True)
        if self._speaks and self._spoken > self._given:
            yield self._take(self._spoken, ends=False)
        keep = self._given if self._speaks else max(self._given, end - self._padding)
        self._held, self._held_start = self._held[keep - self._held_start :], keep

    def finish(self) -> Iterator[Speech]:
        """Yield the rest of the last span, if it has not ended."""
        if self._speaks:
            yield self._take(min(self._spoken + self._padding, self._held_start + len(self._held)), ends=True)

    def _take(self, end: int, *, ends: bool) -> Speech:
        samples = self._held[self._given - self._held_start : end - self._held_start]
        speech = Speech(start=self._given, samples=samples, begins=self._begins, ends=ends)
        self._given, self._begins, self._speaks = end, False, not ends
        return speech


def _whole_windows(buffers: Iterable[npt.NDArray[np.float32]]) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the samples in complete windows, a limited number at a time. The last window is padded with silence."""
    rest = np.zeros(0, np.float32)
    for buffer in buffers:
        for start in range(0, len(buffer), _MAX_WINDOWS * _WINDOW):
            rest = np.concatenate([rest, buffer[start : start + _MAX_WINDOWS * _WINDOW]])
            size = len(rest) // _WINDOW * _WINDOW
            yield rest[:size]
            rest = rest[size:]
    yield np.concatenate([rest, np.zeros(-len(rest) % _WINDOW, np.float32)])
