"""uvicorn's HTTP and WebSocket connections, with limits on time and memory per client.

They extend classes of uvicorn that are not public: tests/server/test_uvicorn.py names the version and what is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

from u2moe.runtime.server.connections import TrackedConnection
from u2moe.runtime.server.errors import RequestError
from u2moe.runtime.server.log import Incidents
from u2moe.runtime.server.mailbox import Mailbox
from u2moe.runtime.server.pace import LEAST_BYTES_PER_S, Pieces

_HEADER_S = 20.0
"""Seconds that a client has to send a request."""
_READ_S = 20.0
"""Seconds in which a client has to read some of a response."""
_CLOSE_S = 15.0
"""Seconds that a client has to close a connection that is closed here."""
MAX_TEXT_BYTES = 1 << 20
"""Maximum bytes of a text: some seconds of audio in base64, or a thousand hotwords."""
_MAX_DEAF_BYTES = 64 << 10
"""Bytes of a frame that are still awaited after the close: what is longer is not the client's own close."""
_MESSAGE_S = 50e-6
"""Seconds that the reader of a message spends on it, at least."""
_TEXT_BYTE_S = 25e-9
"""Seconds that it takes to read JSON, for each byte of a text, at most."""


class HttpHandler(H11Protocol):
    """HTTP with timeouts for clients that never complete a request or do not read the response."""

    def __init__(self, incidents: Incidents, visit: TrackedConnection, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._incidents = incidents
        self._visit = visit
        self._unread: tuple[float, int] | None = None  # when how many bytes of a response had not been read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin it."""
        super().connection_made(transport)
        self._pieces = Pieces(self._parse, self._read)
        self._waits_since = self.loop.time()  # for a request

    def data_received(self, data: bytes) -> None:
        """Parse some of it now, the rest in later turns of the loop."""
        self._pieces.put(data)

    def _parse(self, data: bytes) -> float:
        if not self.transport.is_closing():
            super().data_received(data)
        return 0.0

    def _read(self, is_wanted: bool) -> None:
        if self.transport.is_closing():
            return
        if not is_wanted:
            self.transport.pause_reading()
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Refuse invalid HTTP, unless a response has begun."""
        self._incidents.fail(RequestError(msg))
        with contextlib.suppress(h11.LocalProtocolError):
            super().send_400_response(msg)
        self.transport.close()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Become a WebSocket."""
        self.app_state = {**self.app_state, "visit": self._visit}
        super().handle_websocket_upgrade(event)
        if rest := self._pieces.take_rest():
            self.transport.get_protocol().data_received(rest)  # type: ignore[attr-defined]

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._visit.settle()
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def resume_writing(self) -> None:
        """Go on: enough of the response was read."""
        self._unread = None
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End it."""
        self._visit.leave(self._pieces.close())
        super().connection_lost(exc)

    def check(self, now: float) -> None:
        """End it if no request comes, or hardly anything of a response is read; called once a second.

        While a request is awaited, the body of the previous one may still be arriving.
        """
        if (self.cycle is None or self.cycle.response_complete) and now - self._waits_since > _HEADER_S:
            self.transport.abort()
        if self.flow.write_paused:
            size = self.transport.get_write_buffer_size()
            then, size_then = self._unread = self._unread or (now, size)
            if now - then > _READ_S:
                self._unread = now, size
                if size_then - size < LEAST_BYTES_PER_S * _READ_S:
                    self.transport.abort()


class WebSocketHandler(WebSocketsSansIOProtocol):
    """A WebSocket with bounded queues, which is cut off if the client does not complete the close."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._fragments = bytearray()
        self._num_messages = self._num_text_bytes = 0
        self._is_deaf = False
        self._deadline = math.inf
        self._pieces = Pieces(self._parse, self._read)
        self._mailbox = Mailbox(self._hold)
        self.queue = cast("asyncio.Queue[Any]", self._mailbox)
        self.app_state = {**self.app_state, "mailbox": self._mailbox}
        self.read_paused = True  # so that uvicorn does not pause after each message: the mailbox decides

    def data_received(self, data: bytes) -> None:
        """Parse some of it now, the rest in later turns of the loop."""
        if not self._is_deaf:
            self._pieces.put(data)

    def _parse(self, data: bytes) -> float:
        if self.transport.is_closing() or self._is_deaf:
            return 0.0
        self._num_messages = self._num_text_bytes = 0
        super().data_received(data)
        self._forget_what_is_too_late()
        return self._num_messages * _MESSAGE_S + self._num_text_bytes * _TEXT_BYTE_S

    def _read(self, is_wanted: bool) -> None:
        if not self.transport.is_closing():
            (self.transport.resume_reading if is_wanted else self.transport.pause_reading)()

    def _forget_what_is_too_late(self) -> None:
        """After the close only the client's own is awaited: not the rest of a long frame."""
        if self.close_sent:
            self._fragments = bytearray()
            if len(self.conn.reader.buffer) > _MAX_DEAF_BYTES:
                self.conn.reader.buffer.clear()
                self._is_deaf = True

    def handle_connect(self, event: Request) -> None:
        """Begin the handshake; frames that came with it wait for its end."""
        super().handle_connect(event)
        self._pieces.hold(True)  # noqa: FBT003

    def handle_cont(self, event: Frame) -> None:
        """Append a fragment to one buffer: many small objects would take far more memory than their content."""
        self._num_messages += 1
        if self.frames:
            self._fragments, self.frames = bytearray(self.frames[0]), []
        if self.curr_msg_data_type == "text" and self._is_too_long(event.data, len(self._fragments)):
            return
        self._fragments += event.data
        if event.fin:
            self.frames, self._fragments = [bytes(self._fragments)], bytearray()
            self.send_receive_event_to_app()

    def handle_text(self, event: Frame) -> None:
        """Take a text that is not too long."""
        if not self._is_too_long(event.data):
            super().handle_text(event)

    def _is_too_long(self, text: bytes | bytearray | memoryview, num_before: int = 0) -> bool:
        """Whether a text, of which some came before, must be refused; it has been counted."""
        self._num_text_bytes += len(text)
        if num_before + len(text) <= MAX_TEXT_BYTES or self.close_sent:
            return False
        self.conn.send_close(1009, f"a text may have {MAX_TEXT_BYTES} bytes")
        self.handle_parser_exception()
        return True

    def send_receive_event_to_app(self) -> None:
        """Pass a message on."""
        self._num_messages += 1
        super().send_receive_event_to_app()

    def handle_ping(self) -> None:
        """Answer a ping."""
        self._num_messages += 1
        super().handle_ping()

    async def receive(self) -> Any:
        """The next event, for Starlette; protocols take theirs from the mailbox."""
        return await self._mailbox.get()

    def _hold(self, is_held: bool) -> None:
        # what follows a close is discarded, and the client's own is awaited
        self._pieces.hold(is_held and not self.close_sent)

    async def send(self, message: Any) -> None:
        """Send a message; after the first one the client has been accepted or refused."""
        self.app_state["visit"].settle()
        was_closed, was_complete = self.close_sent, self.handshake_complete
        if was_closed:  # the client has broken the protocol
            raise ClientDisconnected
        await super().send(message)
        if self.close_sent:
            self._forget_what_is_too_late()
        if self.close_sent or not was_complete:
            self._pieces.hold(False)  # noqa: FBT003

    def connection_lost(self, exc: Exception | None) -> None:
        """End it, and drop what was received: these objects refer to each other, and may be collected much later."""
        self.app_state["visit"].leave(self._pieces.close())
        super().connection_lost(exc)
        self._mailbox.close()
        self.conn.reader.buffer.clear()
        self.frames, self._fragments = [], bytearray()

    async def run_asgi(self) -> None:
        """Serve it, and make sure that it ends."""
        await super().run_asgi()
        self._mailbox.clear()
        self._deadline = self.loop.time() + _CLOSE_S

    def check(self, now: float) -> None:
        """End it if the client does not complete the close; called once a second."""
        if now > self._deadline:
            self.transport.abort()
