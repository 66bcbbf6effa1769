"""Recognises recordings with a bundle, live or as a whole, and times every stage.

The total is the time that an application's calls to the runtime take. Graphs are timed by their sessions. The features
and the search are timed through the runtime's observer interface.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime import Bundle, DecodingOptions, Model, Recognizer, Result, SessionSettings
from u2moe.runtime.bundle.files import BundleFiles
from u2moe.runtime.bundle.manifest import ModelConfig
from u2moe.runtime.decoding.context import Hotwords
from u2moe.runtime.decoding.pipeline import Observer
from u2moe.runtime.model.device import DeviceArray
from u2moe.runtime.model.session import Session
from u2moe.runtime.text.vocabulary import join_texts

Samples = npt.NDArray[np.float32]

STAGES = ("features", "encoder", "ctc", "search", "rescoring", "other")
_GRAPHS = {"encoder": "encoder", "static": "encoder", "ctc": "ctc", "decoder": "rescoring"}  # static: with CTC head
BUFFER_S = 0.1  # seconds of audio that a live source delivers at once, as in `u2moe transcribe --stream`
WHOLE_BUFFER_S = 10.0  # the same with full context, as in `u2moe transcribe`


@dataclass(frozen=True, kw_only=True)
class Mode:
    """The encoder context of a recognition: frames per chunk (None: full context), and left chunks (-1: all)."""

    chunk_size: int | None = None
    num_left_chunks: int = -1

    @classmethod
    def fixed(cls, config: ModelConfig) -> Mode | None:
        """Return the only mode of a graph of fixed shape; None for other graphs."""
        form = config.static
        return form if form is None else cls(chunk_size=form.chunk_size, num_left_chunks=form.num_left_chunks)

    @property
    def name(self) -> str:
        """The mode's name in tables."""
        left = "all" if self.num_left_chunks < 0 else self.num_left_chunks
        return "full context" if self.chunk_size is None else f"chunk {self.chunk_size}, left {left}"


@dataclass(frozen=True, kw_only=True)
class Event:
    """A call to the runtime that had work to do, usually because a chunk was complete."""

    audio_s: float  # seconds of audio delivered so far
    compute_s: float  # seconds from the last sample (if paced: from when it is due, with any backlog) to the result
    tokens: tuple[int, ...]  # of the current utterance after the call
    segment: int  # index of the current utterance
    num_committed: int = 0  # number of its committed words


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Times and results of recognising one recording."""

    audio_s: float  # seconds of audio
    wall_s: float  # seconds spent in calls to the runtime, without waiting for a paced source
    cpu_s: float  # CPU seconds of all threads during these calls
    stages: dict[str, float]  # seconds for each of `STAGES`; their sum is `wall_s`
    events: list[Event]  # calls that had work to do, in order
    final_s: float  # seconds from the end of the input to the final result
    segments: list[Result]  # final results

    @property
    def text(self) -> str:
        """Recognised text."""
        return join_texts([segment.text for segment in self.segments])


class Stopwatch:
    """Stopwatch for stages, and for calls that contain them. Stages must not nest in stages, nor calls in calls."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all times to zero."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.wall_s = self.cpu_s = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the duration of the `with` block to the time of `stage`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    @contextmanager
    def call(self) -> Iterator[None]:
        """Time the block as a call: add its time to `wall_s`, and the CPU time of all threads to `cpu_s`."""
        start, start_cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s += time.perf_counter() - start
        self.cpu_s += time.process_time() - start_cpu


class TimedSession(Session):
    """A session, made from the other arguments, that times its runs as one stage of a stopwatch."""

    def __init__(self, watch: Stopwatch, *session: Any, files: BundleFiles) -> None:
        super().__init__(*session, files=files)
        self._watch, self._stage = watch, _GRAPHS[self.graph.name]

    def run(self, feeds: Mapping[str, npt.NDArray[Any] | DeviceArray]) -> dict[str, Any]:
        """Return the outputs for the inputs `feeds`, both by name."""
        with self._watch(self._stage):
            return super().run(feeds)


