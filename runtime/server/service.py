"""State shared by all protocols of a process: models, scheduler and admission."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from u2moe.runtime.audio.arrays import Resampler
from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.options import DecodingOptions
from u2moe.runtime.recognizer import Recognizer
from u2moe.runtime.server.access import KEY, Key, Keys
from u2moe.runtime.server.accounts import CLIENT, Admission, Take, address_of, site_of
from u2moe.runtime.server.errors import RequestError, StoppingError, UnavailableError
from u2moe.runtime.server.files import FileQueue
from u2moe.runtime.server.log import LOGGER, Metrics
from u2moe.runtime.server.models import ServedModel
from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.server.scheduler import Scheduler, ServedStream

_MOST_HELD = 16 << 20  # bytes held for all clients without a slot, not counting the buffers of their connections
_POLL_S = 0.05
_AFTER_DRAIN_S = 5.0  # maximum seconds to wait for the last results of streams that were cut off


class Service:
    """A server without sockets. Call `start` in an event loop before use, and `stop` at the end."""

    def __init__(self, recognizers: Mapping[str, Recognizer], options: ServerOptions, metrics: Metrics) -> None:
        self.models = {name: ServedModel(name, each, options) for name, each in recognizers.items()}
        self.default = next(iter(self.models.values()))  # for clients that choose no model
        self.options, self.metrics = options, metrics
        self.keys = Keys(options)
        self.is_ready = False
        self._slots: set[Slot] = set()
        self._num_held = 0
        self._shares: dict[str, Admission] = {}

    async def start(self) -> None:
        """Warm up the models and allocate memory. If the options set no capacity, use that of the slowest model."""
        models, capacity = self.models.values(), self.options.capacity
        for model in models:
            await asyncio.to_thread(model.recognizer.warm_up)
        if capacity is None:
            capacity = min([await asyncio.to_thread(model.measure_capacity) for model in models])
        for model in models:
            await asyncio.to_thread(model.prepare, capacity)
        self.scheduler = Scheduler(self.metrics, self.options.limits)
        lateness = self.scheduler.lateness if self.options.capacity is None else None
        self.admission = Admission(capacity, self.metrics, "streams", lateness)
        self.files = FileQueue(self.metrics, self.options)
        self.is_ready = True
        self.metrics.set("capacity", capacity)
        self.metrics.set("ready", 1)

    def model(self, name: Any = None) -> ServedModel:
        """Return the requested model, or the default. A server with one model accepts any name. Raises RequestError."""
        if not name or len(self.models) == 1:
            return self.default
        if not isinstance(name, str) or name not in self.models:
            there_are = ", ".join(self.models)
            raise RequestError(f"unknown model {name!r:.80}: must be one of {there_are}", "model", "model_not_found")
        return self.models[name]

    def client_of(self, scope: Mapping[str, Any]) -> str:
        """Return the name of a client's key if there are several keys, else its address or IPv6 network, or ""."""
        if (key := scope[KEY]) is not None and len(self.keys.by_name) > 1:
            return f"key {key.name}"
        host = str((scope.get("client") or ("",))[0])
        return host if (address := address_of(host)) is None else site_of(address)

    def share_of(self, key: Key | None) -> contextlib.AbstractContextManager[Take]:
        """Return a context manager that takes one of a key's slots. Raises UnavailableError if its limit is reached."""
        if key is None or key.num_streams is None:
            return contextlib.nullcontext(lambda _: None)
        share = self._shares.setdefault(key.name, Admission(0, self.metrics, "streams", key=key.name))
        share.num_slots = key.num_streams
        return share.slot()

    @contextlib.contextmanager
    def slot(self, protocol: str, key: Key | None = None) -> Iterator[Slot]:
        """Take a slot for one live stream at a time, for the current task. See `Admission.slot` for errors."""
        with self.share_of(key) as take_of_key, self.admission.slot() as take:
            self.metrics.count("connections", protocol)
            slot = Slot(self, (take_of_key, take))
            self._slots.add(slot)
            try:
                with CLIENT.get().place(slot.abandon):
                    yield slot
            except asyncio.CancelledError:
                if not slot.is_drained:
                    raise
                raise StoppingError from None
            finally:
                self._slots.discard(slot)
                slot.abandon()

    @contextlib.contextmanager
    def room(self, num_bytes: int) -> Iterator[None]:
        """Reserve memory for data of a client without a slot. Raises UnavailableError if all such data is too much."""
        if self._num_held + num_bytes > _MOST_HELD:
            self.metrics.refuse("full")
            raise UnavailableError("the server is full: clients are sending too much data before they send audio")
        self._num_held += num_bytes
        try:
            yield
        finally:
            self._num_held -= num_bytes

    async def drain(self) -> None:
        """Refuse new clients, and wait for utterances and files in progress. After `drain_s` seconds, cut them off."""
        self.is_ready = False
        self.metrics.set("ready", 0)
        self.admission.is_stopping = self.files.admission.is_stopping = True
        for is_now, seconds in ((False, self.options.drain_s), (True, _AFTER_DRAIN_S)):
            if is_now:
                told = "cut off %.0f streams and %d files: they took longer than --drain-timeout"
                LOGGER.warning(told, self.admission.num_taken, self.files.admission.num_taken)
                self.files.cut()
            for slot in list(self._slots):
                slot.end(is_now=is_now)
            end = time.monotonic() + seconds
            while (is_busy := self.admission.num_taken or self.files.admission.num_taken) and time.monotonic() < end:  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
            if not is_busy:
                return

    def stop(self) -> None:
        """Stop the threads. Unfinished streams get no more results."""
        self.is_ready = False
        self.scheduler.stop()
        self.files.stop()


