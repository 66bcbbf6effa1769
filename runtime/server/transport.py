"""Connections: each hands what its client sends to a protocol of uvicorn or asyncio, in turns that are paid for.

All that is done for a connection is charged to it: parsing, the steps of its tasks, and what it needs threads for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import sys
import time
import types
from collections.abc import Awaitable, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from u2moe.runtime.server.accounts import Visit
from u2moe.runtime.server.errors import IdleError, RequestError

_Value = TypeVar("_Value")
CONNECTION = "u2moe.connection"
"""In the state of a request: its connection."""
LEAST_BYTES_PER_S = 500
"""Minimum rate of HTTP bodies, in either direction."""
_FIRST_BYTES, _LEAST_BYTES, _MOST_BYTES = 4096, 256, 16 << 10
"""That are read at once."""
_TURN_S = 0.001
"""Seconds that the work on them should take."""
_READ_S, _BYTE_S = 20e-6, 0.5e-9
"""Seconds that asyncio takes to read, and for each byte."""
_REQUEST_S = 20.0
"""Seconds that a client has to send a request, without its body."""
_UNREAD_S = 20.0
"""Seconds in which a client has to read some of what it is sent."""
_CLOSE_S = 10.0
"""Seconds for which a connection that ends here is still read: else its client could lose what it was sent last."""
_MOST_OPEN_S = 0.5
"""Seconds of work without a message: a long one takes a hundredth, unless it comes as a million of fragments."""
_DEAF_BYTES = 64 << 10
"""Bytes handed on after the end of a WebSocket: the client's own close may be among them."""
_PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""What every client of HTTP/1.1 passes over; one that has gone answers by a reset."""
_REFUSAL = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_ANSWERS = ("http.response.start", "websocket.accept", "websocket.http.response.start")
_buffer = memoryview(bytearray(_MOST_BYTES))
_thread = ThreadPoolExecutor(1, "u2moe-clients")
"""For all clients: several would keep Python's lock from the event loop for most of the time."""
_current: ContextVar[PacedConnection | None] = ContextVar("u2moe_connection", default=None)


