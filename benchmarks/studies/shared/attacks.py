"""Clients that attack a server, each again as soon as it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Callable, Coroutine, Sequence
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

NUM_STREAMS = 8
"""Streams that the key of each attack may have."""
MEGABYTE = 1 << 20
ELSEWHERE = ("127.0.0.2", 0)
"""Where attackers connect from: not where speakers and the health check do."""
_PART = '--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
Attack = Callable[[str], Coroutine[Any, Any, None]]
"""Behaviour of a client, given the server's address and a key: "127.0.0.1:PORT/PATH?api_key=KEY" with the path open."""


async def _one_sample(place: str) -> None:
    async with connect(place, proxy=None, local_addr=ELSEWHERE) as websocket:
        await websocket.send("{}")
        await websocket.recv()
        while not websocket.transport.is_closing():  # what is written then is lost without an error
            websocket.transport.write((b"\x82\x82" + bytes(6)) * 1000)
            await asyncio.sleep(0.01 if websocket.transport.get_write_buffer_size() < MEGABYTE else 0.1)


async def _one_byte_chunks(place: str) -> None:
    parts = urlsplit(place)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, local_addr=ELSEWHERE)
    head = f"POST /v1/audio/transcriptions?{parts.query} HTTP/1.1\r\nHost: localhost\r\n"
    kind = "Content-Type: multipart/form-data; boundary=x\r\nTransfer-Encoding: chunked\r\n\r\n"
    try:
        writer.write((head + kind).encode() + f"{len(_PART):x}\r\n{_PART}\r\n".encode())
        while not reader.at_eof():
            writer.write(b"1\r\nx\r\n" * 1000)
            await writer.drain()
            await asyncio.sleep(0)
    finally:
        writer.close()


@functools.cache
def _many_hotwords(num_bytes: int) -> str:
    return '{"hotwords": [' + ",".join(['"A"'] * (num_bytes // 4 - 5)) + "]}"


async def _options(place: str, num_bytes: int) -> None:
    async with connect(place, proxy=None, local_addr=ELSEWHERE) as websocket:
        await websocket.send(_many_hotwords(num_bytes))
        await websocket.recv()


async def _refused(place: str) -> None:
    async with connect(place, proxy=None, local_addr=ELSEWHERE) as websocket:
        await websocket.send([bytes(MEGABYTE)] * 16)


async def _silent(place: str) -> None:
    _, writer = await asyncio.open_connection(urlsplit(place).hostname, urlsplit(place).port, local_addr=ELSEWHERE)
    try:
        await asyncio.sleep(5)
    finally:
        writer.close()


ATTACKS: dict[str, tuple[int, Attack]] = {
    "frames of one sample": (NUM_STREAMS, _one_sample),
    "HTTP chunks of one byte": (NUM_STREAMS, _one_byte_chunks),
    "options of 15 MB": (NUM_STREAMS, lambda place: _options(place, 15 * MEGABYTE)),
    "options of 1 MB": (NUM_STREAMS, lambda place: _options(place, MEGABYTE - 100)),
    "frames of 16 MB, refused": (40, _refused),
    "silent connections": (200, _silent),
}
"""How many clients at once, and the behaviour of one."""


def key_of(name: str) -> str:
    """The API key of an attack."""
    return f"key-of-{name.replace(' ', '-')}"


def attack(has_begun: Event, port: int, names: Sequence[str]) -> None:
    """Attack until ended; what runs in a process of its own."""
    os.nice(10)  # what is measured is the server, not a lack of processors for the speakers
    has_begun.set()

    async def again(name: str) -> None:
        while True:
            with contextlib.suppress(OSError, WebSocketException, EOFError, TimeoutError):
                await ATTACKS[name][1](f"ws://127.0.0.1:{port}/stream?api_key={key_of(name)}")
            await asyncio.sleep(0.05)

    async def everyone() -> None:
        await asyncio.gather(*(again(name) for name in names for _ in range(ATTACKS[name][0])))

    asyncio.run(everyone())
