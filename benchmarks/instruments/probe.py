"""Recognises recordings with a bundle, live or as a whole, and times every stage.

Times are taken around the calls that an application makes and around the stages inside them, through the interfaces
that the runtime provides for this; nothing is replaced.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from u2moe.runtime import Bundle, DecodingOptions, Model, Recognizer, Result, Stream
from u2moe.runtime.decoding.pipeline import Observer
from u2moe.runtime.model.session import Session
from u2moe.runtime.model.settings import SessionSettings
from u2moe.runtime.options import Search
from u2moe.runtime.text.vocabulary import join_texts

Samples = npt.NDArray[np.float32]

STAGES = ("features", "encoder", "ctc", "search", "rescoring", "other")
PORTION_S = 0.1
"""Seconds of audio that a live source delivers at once, as in `u2moe transcribe --stream`."""
WHOLE_PORTION_S = 10.0
"""The same where there are no chunks, as in `u2moe transcribe`."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How a recording is recognised.

    Attributes:
        chunk_size: encoder frames per chunk; None: full context.
        num_left_chunks: chunks of left context; -1: all.
        num_streams: number of streams at once, in one batch.
    """

    chunk_size: int | None = None
    num_left_chunks: int = -1
    num_streams: int = 1

    @property
    def name(self) -> str:
        """Its name in tables."""
        left = "all" if self.num_left_chunks < 0 else self.num_left_chunks
        name = "full context" if self.chunk_size is None else f"chunk {self.chunk_size}, left {left}"
        return name if self.num_streams == 1 else f"{name}, {self.num_streams} streams"


@dataclass(frozen=True, kw_only=True)
class Event:
    """A call that had work to do, usually a complete chunk.

    Attributes:
        audio_s: seconds of audio delivered so far.
        compute_s: seconds from the arrival of the last sample to the result. In real time this counts from when the
            sample was due, so that falling behind counts, too.
        tokens: tokens of the current utterance at that time.
        segment: number of that utterance.
    """

    audio_s: float
    compute_s: float
    tokens: tuple[int, ...]
    segment: int


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Times and results of recognising one recording (or several at once, in a batch).

    Attributes:
        audio_s: seconds of audio, in all streams together.
        wall_s: seconds spent in calls of the runtime, without waiting for a paced source.
        cpu_s: CPU seconds of all threads in these calls.
        stages: seconds by stage, `STAGES`; their sum is `wall_s`.
        events: chunks of the first stream, in order.
        final_s: from the end of the input to the final result.
        segments: final results of the first stream.
        texts: the text of each stream.
    """

    audio_s: float
    wall_s: float
    cpu_s: float
    stages: dict[str, float]
    events: list[Event]
    final_s: float
    segments: list[Result]
    texts: list[str]


class Stopwatch:
    """Measures seconds by stage, and of the calls that contain the stages. Neither stages nor calls may nest."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all times to zero."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.wall_s = 0.0
        self.cpu_s = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    @contextmanager
    def call(self) -> Iterator[None]:
        """Add the time of the block, and the CPU time of all threads, to the calls."""
        start, start_cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_s += time.perf_counter() - start
        self.cpu_s += time.process_time() - start_cpu

    def stages(self) -> dict[str, float]:
        """Seconds by stage; the rest of the calls is "other"."""
        stages = {stage: self.seconds.get(stage, 0.0) for stage in STAGES[:-1]}
        return {**stages, "other": self.wall_s - sum(stages.values())}


class TimedSession(Session):
    """A session whose runs count as one stage."""

    def __init__(self, stage: str, watch: Stopwatch, *session: Any) -> None:
        """Create it from a stage, a watch, and the arguments of `Session`."""
        super().__init__(*session)
        self._stage = stage
        self._watch = watch

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Outputs by name for inputs by name."""
        with self._watch(self._stage):
            return super().run(feeds)


