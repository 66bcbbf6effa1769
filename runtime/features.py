"""Log-mel filter banks as in WeNet's training (Kaldi's), incremental, with kaldi-native-fbank. No normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import kaldi_native_fbank
import numpy as np
import numpy.typing as npt

from u2moe.runtime.errors import BundleError, StreamError

if TYPE_CHECKING:
    from u2moe.runtime.manifest import FeatureConfig

_INT16_SCALE = np.float32(32768.0)
_BLOCK = 160_000
"""Samples per call, to limit the memory of kaldi-native-fbank."""


class Fbank:
    """From samples to frames, incrementally: any split gives the same frames, to the last bit.

    A frame needs a full window of samples (Kaldi's snip_edges): an incomplete window at the end is dropped. Memory use
    is constant: frames are returned once and not kept.

    Raises:
        BundleError: the configuration is impossible, for example with more mel bins than the spectrum has.
    """

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        try:
            self._fbank = kaldi_native_fbank.OnlineFbank(_options(config))
        except ValueError as error:
            raise BundleError(f"features of {config} cannot be computed: {error}") from error
        self._frame_len = int(config.sample_rate * config.frame_length_ms / 1000)
        self._frame_shift = int(config.sample_rate * config.frame_shift_ms / 1000)
        self._num_taken = 0
        self._finished = False

    def num_needed(self, num_frames: int) -> int:
        """Number of samples, from the first on, that `num_frames` more frames need."""
        return self._frame_len + (self._num_taken + num_frames - 1) * self._frame_shift

    def accept(self, samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Frames [frames, mel] completed by these samples, float32 [n] in [-1, 1]."""
        if self._finished:
            raise StreamError("features are already finished: cannot accept more samples")
        parts = [np.zeros((0, self.config.num_mel_bins), np.float32)]
        for start in range(0, len(samples), _BLOCK):
            scaled = samples[start : start + _BLOCK] * _INT16_SCALE
            # It converts sample by sample: a memoryview yields plain floats, which is a third faster than numpy.
            self._fbank.accept_waveform(self.config.sample_rate, scaled.data)
            parts.append(self._take())
        return np.concatenate(parts)

    def finish(self) -> npt.NDArray[np.float32]:
        """The last frames [frames, mel]; ends the input."""
        if self._finished:
            raise StreamError("features are already finished")
        self._finished = True
        self._fbank.input_finished()
        return self._take()

    def _take(self) -> npt.NDArray[np.float32]:
        num_ready = self._fbank.num_frames_ready
        frames = np.empty((num_ready - self._num_taken, self.config.num_mel_bins), np.float32)
        for row, index in enumerate(range(self._num_taken, num_ready)):
            frames[row] = self._fbank.get_frame(index)
        self._fbank.pop(len(frames))
        self._num_taken = num_ready
        return frames


def _options(config: FeatureConfig) -> kaldi_native_fbank.FbankOptions:
    """Kaldi options as WeNet uses them, without dither."""
    options = kaldi_native_fbank.FbankOptions()
    frames, mels = options.frame_opts, options.mel_opts
    frames.samp_freq = config.sample_rate
    frames.frame_length_ms = config.frame_length_ms
    frames.frame_shift_ms = config.frame_shift_ms
    frames.dither = 0.0
    frames.preemph_coeff = 0.97
    frames.remove_dc_offset = True
    frames.window_type = "povey"
    frames.round_to_power_of_two = True
    frames.snip_edges = True
    mels.num_bins = config.num_mel_bins
    mels.low_freq = 20.0
    mels.high_freq = 0.0  # the Nyquist frequency
    options.energy_floor = 0.0
    options.use_energy = False
    options.use_log_fbank = True
    options.use_power = True
    return options
