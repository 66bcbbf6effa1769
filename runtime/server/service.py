"""What all protocols of one process share: the recogniser, its scheduler, and admission."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from u2moe.runtime.audio.arrays import Resampler
from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.options import STREAM_CHUNK_SIZE, EndpointConfig
from u2moe.runtime.server.admission import Admission, measure_capacity, take_memory
from u2moe.runtime.server.errors import RequestError, StoppingError, UnavailableError
from u2moe.runtime.server.files import FileQueue
from u2moe.runtime.server.keys import Key, Keys
from u2moe.runtime.server.log import LOGGER, Incidents
from u2moe.runtime.server.scheduler import Scheduler
from u2moe.runtime.server.texts import languages_of
from u2moe.runtime.text.written.formatter import TextFormat
from u2moe.runtime.validation import checked_integer

if TYPE_CHECKING:
    from u2moe.runtime.options import DecodingOptions
    from u2moe.runtime.recognizer import Recognizer
    from u2moe.runtime.server.metrics import Metrics
    from u2moe.runtime.server.options import ServerOptions
    from u2moe.runtime.server.session import ServerSession

_LEFT_CHUNKS = 4
"""Chunks of left context of live streams, which bounds their memory and time."""
_MAX_HOTWORD_LEN = 200
_MAX_BEAMS = 40
"""Time and memory of the second pass grow with the beam."""
_POLL_S = 0.05
_AFTER_DRAIN_S = 5.0
"""Seconds for the last results of interrupted streams."""


class Service:
    """A server without its sockets. `start` it in an event loop before use, `stop` it at the end.

    Attributes:
        recognizer: recogniser of all streams and files; files are decoded with its options.
        options: options of the server.
        metrics: metrics of the server.
        incidents: counts and logs what goes wrong with clients.
        keys: keys of clients.
        stream_options: how live streams are decoded, unless a client says otherwise.
    """

    def __init__(self, recognizer: Recognizer, options: ServerOptions, metrics: Metrics) -> None:
        self.recognizer = recognizer
        self.options = options
        self.stream_options = dataclasses.replace(
            recognizer.options,
            chunk_size=options.chunk_size or recognizer.model.config.static_chunk_size or STREAM_CHUNK_SIZE,
            num_left_chunks=_LEFT_CHUNKS,
            endpoint=EndpointConfig(),
        )
        self.metrics = metrics
        self.incidents = Incidents(metrics)
        self.keys = Keys(options)
        self.is_ready = False
        self._places: set[Place] = set()
        self._num_by_key: Counter[str] = Counter()

    async def start(self) -> None:
        """Warm up, measure the capacity if none is given, and take the memory for it."""
        await asyncio.to_thread(self.recognizer.warm_up)
        capacity = self.options.capacity
        if capacity is None:
            capacity = await asyncio.to_thread(measure_capacity, self.recognizer, self.stream_options)
        await asyncio.to_thread(take_memory, self.recognizer, self.stream_options, capacity)
        self.scheduler = Scheduler(self.recognizer, self.metrics, self.options.limits)
        lateness = self.scheduler.lateness if self.options.capacity is None else None
        self.admission = Admission(capacity, self.metrics, self.incidents, "streams", lateness)
        self.files = FileQueue(self.recognizer, self.metrics, self.incidents, self.options)
        self.is_ready = True
        self.metrics.set("capacity", capacity)
        self.metrics.set("ready", 1)

    @property
    def languages(self) -> list[str]:
        """Codes of the languages of the model, as stated or by its vocabulary."""
        return list(self.options.languages) or languages_of(self.recognizer.vocabulary.symbols)

    def decoding(
        self, default: DecodingOptions, *, is_written: bool | None = None, beam_size: int | None = None
    ) -> DecodingOptions:
        """How a client's audio is decoded, where it differs from `default`.

        Args:
            default: options of streams, or of files.
            is_written: whether English is written with digits and small letters.
            beam_size: prefixes that the search keeps.

        Raises:
            RequestError: too many.
        """
        if beam_size is not None:
            try:
                checked_integer("beam_size", beam_size, least=1, most=_MAX_BEAMS)
            except ValueError as error:
                raise RequestError(str(error), "beam_size") from None
        text_format = default.text_format if is_written is None else TextFormat() if is_written else None
        return dataclasses.replace(default, beam_size=beam_size or default.beam_size, text_format=text_format)

    async def hotwords(self, phrases: Sequence[str | tuple[str, float]]) -> ContextGraph | None:
        """Hotwords of a client, or None if it has none.

        Raises:
            RequestError: too many, too long, or not spellable with the vocabulary.
        """
        limit = self.options.limits.hotwords
        if len(phrases) > limit:
            raise RequestError(f"there may be {limit} hotwords, got {len(phrases)}", "hotwords")
        for phrase in phrases:
            text = phrase if isinstance(phrase, str) else phrase[0]
            if len(text) > _MAX_HOTWORD_LEN:
                raise RequestError(f"a hotword may have {_MAX_HOTWORD_LEN} characters, got {len(text)}", "hotwords")
        if not phrases:
            return None
        try:
            return await asyncio.to_thread(ContextGraph, phrases, self.recognizer.vocabulary)
        except ValueError as error:
            raise RequestError(str(error), "hotwords") from error

    async def writable_hotwords(self, phrases: Sequence[str]) -> ContextGraph | None:
        """Hotwords from phrases of any kind; those that the vocabulary cannot spell are omitted."""
        return await asyncio.to_thread(self._writable, dict.fromkeys(phrases[: self.options.limits.hotwords]))

    def _writable(self, phrases: Iterable[str]) -> ContextGraph | None:
        writable = []
        for phrase in phrases:
            with contextlib.suppress(ValueError):
                if len(phrase) <= _MAX_HOTWORD_LEN:
                    ContextGraph([phrase], self.recognizer.vocabulary)
                    writable.append(phrase)
        return ContextGraph(writable, self.recognizer.vocabulary) if writable else None

    @contextlib.contextmanager
    def share_of(self, key: Key | None) -> Iterator[None]:
        """One of the streams and files that a key may have at once.

        Raises:
            UnavailableError: it has as many as it may.
        """
        if key is None or key.num_streams is None:
            yield
            return
        if self._num_by_key[key.name] >= key.num_streams:
            self.incidents.refuse("full")
            raise UnavailableError(f"the key {key.name} has {key.num_streams} streams at a time", code="rate_limit")
        self._num_by_key[key.name] += 1
        try:
            yield
        finally:
            self._num_by_key[key.name] -= 1

    @contextlib.contextmanager
    def place(self, protocol: str, key: Key | None = None) -> Iterator[Place]:
        """A place for live streams, one at a time, as long as the connection of the current task lasts.

        Raises:
            UnavailableError: none is free, or the server stops and cannot wait for the task.
        """
        with self.share_of(key), self.admission.place():
            self.metrics.count("connections", protocol)
            place = Place(self)
            self._places.add(place)
            try:
                yield place
            except asyncio.CancelledError:
                if not place.is_drained:
                    raise
                raise StoppingError from None
            finally:
                self._places.discard(place)
                if place.session is not None:
                    place.session.close()

    async def drain(self) -> None:
        """Refuse new clients, and wait until running utterances and files are finished, or time is up."""
        self.is_ready = False
        self.metrics.set("ready", 0)
        self.admission.is_stopping = self.files.admission.is_stopping = True
        for place in list(self._places):
            place.drain()
        if not await self._wait_until_idle(self.options.drain_s):
            LOGGER.warning(
                "cut off %d streams and %d files: they took longer than --drain-timeout",
                self.admission.num_taken,
                self.files.admission.num_taken,
            )
            for place in list(self._places):
                place.finish()
            self.files.cut()
            await self._wait_until_idle(_AFTER_DRAIN_S)

    def stop(self) -> None:
        """End the threads; unfinished sessions get no more results."""
        self.is_ready = False
        self.scheduler.stop()
        self.files.stop()

    async def _wait_until_idle(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while self.admission.num_taken or self.files.admission.num_taken:  # noqa: ASYNC110 - once, at the end
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            return False
        return True


class Place:
    """The right of one connection to use one session at a time.

    Attributes:
        session: the latest session.
        is_drained: whether the connection was asked to end because the server stops.
    """

    def __init__(self, service: Service) -> None:
        self.session: ServerSession | None = None
        self.is_drained = False
        self._service = service
        self._task = asyncio.current_task()
        self._fed_before_s = 0.0
        self._is_whole = False

    @property
    def fed_s(self) -> float:
        """Seconds of audio fed to its sessions."""
        return self._fed_before_s + (self.session.duration if self.session is not None else 0.0)

    async def open_session(
        self,
        sample_rate: float,
        decoding: DecodingOptions | None = None,
        hotwords: ContextGraph | None = None,
        *,
        is_whole: bool = False,
    ) -> ServerSession:
        """A session for a source; the previous one is abandoned.

        A source that `is_whole` is only of use up to its end: a server that stops waits for it, or ends it with an
        error, but not after an utterance.

        Raises:
            AudioError: an invalid sample rate.
            StreamError: the bundle does not support `decoding`.
            StoppingError: the server is about to stop.
        """
        service = self._service
        if service.admission.is_stopping:
            raise StoppingError
        Resampler(sample_rate, service.recognizer.bundle.manifest.features.sample_rate)  # validates the rate
        stream = service.recognizer.create_stream(decoding or service.stream_options, hotwords=hotwords)
        if self.session is not None:
            self.session.close()
        self._fed_before_s = self.fed_s
        self.session = service.scheduler.open(stream, sample_rate)
        self._is_whole = is_whole
        return self.session

    def drain(self) -> None:
        """End after the current utterance or the whole source, immediately if there is none."""
        self.is_drained = True
        if self.session is not None and not self.session.is_over:
            if not self._is_whole:
                self.session.drain()
        elif self._task is not None:
            self._task.cancel()

    def finish(self) -> None:
        """End now: audio so far is recognised, but no more is awaited; a part of a whole source is an error."""
        if self.session is not None and not self.session.is_over and not self._is_whole:
            self.session.finish()
        elif self._task is not None:
            self._task.cancel()