class Probe:
    """A loaded bundle and a stopwatch. Not thread-safe: there is only one stopwatch.

    Raises:
        BundleError: not a bundle, or a damaged one.
        ProviderError: a provider is not installed or did not start.
        StreamError: the bundle does not support the search.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: SessionSettings | None = None,
        *,
        search: Search | None = None,
    ) -> None:
        """Load the graphs of a bundle.

        Args:
            bundle: what to measure.
            settings: where and how its graphs run.
            search: None: rescoring if there is a decoder, else prefix beam search.
        """
        self.bundle = bundle
        self.watch = Stopwatch()
        settings = settings or SessionSettings()
        stages = {"encoder": "encoder", "ctc": "ctc", "decoder": "rescoring"}
        sessions = {
            graph.name: TimedSession(
                stages[graph.name], self.watch, bundle.path / graph.file, graph, bundle.manifest, settings
            )
            for graph in bundle.manifest.model.graphs()
        }
        self.model = Model(bundle.manifest, sessions["encoder"], sessions["ctc"], sessions.get("decoder"))
        search = search or ("attention_rescoring" if self.model.has_decoder else "ctc_prefix_beam")
        self.options = DecodingOptions(search=search, endpoint=bundle.manifest.decoding.endpoint)
        observer = Observer(features=partial(self.watch, "features"), searching=partial(self.watch, "search"))
        self.recognizer = Recognizer(bundle, self.model, self.options, observer=observer)

    @property
    def sample_rate(self) -> int:
        """Hertz of the samples to recognise."""
        return self.bundle.manifest.features.sample_rate

    def chunk_s(self, mode: Mode) -> float | None:
        """Seconds from one chunk to the next, the budget of its latency; None with full context."""
        if mode.chunk_size is None:
            return None
        return mode.chunk_size * self.bundle.manifest.frame_s

    def recognise(self, samples: Samples, mode: Mode, *, paced: bool = False) -> Observation:
        """Recognise one recording in portions.

        Args:
            samples: at the model's rate, float32 [n].
            mode: chunks and number of streams. Each further stream starts at another place in the recording, so that
                streams do not contain the same speech at the same time.
            paced: deliver portions when a live source would, not earlier.
        """
        num = mode.num_streams
        streams = [self._stream(mode) for _ in range(num)]
        sounds = [np.roll(samples, -index * len(samples) // num) for index in range(num)]
        segments: list[list[Result]] = [[] for _ in range(num)]
        events: list[Event] = []
        self.watch.reset()
        begin = time.perf_counter()
        for start, end in self._portions(len(samples), mode):
            arrived = time.perf_counter()
            if paced:
                due = begin + end / self.sample_rate
                time.sleep(max(due - arrived, 0.0))
                arrived = due
            with self.watch.call():
                with self.watch("features"):
                    for stream, sound in zip(streams, sounds, strict=True):
                        stream.accept_waveform(self.sample_rate, sound[start:end])
                was_ready = streams[0].is_ready
                self.recognizer.decode_streams(streams)
                result = streams[0].get_result()
            if was_ready:
                compute_s, audio_s = time.perf_counter() - arrived, end / self.sample_rate
                shown = tuple(result.tokens)
                events.append(Event(audio_s=audio_s, compute_s=compute_s, tokens=shown, segment=result.segment))
            _collect(streams, segments)
        before, done = self.watch.wall_s, begin + len(samples) / self.sample_rate
        with self.watch.call():
            with self.watch("features"):
                for stream in streams:
                    stream.input_finished()
            self.recognizer.decode_streams(streams)
        _collect(streams, segments)
        return Observation(
            audio_s=len(samples) / self.sample_rate * num,
            wall_s=self.watch.wall_s,
            cpu_s=self.watch.cpu_s,
            stages=self.watch.stages(),
            events=events,
            final_s=time.perf_counter() - done if paced else self.watch.wall_s - before,
            segments=segments[0],
            texts=[join_texts([segment.text for segment in own]) for own in segments],
        )

    def _stream(self, mode: Mode) -> Stream:
        options = replace(self.options, chunk_size=mode.chunk_size, num_left_chunks=mode.num_left_chunks)
        create = self.recognizer.create_recording_stream if mode.chunk_size is None else self.recognizer.create_stream
        return create(options)

    def _portions(self, num_samples: int, mode: Mode) -> Iterator[tuple[int, int]]:
        """First and last sample (exclusive) of each portion."""
        size = int((WHOLE_PORTION_S if mode.chunk_size is None else PORTION_S) * self.sample_rate)
        return ((start, min(start + size, num_samples)) for start in range(0, num_samples, size))


def _collect(streams: Sequence[Stream], segments: Sequence[list[Result]]) -> None:
    for stream, own in zip(streams, segments, strict=True):
        own.extend(stream.take_segments())
