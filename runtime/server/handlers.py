"""uvicorn's HTTP and WebSocket connections, with limits on time and memory per client.

They extend classes of uvicorn that are not public: tests/server/test_uvicorn.py names the version and what is used.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from u2moe.runtime.server.mailbox import Mailbox
from u2moe.runtime.server.patience import LEAST_BYTES_PER_S

if TYPE_CHECKING:
    from websockets.frames import Frame

    from u2moe.runtime.server.metrics import Metrics

_HEADER_S = 20.0
"""Seconds that a client has to send a request."""
_READ_S = 20.0
"""Seconds in which a client has to read some of a response."""
_CLOSE_S = 15.0
"""Seconds that a client has to close a connection that is closed here."""


class HttpHandler(H11Protocol):
    """HTTP with timeouts for clients that never complete a request or do not read the response."""

    def __init__(self, metrics: Metrics, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._newcomer = contextlib.ExitStack()  # closed once the connection is known to be a stream or none
        self._newcomer.callback(metrics.know_connection)
        self._request_timer: asyncio.TimerHandle | None = None
        self._response_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._await_request()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Become a WebSocket."""
        self._stop_timers()
        self.app_state = {**self.app_state, "newcomer": self._newcomer}
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._newcomer.close()
        self._await_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Wait until the client has read more of the response."""
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        """Stop the wait: it was read."""
        if self._response_timer is not None:
            self._response_timer.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End it."""
        self._stop_timers()
        self._newcomer.close()
        super().connection_lost(exc)

    def _await_request(self) -> None:
        """Limit the time for the next request; the body of the previous one may still be arriving."""
        if self._request_timer is not None:
            self._request_timer.cancel()
        self._request_timer = self.loop.call_later(_HEADER_S, self._end_without_request)

    def _end_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _await_reading(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._response_timer = self.loop.call_later(_READ_S, self._end_without_reading, size)

    def _end_without_reading(self, size: int) -> None:
        """End the connection if hardly any of the `size` bytes were read."""
        if size - self.transport.get_write_buffer_size() < LEAST_BYTES_PER_S * _READ_S:
            self.transport.abort()
        else:
            self._await_reading()

    def _stop_timers(self) -> None:
        for timer in (self._request_timer, self._response_timer):
            if timer is not None:
                timer.cancel()


class WebSocketHandler(WebSocketsSansIOProtocol):
    """A WebSocket with a bounded queue, which is cut off if the client does not complete the close."""

    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._fragments = bytearray()
        self._mailbox = Mailbox(self._hold)
        self.queue = cast("asyncio.Queue[Any]", self._mailbox)
        self.app_state = {**self.app_state, "mailbox": self._mailbox}
        self.read_paused = True  # so that uvicorn does not pause after each message: the mailbox decides

    def handle_cont(self, event: Frame) -> None:
        """Append a fragment to one buffer: many small objects would take far more memory than their content."""
        if self.frames:
            self._fragments, self.frames = bytearray(self.frames[0]), []
        self._fragments += event.data
        if event.fin:
            self.frames, self._fragments = [bytes(self._fragments)], bytearray()
            self.send_receive_event_to_app()

    async def receive(self) -> Any:
        """The next event, for Starlette; protocols take theirs from the mailbox."""
        return await self._mailbox.get()

    def _hold(self, is_held: bool) -> None:
        if is_held and not self.close_sent:  # what follows is discarded, and the client's own close is awaited
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    async def send(self, message: Any) -> None:
        """Send a message; after the first one the client has been accepted or refused."""
        self.app_state["newcomer"].close()
        await super().send(message)

    def connection_lost(self, exc: Exception | None) -> None:
        """End it."""
        self.app_state["newcomer"].close()
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)
        self._mailbox.close()

    async def run_asgi(self) -> None:
        """Serve it, and make sure that it ends."""
        await super().run_asgi()
        if not self.disconnected:
            self._deadline = self.loop.call_later(_CLOSE_S, self.transport.abort)
