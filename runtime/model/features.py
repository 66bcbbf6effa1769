"""Log-mel filter banks and MFCC, without normalisation. They equal Kaldi's, which WeNet's training uses.

numpy computes them, or the u2moe-kernels library (`runtime/cpp/source/front_end.hpp`), which is twice as fast.
Each frame is computed separately, in double precision, and rounded to single precision. Features are therefore
bit-identical for any split of the samples. Between processors, they differ at most in the last bit. `graph.features`
has the same equations for programs in other languages.
"""

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from u2moe.runtime.audio.arrays import Samples
from u2moe.runtime.bundle.manifest import FeatureConfig
from u2moe.runtime.errors import BundleError
from u2moe.runtime.model.calls import NATIVE_CALLS

PREEMPHASIS = 0.97
FLOOR = float(np.finfo(np.float32).eps)  # Minimum energy of a band
_LIFTER = 22.0
_SCALE = 32768.0
_BLOCK = 32  # Frames computed at a time. With more, malloc returns memory, which costs a page fault per 4 KB

Floats = npt.NDArray[np.float64]


def fbank(samples: Samples, config: FeatureConfig, library: Path | None = None) -> npt.NDArray[np.float32]:
    """Compute features [frames, `config.size`] of samples [n] in [-1, 1]. Raises the BundleError of `constants_of`.

    A frame needs a full window of samples, as with Kaldi's snip_edges. An incomplete window at the end is dropped.
    `library` is the u2moe-kernels library that computes them; None: numpy does.
    """
    constants = constants_of(config)
    length, shift = config.frame_len, config.shift_len
    num_frames = max(len(samples) - length + shift, 0) // shift
    features = np.empty((num_frames, config.size), np.float32)
    native = None if library is None else _native(library, config)
    if native is not None:
        native(np.ascontiguousarray(samples, np.float32), features)
        return features
    for start in range(0, num_frames, _BLOCK):
        block = features[start : start + _BLOCK]
        log_energies = _log_energies(samples[start * shift :], len(block), config, constants)
        block[:] = log_energies if constants.cepstra is None else _products(log_energies, constants.cepstra)
    return features