class Probe:
    """A loaded bundle with a stopwatch. Not thread-safe.

    Chunks and endpoints in `options` are ignored: a `Mode` sets the chunks, and the bundle sets the endpoints. If
    `hotwords` is None, the bundle's hotwords apply. Raise BundleError if the bundle is damaged, ProviderError if a
    provider is not installed or did not start, and StreamError if the bundle does not support `options`.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: SessionSettings | None = None,
        options: DecodingOptions | None = None,
        hotwords: Hotwords | None = None,
    ) -> None:
        self.bundle, self.watch = bundle, Stopwatch()
        create = partial(TimedSession, self.watch)
        self.model = Model.load(BundleFiles(bundle.path), bundle.manifest, settings, create=create)
        self.kernels = {session.graph.name: session.kernels for session in self.model.sessions}
        self.options = replace(options or DecodingOptions(), endpoint=bundle.manifest.decoding.endpoint)
        observer = Observer(features=partial(self.watch, "features"), searching=partial(self.watch, "search"))
        self.recognizer = Recognizer(bundle, self.model, self.options, hotwords=hotwords, observer=observer)

    @property
    def sample_rate(self) -> int:
        """Sample rate in Hz of the audio to recognise."""
        return self.bundle.manifest.features.sample_rate

    def chunk_s(self, mode: Mode) -> float | None:
        """Return the seconds from one chunk to the next, the limit for a chunk's latency; None with full context."""
        return None if mode.chunk_size is None else mode.chunk_size * self.bundle.manifest.frame_s

    def recognise(self, samples: Samples, mode: Mode, *, paced: bool = False) -> Observation:
        """Recognise a recording, float32 [n] at the model's sample rate, buffer by buffer. `paced`: in real time."""
        options = replace(self.options, chunk_size=mode.chunk_size, num_left_chunks=mode.num_left_chunks)
        create = self.recognizer.create_recording_stream if mode.chunk_size is None else self.recognizer.create_stream
        stream, segments, events = create(options), list[Result](), list[Event]()
        self.watch.reset()
        begin = time.perf_counter()
        size = int((WHOLE_BUFFER_S if mode.chunk_size is None else BUFFER_S) * self.sample_rate)
        for start in range(0, len(samples), size):
            end = min(start + size, len(samples))
            arrived = time.perf_counter()
            if paced:
                due = begin + end / self.sample_rate
                time.sleep(max(due - arrived, 0.0))
                arrived = due
            with self.watch.call():
                with self.watch("features"):
                    stream.accept_waveform(self.sample_rate, samples[start:end])
                was_ready = stream.is_ready
                self.recognizer.decode_streams([stream])
                result = stream.get_result()
            if was_ready:
                times = {"compute_s": time.perf_counter() - arrived, "audio_s": end / self.sample_rate}
                tokens, segment, num = tuple(result.tokens), result.segment, result.num_committed
                events.append(Event(**times, tokens=tokens, segment=segment, num_committed=num))
            segments += stream.take_segments()
        audio_s, before = len(samples) / self.sample_rate, self.watch.wall_s
        with self.watch.call():
            with self.watch("features"):
                stream.input_finished()
            self.recognizer.decode_streams([stream])
        segments += stream.take_segments()
        final_s = time.perf_counter() - begin - audio_s if paced else self.watch.wall_s - before
        stages = {stage: self.watch.seconds.get(stage, 0.0) for stage in STAGES[:-1]}
        stages["other"] = self.watch.wall_s - sum(stages.values())
        times = {"audio_s": audio_s, "wall_s": self.watch.wall_s, "cpu_s": self.watch.cpu_s, "final_s": final_s}
        return Observation(**times, stages=stages, events=events, segments=segments)