class PacedConnection(asyncio.BufferedProtocol):
    """The transport's side of a connection: hands on what the client sends to an inner protocol, in turns.

    It reads no more at once than takes about a millisecond, and nothing while the client has to wait for what was done
    for it, while the inner protocol wants nothing, or while the client does not read what it is sent. After its end it
    reads what is still sent, and keeps nothing of it.

    Args:
        visit: what is done for it.
        fail: counts an error that ends it.
        is_http: whether it has to send requests.

    Attributes:
        inner: speaks with the client; that of HTTP may put that of a WebSocket in its place.
        lost: called when the client has gone, by whose task it may not be noticed soon; None: nobody needs to know.
    """

    inner: asyncio.BaseProtocol
    lost: Callable[[], object] | None = None

    def __init__(self, visit: Visit, fail: Callable[[Exception], object], *, is_http: bool = True) -> None:
        self.visit = visit
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._rest = b""  # what was read while nothing was wanted
        self._size, self._spent_s = _FIRST_BYTES, 0.0
        self._timer: asyncio.Handle | None = None
        self._deadline = self._loop.time() + _REQUEST_S if is_http else math.inf  # of a request, or of the end
        self.is_http = is_http
        self._request: Scope | None = None  # of HTTP, until it is served
        self._is_held = self._has_ended = self.is_closing = False
        self._is_whole = self._is_answered = self._is_served = False  # body taken; answer begun; application called
        self._unread: tuple[float, int] | None = None  # since when the client has not read so many bytes
        self._num_open, self._open_s = 0, 0.0  # bytes and work since the last message that was taken
        self._num_left = sys.maxsize  # bytes that may still be handed on

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin it."""
        self._transport = cast("asyncio.Transport", transport)
        self.visit.begin(self)
        self.inner.connection_made(cast("asyncio.Transport", _Wire(self, self._transport)))

    def connection_lost(self, exc: Exception | None) -> None:
        """End it."""
        self._rest = b""  # of what comes later there is no more to hand on, and a lost transport of TLS reads no more
        if self._timer is not None:
            self._timer.cancel()
        self._detach(exc)
        if self.lost is not None:
            self.lost()
        self.visit.leave(self._num_open)

    def _detach(self, error: Exception | None) -> None:
        inner, self.inner = self.inner, asyncio.Protocol()  # else they would refer to each other
        inner.connection_lost(error)

    def pause_writing(self) -> None:
        """What was sent is not read: read nothing, either."""
        self._unread = self._loop.time(), self._transport.get_write_buffer_size()
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        """Go on."""
        self._unread = None
        self.inner.resume_writing()
        self.hold(self._is_held)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - of asyncio
        """Where to read to, and how much."""
        return _buffer[: self._size]

    def buffer_updated(self, nbytes: int) -> None:
        """Hand on what was read."""
        self._rest += _buffer[:nbytes]
        self._go_on()

    def eof_received(self) -> bool:
        """The client sends no more; it may still read. Returns whether it stays open."""
        self._has_ended = True
        can_wait = not self.is_closing and self._transport.can_write_eof() and (self._rest or self._request is not None)
        return bool(can_wait or cast("asyncio.Protocol", self.inner).eof_received())

    def hold(self, is_held: bool) -> None:
        """Hand nothing on, or what there is, too."""
        self._is_held = is_held
        if self._rest and self._timer is None and not is_held:
            self._timer = self._loop.call_soon(self._go_on)  # not now: it may be the inner protocol that calls

    def _go_on(self) -> None:
        """Hand on what there is, if that may be, or as soon as the client has waited for it."""
        self._timer = None
        now = self._loop.time()
        if (self._is_held or self._unread is not None) and not self.is_closing:
            self._transport.pause_reading()
        elif wait_s := self.visit.wait_s(now):
            self._transport.pause_reading()
            self.visit.charge(_TURN_S, now)  # others who wait come after it
            self._timer = self._loop.call_later(wait_s, self._take_turn, _TURN_S)
        else:
            self._take_turn(0.0)

    def _take_turn(self, charged_s: float) -> None:
        self._timer = None
        piece, self._rest = self._rest, b""
        if self._spent_s > _TURN_S:
            self._size = max(self._size // 2, _LEAST_BYTES)
        elif self._spent_s < _TURN_S / 4 and len(piece) >= self._size:
            self._size = min(2 * self._size, _MOST_BYTES)
        self._spent_s, begin = 0.0, time.monotonic()
        if not self.is_closing and (wanted := piece[: self._num_left]):
            self._num_left -= len(wanted)
            self._num_open += len(wanted)
            cast("asyncio.Protocol", self.inner).data_received(wanted)
        took_s = self.visit.since(begin)
        self._open_s += took_s
        if self._open_s > _MOST_OPEN_S:
            self.close()
        self.charge(took_s + _READ_S + len(piece) * _BYTE_S - charged_s)
        self._spent_s += charged_s
        if not self._has_ended:
            self._transport.resume_reading()
        elif not (self._transport.is_closing() or self.eof_received()):  # twice, it would be no transport of TLS more
            self._transport.close()

    def charge(self, seconds: float) -> None:
        """Account for processor time that was taken for it."""
        self._spent_s += seconds
        self.visit.charge(seconds, self._loop.time())

    def close(self) -> None:
        """Send no more; the client has some time to read it, and to close the connection."""
        if self.is_closing:
            return
        self.is_closing = True
        is_before_request = self._deadline < math.inf and self._request is None and self._num_left > _DEAF_BYTES
        if is_before_request and self._num_open:
            self._fail(RequestError("this is no request"))
        self._deadline = self._loop.time() + _CLOSE_S
        self._loop.call_soon(self._detach, None)
        can_wait = self._transport.can_write_eof() and not self._has_ended
        with contextlib.suppress(OSError):  # the client has gone
            self._transport.write_eof() if can_wait else self._transport.close()

    def replace(self, inner: asyncio.BaseProtocol) -> None:
        """Become a WebSocket; one that was not even asked for properly ends here."""
        self.inner = inner
        self._is_served = False
        self._loop.call_soon(self._refuse_unless_served)

    def _refuse_unless_served(self) -> None:
        if not (self._is_served or self.is_closing):
            self._transport.write(_REFUSAL)
            self.close()

    def check(self, now: float) -> None:
        """End it if its client does too little; called once a second."""
        if self._unread is not None and now - self._unread[0] > _UNREAD_S:
            size = self._transport.get_write_buffer_size()
            if self._unread[1] - size < LEAST_BYTES_PER_S * _UNREAD_S:
                if not self.is_closing:
                    self._fail(IdleError("the client reads nothing"))
                self._transport.abort()
            self._unread = now, size
        has_left = self._has_ended and self._request is not None and not self._is_whole
        if not (self._transport.is_closing() or self._transport.is_reading()):  # nobody else looks at it
            tcp: socket.socket = self._transport.get_extra_info("socket")
            has_left = has_left or bool(tcp.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        if has_left or (now > self._deadline and self.is_closing):
            self._transport.abort()
        elif now > self._deadline:
            self.close()
        elif self._has_ended and self._request is not None and not self._is_answered:
            self._transport.write(_PROBE if self._request["http_version"] == "1.1" else b"")

    def abort(self) -> None:
        """End it at once."""
        self._transport.abort()

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request or a WebSocket."""
        self._is_served = True
        is_http = scope["type"] == "http"
        self._deadline, self._num_open, self._open_s = math.inf, 0, 0.0
        self._request = scope if is_http else None
        self._is_whole = self._is_answered = False

        async def take() -> Message:
            message = await receive()
            self._num_open, self._open_s = 0, 0.0
            self._is_whole = not message.get("more_body", False)
            return message

        async def answer(message: Message) -> None:
            if is_http and self.is_closing:  # uvicorn has answered what was no request
                await asyncio.sleep(0)  # after which it knows that nothing more will be sent
                return
            if message["type"] in _ANSWERS:
                self._is_answered = True
                self.visit.settle()
            await send(message)
            if message["type"] == "websocket.close":
                self._num_left, self._deadline = _DEAF_BYTES, self._loop.time() + _CLOSE_S
                if self._num_open > _DEAF_BYTES:  # within a long message
                    self.close()

        await self.run(app(scope, take, answer))
        if self._request is scope and not self.is_closing:
            self._request, self._deadline = None, self._loop.time() + _REQUEST_S
            if self._has_ended:
                self.close()

    async def run(self, work: Awaitable[_Value]) -> _Value:
        """Do something for it, and charge it."""
        _current.set(self)
        return await charged(work)


