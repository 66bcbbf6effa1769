"""Limits how many live streams and files are recognised at once, and measures how many streams that may be."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import numpy as np

from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.decoding.pipeline import MAX_BATCH
from u2moe.runtime.server.errors import StoppingError, UnavailableError
from u2moe.runtime.server.log import Incidents
from u2moe.runtime.server.metrics import Metrics
from u2moe.runtime.server.models import ServedModel
from u2moe.runtime.server.transport import in_place

_SHARE = 0.35
"""Share of the measured throughput to use; the rest is for the event loop, chunks that coincide, and a machine that
loses half of its speed to other work while those who have been accepted go on."""
_TOO_LATE_S, _IN_TIME_S = 0.6, 0.3
"""Seconds beyond which nobody is admitted, and below which somebody is again."""
_AVERAGED_S = 1.0
"""Seconds over which lateness is averaged, whatever the length of rounds: they are long where it is high."""
_FORGOTTEN_S = 2.0
"""Seconds without live audio after which lateness counts as 0."""
_MEASURED_STREAMS = 8
_MEASURED_S = 4.0


class Lateness:
    """How long live audio waits for its recognition now, and whether that is too long for more streams to be admitted.

    The capacity is measured once; a machine that has become slower, or has other work, shows here. Nobody is admitted
    from the time at which results are late until they are clearly in time again.
    """

    def __init__(self) -> None:
        self._late_s, self._then = 0.0, time.monotonic()
        self._is_too_late = False

    def observe(self, seconds: float) -> None:
        """Take account of the audio that has waited longest in a round of the scheduler."""
        now = time.monotonic()
        passed_s = min(now - self._then, max(seconds, _IN_TIME_S))  # before that nobody may have spoken
        self._late_s += (1 - math.exp(-passed_s / _AVERAGED_S)) * (seconds - self._late_s)
        self._then = now

    @property
    def is_too_late(self) -> bool:
        """Whether no more streams should come."""
        if time.monotonic() - self._then > _FORGOTTEN_S:
            self._late_s = 0.0
        limit = _IN_TIME_S if self._is_too_late else _TOO_LATE_S
        self._is_too_late = self._late_s > limit
        return self._is_too_late


class Admission:
    """Places for live streams, or for files. If none is free it refuses at once, so that the others keep their pace.

    Attributes:
        num_slots: how many there are.
        num_taken: how many are occupied; the metric `gauge`, "streams" or "files", follows it.
        is_stopping: whether nobody is admitted any more.

    While results are late, `lateness` says so and nobody is admitted either; None: slots alone count.
    """

    def __init__(
        self, num_slots: int, metrics: Metrics, incidents: Incidents, gauge: str, lateness: Lateness | None = None
    ) -> None:
        self._lateness = lateness
        self.num_slots = num_slots
        self.num_taken = 0
        self.is_stopping = False
        self._metrics = metrics
        self._gauge = gauge
        self._incidents = incidents

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Occupy a slot; UnavailableError: none is free, or the server is about to stop."""
        if self.is_stopping:
            self._incidents.refuse("stopping")
            raise StoppingError
        if self.num_taken >= self.num_slots:
            self._incidents.refuse("full")
            raise UnavailableError(f"the server is full: it recognises {self.num_slots} {self._gauge} at a time")
        if self._lateness is not None and self.num_taken and self._lateness.is_too_late:
            self._incidents.refuse("late")
            raise UnavailableError("the server is full: it is slower than usual, and results would be late")
        self._change(1)
        try:
            with in_place():
                yield
        finally:
            self._change(-1)

    def _change(self, number: int) -> None:
        self.num_taken += number
        self._metrics.set(self._gauge, self.num_taken)


def measure_capacity(model: ServedModel) -> int:
    """Number of live streams that one thread of this machine can recognise with time to spare, by a short measurement.

    Eight streams of speech are decoded at full speed, including the second pass; the better of two runs counts.
    """
    return max(int(_SHARE / min(_decode_speech(model, _MEASURED_STREAMS) for _ in range(2))), 1)


def take_memory(model: ServedModel, capacity: int) -> None:
    """Decode as many streams together as ever will be.

    onnxruntime keeps the memory that a call has taken, and takes twice as much when it needs more: better now than when
    many chunks first coincide, perhaps after hours.
    """
    _decode_speech(model, min(capacity, MAX_BATCH))


def _decode_speech(model: ServedModel, num_streams: int) -> float:
    """Decode some seconds in several streams; returns the seconds of work per second of one stream."""
    recognizer = model.recognizer
    rate = recognizer.bundle.manifest.features.sample_rate
    samples = _speech(rate)
    streams = [recognizer.create_stream(model.stream_options) for _ in range(num_streams)]
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