class FeatureStream:
    """Computes the features of a source incrementally. Each call of `take` computes all its frames together."""

    def __init__(self, config: FeatureConfig, library: Path | None = None) -> None:
        """Start a source; `library` and errors as in `fbank`."""
        constants_of(config)  # fail here, not at the first frame
        self._config, self._library = config, library
        self._parts: list[Samples] = []  # starting with the first sample of the next frame
        self._num_samples = 0  # in `_parts`
        self._num_taken = 0

    @property
    def num_ready(self) -> int:
        """Number of frames that can be taken."""
        shift = self._config.shift_len
        return max(self._num_samples - self._config.frame_len + shift, 0) // shift

    def num_needed(self, num_frames: int) -> int:
        """Return how many samples from the start of the source are needed to take `num_frames` more frames."""
        return self._config.frame_len + (self._num_taken + num_frames - 1) * self._config.shift_len

    def accept(self, samples: Samples) -> None:
        """Append samples [n] in [-1, 1]. They are copied."""
        self._parts.append(np.array(samples, np.float32))
        self._num_samples += len(samples)

    def take(self, num_frames: int) -> npt.NDArray[np.float32]:
        """Compute at most `num_frames` further frames [frames, `size`]."""
        num_frames, shift = min(num_frames, self.num_ready), self._config.shift_len
        if num_frames == 0:
            return np.empty((0, self._config.size), np.float32)
        samples = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        features = fbank(samples[: (num_frames - 1) * shift + self._config.frame_len], self._config, self._library)
        self._parts = [samples[num_frames * shift :]]
        self._num_samples -= num_frames * shift
        self._num_taken += num_frames
        return features


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Constants derived from a configuration.

    The centres of the mel bands divide the spectrum into intervals. Band b rises in interval b and falls in interval
    b + 1. At each point, the weights of the rising and the falling band sum to 1. `weights` are for points from
    `lowest` to the first point above the bands. It is at most the Nyquist frequency; its weights are 0, as in Kaldi.
    """

    num_points: int  # length of the Fourier transform, a power of two; frames are padded with zeros to it
    window: Floats  # window function for samples on the scale of 16-bit integers [frame_len]
    lowest: int  # lowest point of the spectrum that lies in a band
    weights: Floats  # of the rising and the falling band [2, points]
    starts: npt.NDArray[np.int64]  # first point of each interval, relative to `lowest` [mel + 1]
    is_filled: Floats  # 1 for an interval with points in it, otherwise 0 [mel + 1]
    cepstra: Floats | None  # liftered cosine transform of MFCC [mel, num_ceps]; None for log-mel energies

    def banks(self) -> Floats:
        """Return the weights [num_points / 2, mel] of each band at all points below the Nyquist frequency."""
        intervals = np.searchsorted(self.starts, np.arange(self.weights.shape[1] - 1), side="right") - 1
        rows = np.arange(self.lowest, self.lowest + self.weights.shape[1] - 1)
        banks = np.zeros((self.num_points // 2, len(self.starts) + 1))  # includes a band before the first
        banks[rows, intervals + 1] = self.weights[0, :-1]
        banks[rows, intervals] = self.weights[1, :-1]
        return banks[:, 1:-1]


@functools.lru_cache(maxsize=16)
def constants_of(config: FeatureConfig) -> Constants:
    """Return the constants of a configuration. Raises BundleError if a mel band contains no FFT bin."""
    length, num_intervals = config.frame_len, config.num_mel_bins + 1
    num_points = 1 << (length - 1).bit_length()
    lowest, highest = _mel(config.low_hz), _mel(config.top_hz)
    width = (highest - lowest) / num_intervals
    frequencies = (point * config.sample_rate / num_points for point in range(num_points // 2))
    places = np.array([(_mel(frequency) - lowest) / width for frequency in frequencies])
    first, last = np.searchsorted(places, [0, num_intervals]).tolist()
    places = np.append(places[first:last], num_intervals)
    starts = np.searchsorted(places, np.arange(num_intervals))
    is_filled = np.diff(starts, append=len(places) - 1) > 0
    if not np.all(is_filled[:-1] | is_filled[1:]):
        raise BundleError(
            f"features of {config} cannot be computed: a mel band contains no FFT bin; "
            "lower num_mel_bins or raise frame_length_ms"
        )
    rising = places - np.floor(places)
    weights = np.stack([rising, 1 - rising])
    weights[:, -1] = 0
    return Constants(
        num_points=num_points,
        window=_window(config.window, length),
        lowest=first,
        weights=weights,
        starts=starts,
        is_filled=is_filled.astype(np.float64),
        cepstra=_cepstra(config.num_mel_bins, config.num_ceps) if config.num_ceps else None,
    )


class _FrontEnd(ctypes.Structure):
    """`FrontEndConstants` of the library."""

    _fields_ = (
        *[(name, ctypes.c_size_t) for name in ("frame_len", "shift_len", "num_points", "lowest", "num_weights")],
        *[(name, ctypes.c_size_t) for name in ("num_bins", "num_ceps")],
        *[(name, ctypes.c_void_p) for name in ("window", "turns", "weights", "cepstra", "starts")],
    )


@functools.lru_cache(maxsize=16)
def _native(library: Path, config: FeatureConfig) -> Callable[[Samples, Samples], None] | None:
    """Return a function of samples that writes features; None if the library is a version without it."""
    try:
        function = ctypes.CDLL(str(library)).u2moe_features
    except AttributeError:
        return None
    function.argtypes = (ctypes.POINTER(_FrontEnd), ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    constants = constants_of(config)
    angles = [2 * math.pi * k / constants.num_points for k in range(constants.num_points // 2 + 1)]
    turns = np.array([(math.cos(angle), math.sin(angle)) for angle in angles])
    cepstra = None if constants.cepstra is None else np.ascontiguousarray(constants.cepstra)
    arrays = (constants.window, turns, constants.weights, cepstra, constants.starts.astype(np.int64))
    sizes = (config.frame_len, config.shift_len, constants.num_points, constants.lowest, constants.weights.shape[1])
    pointers = (None if array is None else array.ctypes.data for array in arrays)
    front_end = _FrontEnd(*sizes, config.num_mel_bins, config.num_ceps, *pointers)

    def compute(samples: Samples, features: Samples, _kept: object = arrays) -> None:  # `front_end` points to them
        with NATIVE_CALLS:
            if not function(front_end, samples.ctypes.data, len(features), features.ctypes.data):
                raise MemoryError

    return compute


# The last bit of numpy's vectorized functions depends on the processor. Bundles must be the same on every processor, so
# the functions below use `math`.


def _window(kind: str, length: int) -> Floats:
    weights: dict[str, Callable[[float], float]] = {
        "povey": lambda turn: (0.5 - 0.5 * math.cos(turn)) ** 0.85,
        "hamming": lambda turn: 0.54 - 0.46 * math.cos(turn),
        "hanning": lambda turn: 0.5 - 0.5 * math.cos(turn),
        "blackman": lambda turn: 0.42 - 0.5 * math.cos(turn) + 0.08 * math.cos(2 * turn),
        "rectangular": lambda _: 1.0,
    }
    turns = (2 * math.pi * place / (length - 1) for place in range(length))
    return np.array([weights[kind](turn) * _SCALE for turn in turns])


def _cepstra(num_mel_bins: int, num_ceps: int) -> Floats:
    """Return the orthonormal cosine transform [mel, num_ceps], with each coefficient multiplied by its lifter."""
    factors = []
    for index in range(num_ceps):
        scale = math.sqrt((2 if index else 1) / num_mel_bins)
        factors.append(scale * (1 + 0.5 * _LIFTER * math.sin(math.pi * index / _LIFTER)))
    turns = [[math.pi / num_mel_bins * (band + 0.5) * each for each in range(num_ceps)] for band in range(num_mel_bins)]
    return np.array([[factor * math.cos(turn) for factor, turn in zip(factors, row, strict=True)] for row in turns])


def _mel(frequency: float) -> float:
    return 1127.0 * math.log(1.0 + frequency / 700.0)


def _log_energies(samples: Samples, num_frames: int, config: FeatureConfig, constants: Constants) -> Floats:
    """Compute log-mel energies [frames, mel] of the first `num_frames` frames of `samples`."""
    length, shift = config.frame_len, config.shift_len
    signal = samples[: (num_frames - 1) * shift + length].astype(np.float64)
    offsets = _frames(signal, num_frames, length, shift).sum(axis=1, keepdims=True) * ((1 - PREEMPHASIS) / length)
    emphasised = signal[1:] - PREEMPHASIS * signal[:-1]
    padded = np.zeros((num_frames, constants.num_points))
    frames = padded[:, :length]
    np.subtract(_frames(emphasised, num_frames, length - 1, shift), offsets, out=frames[:, 1:])
    # The first sample of a frame also stands for the one before it. Most window functions multiply it by 0.
    frames[:, 0] = signal[: num_frames * shift : shift] * (1 - PREEMPHASIS) - offsets[:, 0]
    frames *= constants.window
    parts = np.fft.rfft(padded).view(np.float64)  # alternating real and imaginary parts
    parts *= parts
    begin, end = 2 * constants.lowest, 2 * (constants.lowest + constants.weights.shape[1])
    power = parts[:, begin:end:2] + parts[:, begin + 1 : end : 2]
    # Not a matrix product: BLAS would use all cores, and its rounding depends on the number of frames.
    sums = np.add.reduceat(power[:, np.newaxis] * constants.weights, constants.starts, axis=2) * constants.is_filled
    return np.log(np.maximum(sums[:, 0, :-1] + sums[:, 1, 1:], FLOOR))


def _products(x: Floats, matrix: Floats) -> Floats:
    """Compute x [frames, n] @ matrix [n, m]. How a frame's products are rounded does not depend on other frames."""
    products: Floats = (x[:, :, np.newaxis] * matrix).sum(axis=1)
    return products


def _frames(signal: Floats, num_frames: int, length: int, shift: int) -> Floats:
    """Return a view of overlapping frames [frames, length] of a signal."""
    step = signal.itemsize
    return np.ndarray((num_frames, length), signal.dtype, signal, strides=(shift * step, step))