class Slot:
    """A connection's right to use one stream at a time."""

    def __init__(self, service: Service, takes: Sequence[Take]) -> None:
        self.model = service.default  # of the next stream
        self.stream: ServedStream | None = None  # the latest
        self.is_drained = False  # whether the connection must end because the server is stopping
        self._service, self._takes = service, takes
        self._task = asyncio.current_task()
        self._fed_before_s = 0.0

    @property
    def fed_s(self) -> float:
        """Seconds of audio fed to all streams of the slot."""
        return self._fed_before_s + (self.stream.duration if self.stream is not None else 0.0)

    def open_stream(
        self, sample_rate: float, decoding: DecodingOptions | None = None, hotwords: ContextGraph | None = None
    ) -> ServedStream:
        """Open a stream, and abandon the previous one.

        Raises AudioError for an invalid sample rate, StreamError if the bundle does not support `decoding`,
        UnavailableError if too few slots are free for a costly stream, and StoppingError.
        """
        service = self._service
        if service.admission.is_stopping:
            raise StoppingError
        recognizer = self.model.recognizer
        Resampler(sample_rate, recognizer.bundle.manifest.features.sample_rate)  # validates the rate
        options = decoding or self.model.stream_options
        for take in self._takes:
            take(self.model.cost(options, hotwords))
        stream = recognizer.create_stream(options, hotwords=hotwords)
        if self.stream is not None and not self.stream.is_over:  # if it is over, it may still have unread results
            self.stream.close()
        self._fed_before_s = self.fed_s
        self.stream = service.scheduler.open(recognizer, stream, sample_rate)
        return self.stream

    def abandon(self) -> None:
        """Abandon the current stream."""
        if self.stream is not None:
            self.stream.close()

    def end(self, *, is_now: bool) -> None:
        """End after the current utterance, or after a stream that must be whole. Without a stream, end at once.

        If `is_now`, the utterance ends with the audio so far, and a stream that must be whole ends with an error.
        """
        self.is_drained = True
        if self.stream is None or self.stream.is_over or (self.stream.must_be_whole and is_now):
            if self._task is not None:
                self._task.cancel()
        elif not self.stream.must_be_whole:
            self.stream.finish() if is_now else self.stream.drain()
