"""Connections that pass data in short turns to a protocol of uvicorn or asyncio, and limit processor time per client.

A connection is charged for the time of all work that it causes: parsing, the steps of its tasks, and work in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import sys
import time
import types
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from u2moe.runtime.server.accounts import CLIENT, Visit
from u2moe.runtime.server.errors import IdleError, RequestError

_Value = TypeVar("_Value")
CONNECTION = "u2moe.connection"  # name of the state entry that holds a request's connection
LEAST_BYTES_PER_S = 500  # minimum rate of HTTP bodies, in either direction
_FIRST_BYTES, _LEAST_BYTES, _MOST_BYTES = 4096, 256, 16 << 10  # bytes read at once: initially, at least, at most
_TURN_S = 0.001  # seconds that processing the bytes of one read should take
_MOST_POSTPONED_S = 0.1  # maximum seconds for which clients with debts wait for the end of a round of recognition
_READ_S, _BYTE_S = 20e-6, 0.5e-9  # seconds that asyncio takes per read and per byte
_REQUEST_S = 20.0  # seconds in which a client must send a request, not counting its body
_UNREAD_S = 20.0  # a client that reads slowly must read `LEAST_BYTES_PER_S` on average in each such period
_CLOSE_S = 10.0  # seconds for which a closed connection is read; otherwise the client could lose the last data sent
_MOST_OPEN_S = 0.5  # seconds of work on an incomplete message; a long one takes 5 ms, unless it has a million fragments
_DEAF_BYTES = 64 << 10  # maximum bytes passed on after the end of a WebSocket; they may contain its close frame
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"  # HTTP/1.1 clients ignore it; the system of a lost client answers by a reset
ANSWERS = ("http.response.start", "websocket.accept", "websocket.http.response.start")  # messages that begin a response
_FORWARDED = ("can_write_eof", "get_write_buffer_size", "is_reading", "set_write_buffer_limits")
"""Methods of the transport that a newer inner protocol may call, and that a connection need not change."""
_buffer = memoryview(bytearray(_MOST_BYTES))
_thread = ThreadPoolExecutor(1, "u2moe-clients")  # several threads would keep Python's GIL from the event loop


class PacedConnection(asyncio.BufferedProtocol):
    """A connection that passes data from the client to an inner protocol in turns.

    Each turn takes about a millisecond. Nothing is read while the client waits because of its debt, while the inner
    protocol pauses reading, or while the client does not read. A closed connection discards incoming data.
    `visit` counts the connection's processor time, `served` has the open connections, and `fail` counts an error that
    ends the connection. If `is_http`, the client must send HTTP requests.
    """

    inner: asyncio.BaseProtocol  # serves the client; HTTP may replace itself with a WebSocket protocol

    def __init__(
        self, visit: Visit, served: set[PacedConnection], fail: Callable[[Exception], object], *, is_http: bool = True
    ) -> None:
        self.visit, self._served, self._fail, self.is_http = visit, served, fail, is_http
        self._loop = asyncio.get_running_loop()
        self._rest = b""  # data that has been read but not passed on
        self._size = _FIRST_BYTES
        self._timer: asyncio.Handle | None = None
        self._deadline = self._loop.time() + _REQUEST_S if is_http else math.inf  # for a request or for closing
        self._request: Scope | None = None  # current HTTP request
        self._is_held = self._has_ended = self._is_closing = False
        self._is_whole = self._is_answered = False  # body read; response begun
        self._unread: tuple[float, int] | None = None  # time of the last check, and number of unread bytes at that time
        self._num_open, self._open_s = 0, 0.0  # bytes and work since the last complete message
        self._num_left = sys.maxsize  # bytes that may still be passed on

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the inner protocol."""
        self._transport = cast("asyncio.Transport", transport)
        self.abort, self.get_extra_info = self._transport.abort, self._transport.get_extra_info
        for name in _FORWARDED:
            setattr(self, name, getattr(transport, name))
        self._served.add(self)
        self.inner.connection_made(cast("asyncio.Transport", self))

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the inner protocol, and release the connection."""
        self._rest = b""  # nothing more is passed on, and a lost TLS transport cannot resume reading
        if self._timer is not None:
            self._timer.cancel()
        self._detach(exc)
        self._served.discard(self)
        self.visit.leave(self._num_open)

    def _detach(self, error: Exception | None) -> None:
        inner, self.inner = self.inner, asyncio.Protocol()  # breaks a reference cycle
        inner.connection_lost(error)

    def pause_writing(self) -> None:
        """Stop reading from the client, because it does not read what it is sent."""
        self._unread = self._loop.time(), self._transport.get_write_buffer_size()
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        """Resume reading from the client, because it has read most of what it was sent."""
        self._unread = None
        self.inner.resume_writing()
        if not self._is_held:
            self.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - interface of asyncio
        """Return the buffer for reading. Its size limits the bytes read at once."""
        return _buffer[: self._size]

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on the data that was read."""
        self._rest += _buffer[:nbytes]
        self._go_on()

    def eof_received(self) -> bool:
        """Handle the end of the client's data. Return whether the connection stays open for the response."""
        self._has_ended = True
        self._loop.call_soon(self._end)
        return not self._is_closing and self._transport.can_write_eof()

    def _end(self, answered: Scope | None = None) -> None:
        """Close the connection if there will be no more work. Called after the start of the next pipelined request."""
        if answered is not None and self._request is answered and not self._is_closing:
            self._request, self._deadline = None, self._loop.time() + _REQUEST_S
        has_work = self._rest or self._request is not None or not self._has_ended
        if not (has_work or self._transport.is_closing() or cast("asyncio.Protocol", self.inner).eof_received()):
            self._transport.close()

    # The next methods, `close`, `abort`, `get_extra_info` and `_FORWARDED` are the transport of the inner protocol.

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Switch to a WebSocket protocol."""
        self.inner = protocol

    def is_closing(self) -> bool:
        """Return whether nothing more is sent."""
        return self._is_closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send data, unless the connection is closing."""
        if not self.is_closing():
            self._transport.write(data)

    def pause_reading(self) -> None:
        """Stop passing data to the inner protocol."""
        self._is_held = True

    def resume_reading(self) -> None:
        """Pass data to the inner protocol again."""
        self._is_held = False
        if self._rest and self._timer is None:
            self._timer = self._loop.call_soon(self._go_on)  # not now: the inner protocol may be the caller

    def _go_on(self) -> None:
        """Pass on data now, or later if the client must wait because it owes processor time."""
        self._timer, now = None, self._loop.time()
        if (self._is_held or self._unread is not None) and not self._is_closing:
            self._transport.pause_reading()
        elif wait_s := self.visit.wait_s(now):
            self._transport.pause_reading()
            self.visit.charge(_TURN_S, now)  # reserves the turn, so that other connections wait longer
            self._timer = self._loop.call_later(wait_s, self._take_turn, _TURN_S, now + wait_s + _MOST_POSTPONED_S)
        else:
            self._take_turn(0.0)

    def _take_turn(self, charged_s: float, latest: float = 0.0) -> None:
        if self.visit.connections.is_decoding() and self._loop.time() < latest:  # this client is not urgent
            self._timer = self._loop.call_later(_TURN_S, self._take_turn, charged_s, latest)
            return
        self._timer, piece, self._rest = None, self._rest, b""
        spent_s = self.visit.spent_s - charged_s
        if spent_s > _TURN_S:
            self._size = max(self._size // 2, _LEAST_BYTES)
        elif spent_s < _TURN_S / 4 and len(piece) >= self._size:
            self._size = min(2 * self._size, _MOST_BYTES)
        self.visit.spent_s, begin = charged_s, time.monotonic()
        if not self._is_closing and (wanted := piece[: self._num_left]):
            self._num_left -= len(wanted)
            self._num_open += len(wanted)
            cast("asyncio.Protocol", self.inner).data_received(wanted)
        took_s = self.visit.since(begin)
        self._open_s += took_s
        if self._open_s > _MOST_OPEN_S:
            self.close()
        self.visit.charge(took_s + _READ_S + len(piece) * _BYTE_S - charged_s, self._loop.time())
        self._loop.call_soon(self._end) if self._has_ended else self._transport.resume_reading()

    def close(self) -> None:
        """Stop sending. The client has some time to read the rest of the data and to close the connection."""
        if self._is_closing:
            return
        self._is_closing = True
        is_before_request = self._deadline < math.inf and self._request is None and self._num_left > _DEAF_BYTES
        if is_before_request and self._num_open:
            self._fail(RequestError("invalid HTTP request"))
        self._deadline = self._loop.time() + _CLOSE_S
        self._loop.call_soon(self._detach, None)
        can_wait = self._transport.can_write_eof() and not self._has_ended
        with contextlib.suppress(OSError):  # the client has disconnected
            self._transport.write_eof() if can_wait else self._transport.close()

    def check(self, now: float) -> None:
        """Close the connection if the client makes too little progress. Called once a second."""
        if self._unread is not None and now - self._unread[0] > _UNREAD_S:
            size = self._transport.get_write_buffer_size()
            if self._unread[1] - size < LEAST_BYTES_PER_S * _UNREAD_S:
                if not self._is_closing:
                    self._fail(IdleError("the client reads too little"))
                self._transport.abort()
            self._unread = now, size
        has_left = self._has_ended and self._request is not None and not (self._is_whole or self._is_answered)
        if not (self._transport.is_closing() or self._transport.is_reading()):  # asyncio would not notice a reset
            tcp: socket.socket = self._transport.get_extra_info("socket")
            has_left = has_left or bool(tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        if has_left or (now > self._deadline and self._is_closing):
            self._transport.abort()
        elif now > self._deadline:
            self.close()
        elif self._has_ended and self._request is not None and not self._is_answered:
            self._transport.write(_PROBE if self._request["http_version"] == "1.1" else b"")

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request or a WebSocket."""
        is_http = scope["type"] == "http"
        self._deadline, self._num_open, self._open_s = math.inf, 0, 0.0
        self._request = scope if is_http else None
        self._is_whole, self._is_answered = scope.get("method") == "GET", False

        async def take() -> Message:
            message = await receive()
            self._num_open, self._open_s = 0, 0.0
            self._is_whole = not message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if self._is_closing:  # uvicorn has already answered an invalid request or message
                if not is_http:
                    raise ConnectionResetError
                await asyncio.sleep(0)  # lets uvicorn notice that nothing more will be sent
                return
            if message["type"] in ANSWERS:
                self._is_answered = True
                self.visit.settle()
            body, start = message.get("body", b""), 0
            while len(body) - start > _MOST_BYTES:  # in pieces: uvicorn copies what the client has not read
                await send({**message, "body": body[start : start + _MOST_BYTES], "more_body": True})
                start += _MOST_BYTES
            await send({**message, "body": body[start:]} if start else message)
            if message["type"] == "websocket.close":
                self._num_left, self._deadline = _DEAF_BYTES, self._loop.time() + _CLOSE_S
                if self._num_open > _DEAF_BYTES:  # within a long message
                    self.close()

        await charged(app(scope, take, answer), self.visit)
        self._loop.call_soon(self._end, scope)


@types.coroutine
def _in_steps(work: Generator[Any, Any, _Value], visit: Visit) -> Generator[Any, Any, _Value]:
    value, error = None, None
    while True:
        begin = time.monotonic()
        try:
            awaited = work.send(value) if error is None else work.throw(error)
        except StopIteration as end:
            return cast("_Value", end.value)
        finally:
            visit.charge(visit.since(begin), time.monotonic())
        value = error = None
        try:
            value = yield awaited
        except BaseException as thrown:  # noqa: BLE001 - passed on to the work
            error = thrown


async def charged(work: Awaitable[_Value], visit: Visit | None = None) -> _Value:
    """Await work, and charge its processor time to the current client: from now on to `visit`, if given."""
    CLIENT.set(visit or CLIENT.get())
    return await _in_steps(work.__await__(), CLIENT.get())


async def in_thread(work: Callable[..., _Value], *given: Any) -> _Value:
    """Run work in a thread, and charge its processor time to the current client."""
    visit, loop = CLIENT.get(), asyncio.get_running_loop()

    def do() -> _Value:
        begin = time.thread_time()
        try:
            return work(*given)
        finally:
            loop.call_soon_threadsafe(visit.charge, time.thread_time() - begin, time.monotonic())

    return await loop.run_in_executor(_thread, do)
