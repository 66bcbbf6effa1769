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
        self._start = {
            name: np.zeros([size if isinstance(size, int) else 1 for size in node.shape], np.float32)
            for name, node in inputs.items()
            if name not in ("input", "sr")
        }
        self._rate = {"sr": np.array(_RATE, np.int64)} if "sr" in inputs else {}
        try:
            self._run(np.zeros((1, _CONTEXT + _WINDOW), np.float32), self._start)
        except ProviderError as error:
            raise BundleError(f"{path}: is not silero VAD 5 or 6: {error}") from error

    def speech(self, blocks: Iterable[npt.NDArray[np.float32]]) -> Iterator[Speech]:
        """Yield each span of speech, with padding around it, in parts as blocks arrive. Silence is dropped.

        Args:
            blocks: consecutive samples at 16 kHz, float32 [n]. The split into blocks does not matter.
        """
        min_silent, padding = (
            math.ceil(self.options.min_silence / (_WINDOW / _RATE)),
            round(self.options.padding * _RATE),
        )
        held, start = np.zeros(0, np.float32), 0  # the samples from number `start` of the recording on
        given = 0  # everything before this has been yielded or dropped
        spoken = num_silent = 0  # end of the last window with speech, and number of windows since
        speaks = begins = False
        for samples, probabilities in self._probabilities(blocks):
            end = start + len(held)
            held = np.concatenate([held, samples])
            for probability in probabilities:
                end += _WINDOW
                if probability >= (self.options.end_threshold if speaks and not num_silent else self.options.threshold):
                    if not speaks:
                        given = max(given, end - _WINDOW - padding)
                        speaks = begins = True
                    spoken, num_silent = end, 0
                    continue
                num_silent += 1
                if speaks and num_silent >= min_silent:
                    last = spoken + padding
                    yield Speech(start=given, samples=held[given - start : last - start], begins=begins, ends=True)
                    given, begins, speaks = last, False, False
            if speaks and spoken > given:
                yield Speech(start=given, samples=held[given - start : spoken - start], begins=begins, ends=False)
                given, begins = spoken, False
            keep = given if speaks else max(given, end - padding)
            held, start = held[keep - start :], keep
        if speaks:
            last = min(spoken + padding, start + len(held))
            yield Speech(start=given, samples=held[given - start : last - start], begins=begins, ends=True)

    def _probabilities(
        self, blocks: Iterable[npt.NDArray[np.float32]]
    ) -> Iterator[tuple[npt.NDArray[np.float32], list[float]]]:
        """Yield whole windows of samples and their speech probabilities."""
        states = self._start
        for samples in _whole_windows(blocks):
            windows = np.lib.stride_tricks.sliding_window_view(samples, _CONTEXT + _WINDOW)[::_WINDOW]
            probabilities: list[float] = []
            for rows in [windows] if "h" in states else windows[:, None]:
                found, states = self._run(rows, states)
                probabilities += found.tolist()
            yield samples[_CONTEXT:], probabilities

    def _run(
        self, rows: npt.NDArray[np.float32], states: dict[str, npt.NDArray[np.float32]]
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[np.float32]]]:
        try:
            with NATIVE_CALLS:
                probabilities, *following = self._session.run(self._outputs, {"input": rows, **states, **self._rate})
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
    remedy = "run pip install --no-deps silero-vad, or give the path of its ONNX file"
    raise BundleError(f"silero-vad is not installed: {remedy}")


def _whole_windows(buffers: Iterable[npt.NDArray[np.float32]]) -> Iterator[npt.NDArray[np.float32]]:
    """Yield complete windows, a limited number at a time, after the context of the first of them."""
    # The context of the first window is silence, and so is what is missing in the last window.
    rest = np.zeros(_CONTEXT, np.float32)
    for buffer in buffers:
        for start in range(0, len(buffer), _MAX_WINDOWS * _WINDOW):
            rest = np.concatenate([rest, buffer[start : start + _MAX_WINDOWS * _WINDOW]])
            if size := (len(rest) - _CONTEXT) // _WINDOW * _WINDOW:
                yield rest[: _CONTEXT + size]
                rest = rest[size:]
    if len(rest) > _CONTEXT:
        yield np.concatenate([rest, np.zeros((_CONTEXT - len(rest)) % _WINDOW, np.float32)])
