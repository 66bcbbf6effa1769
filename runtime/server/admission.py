"""Admission of live streams and files, and measurement of how many streams this machine can recognise at a time."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np

from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.decoding.pipeline import MAX_BATCH
from u2moe.runtime.options import WITHOUT_BEAM
from u2moe.runtime.server.errors import StoppingError, UnavailableError
from u2moe.runtime.server.log import Incidents
from u2moe.runtime.server.models import MOST_BEAM, ServedModel
from u2moe.runtime.text.vocabulary import WORD_BOUNDARY, is_special

_SHARE = 0.35
"""Share of the measured throughput that streams may use. The rest is a reserve for the event loop, for chunks that
arrive together, and for other programs. Such programs may later take up to half of the processor time."""
_TOO_LATE_S, _IN_TIME_S = 0.6, 0.3  # no clients are admitted above the first, and again below the second (seconds)
_AVERAGED_S = 1.0
"""Time constant in seconds of the average lateness. The average is over time, not over rounds, because rounds become
longer when results are late."""
_FORGOTTEN_S = 2.0  # seconds without live audio after which lateness counts as 0
_MEASURED_STREAMS = 8
_MEASURED_S = 4.0
_MEASURED_HOTWORDS = 1000


class Lateness:
    """Average time that live audio waits for recognition.

    The server's capacity is measured only at startup. High lateness shows that the machine has since become slower or
    has other work. Once results are late, no new clients are admitted until results are clearly on time again.
    """

    def __init__(self) -> None:
        self._late_s, self._then = 0.0, time.monotonic()
        self._is_too_late = False

    def observe(self, seconds: float) -> None:
        """Update the average after a scheduler round in which live audio waited at most `seconds`."""
        now = time.monotonic()
        passed_s = min(now - self._then, max(seconds, _IN_TIME_S))  # a pause without live audio does not count
        self._late_s += (1 - math.exp(-passed_s / _AVERAGED_S)) * (seconds - self._late_s)
        self._then = now

    @property
    def is_too_late(self) -> bool:
        """Whether no more streams should be admitted."""
        if time.monotonic() - self._then > _FORGOTTEN_S:
            self._late_s = 0.0
        self._is_too_late = self._late_s > (_IN_TIME_S if self._is_too_late else _TOO_LATE_S)
        return self._is_too_late


Take = Callable[[float], None]  # sets how many slots a client takes: the cost of its stream relative to a plain one


class Admission:
    """Slots for live streams or for files. If none is free, clients are refused immediately.

    The metric `gauge`, "streams" or "files", shows how many slots are taken. With `lateness`, clients are also refused
    while results are late. The slots belong to the API key with the name `key`, or else to the server.
    """

    def __init__(
        self, num_slots: int, incidents: Incidents, gauge: str, lateness: Lateness | None = None, key: str | None = None
    ) -> None:
        self._incidents, self._gauge, self._lateness, self._key = incidents, gauge, lateness, key
        self.num_slots, self.num_taken = num_slots, 0.0  # a stream that costs more than a plain one takes several
        self.is_stopping = False  # whether all clients are refused

    @contextlib.contextmanager
    def slot(self) -> Iterator[Take]:
        """Take a slot for the `with` block; yield a function that changes their number. Raises UnavailableError."""
        if self.is_stopping:
            self._incidents.refuse("stopping")
            raise StoppingError
        own = 0.0

        def take(number: float) -> None:
            nonlocal own
            number = min(number, self.num_slots)
            if number > own and self.num_taken - own + number > self.num_slots:
                self._incidents.refuse("full")
                cost = f"; this one costs as much as {number:.1f}" if number > 1 else ""
                limit = "the server is full: it recognises" if self._key is None else f"the key {self._key} allows"
                code = None if self._key is None else "rate_limit"
                raise UnavailableError(f"{limit} {self.num_slots} {self._gauge} at a time{cost}", code=code)
            self.num_taken = round(self.num_taken - own + number, 3)
            own = number
            if self._key is None:
                self._incidents.metrics.set(self._gauge, self.num_taken)

        take(1.0)
        try:
            if self._lateness is not None and self.num_taken > 1 and self._lateness.is_too_late:
                self._incidents.refuse("late")
                raise UnavailableError("the server is full: it is slower than usual, and results would be late")
            yield take
        finally:
            take(0.0)


def measure_capacity(model: ServedModel) -> int:
    """Measure how many live streams one thread can recognise with time to spare, by the faster of two runs of eight."""
    return max(int(_SHARE / min(_decode_speech(model, _MEASURED_STREAMS, _MEASURED_S) for _ in range(2))), 1)


def measure_costs(model: ServedModel) -> None:
    """Measure `model.costs`: of streams with a wider beam, with hotwords, with both. The faster of two runs counts."""
    if model.stream_options.search in WITHOUT_BEAM:
        return
    vocabulary = model.recognizer.vocabulary
    written = (symbol.strip(WORD_BOUNDARY + " ") for symbol in vocabulary.symbols if not is_special(symbol))
    hotwords = ContextGraph(list(islice(filter(None, written), _MEASURED_HOTWORDS)), vocabulary)
    beams = (model.beam_size, max(model.beam_size, MOST_BEAM))
    kinds = [(beam_size, graph) for graph in (None, hotwords) for beam_size in beams]
    rounds = [[_decode_speech(model, 2, _MEASURED_S / 2, *kind) for kind in kinds] for _ in range(2)]
    plain, *others = (min(each) for each in zip(*rounds, strict=True))
    model.costs = (1.0, *(max(seconds / plain, 1.0) for seconds in others))


def take_memory(model: ServedModel, capacity: int) -> None:
    """Decode the largest possible batch of streams, so that onnxruntime allocates its memory now.

    onnxruntime keeps the memory that a call needed, and doubles it when a later call needs more. Without this batch,
    memory would grow when many streams are first decoded together, perhaps after hours.
    """
    _decode_speech(model, min(capacity, MAX_BATCH), _MEASURED_S)


def _decode_speech(
    model: ServedModel,
    num_streams: int,
    speech_s: float,
    beam_size: int | None = None,
    hotwords: ContextGraph | None = None,
) -> float:
    """Decode the demo's clips, or else noise, in several streams; return the seconds of work per second of audio."""
    recognizer = model.recognizer
    rate = recognizer.bundle.manifest.features.sample_rate
    clips = [read_audio(clip, rate) for clip in sorted((DEMO_FOLDER / "clips").glob("*.flac"))]
    noise = np.random.default_rng(0).normal(0, 0.1, round(_MEASURED_S * rate)).astype(np.float32)
    samples = np.resize(np.concatenate(clips) if clips else noise, round(speech_s * rate))
    options = model.stream_options if beam_size is None else replace(model.stream_options, beam_size=beam_size)
    streams = [recognizer.create_stream(options, hotwords=hotwords) for _ in range(num_streams)]
    begin = time.perf_counter()
    for start in range(0, len(samples), rate // 5):
        for stream in streams:
            stream.accept_waveform(rate, samples[start : start + rate // 5])
        recognizer.decode_streams(streams)
    for stream in streams:
        stream.input_finished()
    recognizer.decode_streams(streams)
    return (time.perf_counter() - begin) / (len(streams) * len(samples) / rate)
