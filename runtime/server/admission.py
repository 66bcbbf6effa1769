"""Limits the number of live streams, so that accepted ones are recognised in real time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.decoding.pipeline import MAX_BATCH
from u2moe.runtime.recognizer import DEMO_FOLDER
from u2moe.runtime.server.errors import StoppingError, UnavailableError
from u2moe.runtime.server.log import Incidents

if TYPE_CHECKING:
    from u2moe.runtime.options import DecodingOptions
    from u2moe.runtime.recognizer import Recognizer
    from u2moe.runtime.server.metrics import Metrics

_SHARE = 0.5
"""Share of the measured throughput to use; the rest is for the event loop, for streams whose chunks coincide, and for
connections that are refused."""
_MEASURED_STREAMS = 8
_MEASURED_S = 4.0


class Admission:
    """Places for live streams. If none is free it refuses immediately, so that running streams stay in real time.

    Attributes:
        capacity: number of places.
        is_stopping: whether new streams are refused.
    """

    def __init__(self, capacity: int, metrics: Metrics) -> None:
        self.capacity = capacity
        self.is_stopping = False
        self._num_taken = 0
        self._metrics = metrics
        self._incidents = Incidents(metrics)
        metrics.set("capacity", capacity)

    @property
    def num_taken(self) -> int:
        """Number of occupied places."""
        return self._num_taken

    def enter(self) -> None:
        """Take a place, to be returned by `leave`.

        Raises:
            UnavailableError: none is free, or the server is about to stop.
        """
        if self.is_stopping:
            self._incidents.refuse("stopping")
            raise StoppingError
        if self._num_taken >= self.capacity:
            self._incidents.refuse("full")
            raise UnavailableError(f"the server is full: it recognises {self.capacity} streams at a time")
        self._num_taken += 1
        self._metrics.set("streams", self._num_taken)

    def leave(self) -> None:
        """Return a place."""
        self._num_taken -= 1
        self._metrics.set("streams", self._num_taken)


def measure_capacity(recognizer: Recognizer, options: DecodingOptions) -> int:
    """Number of live streams that one thread of this machine can recognise with time to spare, by a short measurement.

    Eight streams of speech are decoded at full speed, including the second pass; the better of two runs counts.
    """
    return max(int(_SHARE / min(_decode_speech(recognizer, options, _MEASURED_STREAMS) for _ in range(2))), 1)


def take_memory(recognizer: Recognizer, options: DecodingOptions, capacity: int) -> None:
    """Decode as many streams together as ever will be.

    onnxruntime keeps the memory that a call has taken, and takes twice as much when it needs more: better now than when
    many chunks first coincide, perhaps after hours.
    """
    _decode_speech(recognizer, options, min(capacity, MAX_BATCH))


def _decode_speech(recognizer: Recognizer, options: DecodingOptions, num_streams: int) -> float:
    """Decode some seconds in several streams; returns the seconds of work per second of one stream."""
    rate = recognizer.bundle.manifest.features.sample_rate
    samples = _speech(rate)
    streams = [recognizer.create_stream(options) for _ in range(num_streams)]
    begin = time.perf_counter()
    for start in range(0, len(samples), rate // 5):
        for stream in streams:
            stream.accept_waveform(rate, samples[start : start + rate // 5])
        recognizer.decode_streams(streams)
    for stream in streams:
        stream.input_finished()
    recognizer.decode_streams(streams)
    return (time.perf_counter() - begin) / (len(streams) * len(samples) / rate)


def _speech(rate: int) -> np.ndarray:
    """Real speech, if the demo model's clips are installed; else noise."""
    clips = sorted((DEMO_FOLDER / "clips").glob("*.flac"))
    if not clips:
        return np.random.default_rng(0).normal(0, 0.1, round(_MEASURED_S * rate)).astype(np.float32)
    speech = np.concatenate([read_audio(clip, rate) for clip in clips])
    return np.resize(speech, round(_MEASURED_S * rate))