class _Wire:
    """The transport, as the inner protocol sees it."""

    def __init__(self, connection: PacedConnection, transport: asyncio.Transport) -> None:
        self._connection = connection
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.is_closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        self._connection.close()

    def pause_reading(self) -> None:
        self._connection.hold(True)  # noqa: FBT003

    def resume_reading(self) -> None:
        self._connection.hold(False)  # noqa: FBT003

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._connection.replace(protocol)


@types.coroutine
def _in_steps(work: Generator[Any, Any, _Value], connection: PacedConnection | None) -> Generator[Any, Any, _Value]:
    value, error = None, None
    while True:
        begin = time.monotonic()
        try:
            awaited = work.send(value) if error is None else work.throw(error)
        except StopIteration as end:
            return cast("_Value", end.value)
        finally:
            if connection is not None:
                connection.charge(connection.visit.since(begin))
        value = error = None
        try:
            value = yield awaited
        except GeneratorExit:
            work.close()
            raise
        except BaseException as thrown:  # noqa: BLE001 - it is for the work
            error = thrown


async def charged(work: Awaitable[_Value]) -> _Value:
    """Do some work, and charge the connection that it is for."""
    return await _in_steps(work.__await__(), _current.get())


async def in_thread(work: Callable[..., _Value], *given: Any) -> _Value:
    """Do some work in a thread, and charge the connection that it is for."""
    spent: list[float] = []

    def do() -> _Value:
        begin = time.thread_time()
        try:
            return work(*given)
        finally:
            spent.append(time.thread_time() - begin)

    try:
        return await asyncio.get_running_loop().run_in_executor(_thread, do)
    finally:
        if (connection := _current.get()) is not None:
            connection.charge(sum(spent))


def earn(audio_s: float) -> None:
    """The client that is served has sent seconds of audio."""
    if (connection := _current.get()) is not None:
        connection.visit.earn(audio_s)


@contextlib.contextmanager
def in_place(lost: Callable[[], object]) -> Iterator[None]:
    """While the connection that is served has a place for a stream or a file; `lost` is called if it ends meanwhile."""
    connection = _current.get()
    if connection is None:
        yield
        return
    connection.visit.take_place(is_taken=True)
    connection.lost = lost
    try:
        yield
    finally:
        connection.lost = None
        connection.visit.take_place(is_taken=False)
