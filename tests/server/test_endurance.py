"""Broken connections and damaged messages: the server answers or closes, and releases all resources."""

import asyncio
import io
import os
import re
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from dialects import START, conversation, upload, wyoming_request
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from u2moe.benchmarks.studies.shared.load import RunningServer, first_buffers, free_port, our_server, speech_buffers
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER

REST, WYOMING = "/v1/audio/transcriptions", "wyoming"
PROTOCOLS = (*START, REST, WYOMING)
AT_ONCE = 100
PATIENCE_S = 60.0
ENDS = ("to the end", "closed early", "lost")
NUM_INPUTS = int(os.environ.get("U2MOE_TEST_INPUTS", "3000"))
WARM_UP = NUM_INPUTS // 2
"""Rounds until the libraries' allocators reach their size. Earlier growth is ignored."""
NUM_SAMPLES = 8_000
"""Enough samples for a last, shorter chunk and its second pass. More would add nothing to tests of messages."""
ODD_TEXTS = ("", "{", "[" * 5000, "null", "NaN", '"\\ud800"', "[]", "1e999", '{"type": 7}', '{"eof": {}}', "Done")
INTERNAL = 1011


def damaged(messages, random):
    """Return the messages with some damage."""
    found = list(messages)
    for _ in range(int(random.integers(1, 4))):
        index = int(random.integers(len(found)))
        message = found[index]
        match int(random.integers(7)):
            case 0:
                del found[index]
            case 1:
                found.insert(int(random.integers(len(found) + 1)), message)
            case 2:
                found[index] = message[: int(random.integers(len(message) + 1))]
            case 3:
                found[index] = str(random.choice(ODD_TEXTS))
            case 4:
                found[index] = random.bytes(int(random.integers(2000)))
            case 5:
                found[index] = message.encode() if isinstance(message, str) else message.decode("latin-1")
            case _:
                found[index] = overwritten(message, random)
        if not found:
            break
    return found


def overwritten(message, random):
    """Return the message with some characters or bytes replaced."""
    data = bytearray(message.encode() if isinstance(message, str) else message)
    for _ in range(int(random.integers(1, 9))):
        if data:
            data[int(random.integers(len(data)))] = int(random.integers(256))
    return data.decode(errors="replace") if isinstance(message, str) else bytes(data)


async def converse(server, path, messages):
    """Send messages, read to the end, and return the outcome."""
    url = f"ws://127.0.0.1:{server.port}{path}"
    try:
        async with asyncio.timeout(PATIENCE_S), connect(url, proxy=None, ping_interval=None) as websocket:
            reading = asyncio.create_task(_read(websocket))
            try:
                for message in messages:
                    await websocket.send(message)
                await asyncio.wait({reading}, timeout=0.2)  # abandoned if it is not over now
            except ConnectionClosed:
                pass
            finally:
                reading.cancel()
    except TimeoutError:
        return "no answer"
    except (OSError, WebSocketException) as error:
        return f"failed: {type(error).__name__}"
    return "error within the server" if websocket.close_code == INTERNAL else "answered or closed"


async def _read(websocket):
    async for _ in websocket:
        pass


async def exchange(port, data):
    """Send bytes over TCP and end the stream; return the outcome."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                writer.write_eof()
                answer = await reader.read()
            finally:
                writer.close()
    except TimeoutError:
        return "no answer"
    except OSError:
        return "answered or closed"
    is_internal = answer.startswith(b"HTTP/1.1 5") and not answer.startswith(b"HTTP/1.1 503")
    return "error within the server" if is_internal else "answered or closed"


async def try_one(server, wyoming_port, protocol, seed, samples):
    """Run one conversation of a protocol from a seed."""
    random = np.random.default_rng([seed, PROTOCOLS.index(protocol)])
    if protocol in START:
        return await converse(server, protocol, damaged(conversation(protocol, samples), random))
    if protocol == WYOMING:
        pieces = list(wyoming_request(samples).splitlines(keepends=True))
        return await exchange(wyoming_port, _joined(damaged(pieces, random)))
    wav = io.BytesIO()
    soundfile.write(wav, samples, 16_000, format="WAV")
    pieces = list(upload(wav.getvalue()).splitlines(keepends=True))
    body = _joined(damaged(pieces, random))
    head = f"POST {REST} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return await exchange(server.port, f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode() + body)


def _joined(pieces):
    return b"".join(piece.encode(errors="replace") if isinstance(piece, str) else piece for piece in pieces)


@pytest.fixture(scope="module")
def samples():
    return (read_audio(DEMO_FOLDER / "clips" / "command.flac", 16_000) * 32767).astype(np.int16)


@pytest.fixture
def inside(server):
    """Return a server in this process, and the port of Wyoming."""
    yield RunningServer(port=server.ports["http"], path="/sherpa", pid=os.getpid()), server.ports["wyoming"]
    server.wait_until_empty()


@pytest.fixture
def apart():
    """Return a server in a separate process, and the port of Wyoming."""
    port = free_port()
    with our_server(DEMO_FOLDER, arguments=["--protocol", f"wyoming={port}", "--idle-timeout", "20"]) as server:
        yield server, port


async def conversations(server, wyoming_port, protocol, samples, seeds):
    tasks = (try_one(server, wyoming_port, protocol, seed, samples[:NUM_SAMPLES]) for seed in seeds)
    return Counter(await asyncio.gather(*tasks))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_damaged_conversation_is_answered_or_closed(inside, protocol, samples):
    assert asyncio.run(conversations(*inside, protocol, samples, range(3))) == {"answered or closed": 3}


@pytest.mark.endurance
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_thousands_of_damaged_conversations_leave_nothing_behind(apart, protocol, samples):
    server, _ = apart
    with unchanged(server) as rounds:
        for begin in rounds:
            seeds = range(begin, begin + AT_ONCE)
            assert asyncio.run(conversations(*apart, protocol, samples, seeds)) == {"answered or closed": AT_ONCE}


async def visit(server, samples, random):
    """Run one client; return how it ended."""
    path, end = str(random.choice(list(START))), str(random.choice(ENDS))
    messages = conversation(path, samples)
    if end != "to the end":
        messages = messages[: int(random.integers(len(messages) + 1))]
    try:
        async with asyncio.timeout(PATIENCE_S), connect(f"ws://127.0.0.1:{server.port}{path}", proxy=None) as websocket:
            for message in messages:
                await websocket.send(message)
            if end == "lost":
                websocket.transport.abort()
            elif end == "to the end" and path != "/v1/realtime":  # which continues until it is closed
                async for message in websocket:
                    if message == "Done!":  # sherpa-onnx's client closes the connection
                        break
    except (OSError, TimeoutError, WebSocketException) as error:
        return end if end == "lost" else f"failed: {type(error).__name__}"
    return end


async def visits(server, samples, random, count):
    return await asyncio.gather(*(visit(server, samples, random) for _ in range(count)))


def test_clients_come_and_go(inside, samples):
    assert set(asyncio.run(visits(inside[0], samples, np.random.default_rng(0), 16))) <= set(ENDS)


@pytest.mark.endurance
@pytest.mark.timeout(7200)
def test_thousands_of_clients_come_and_go(apart, samples):
    random = np.random.default_rng(0)
    with unchanged(apart[0]) as rounds:
        for _ in rounds:
            for _ in range(AT_ONCE // 16):
                assert set(asyncio.run(visits(apart[0], samples, random, 16))) <= set(ENDS)


def state(pid):
    """Return the resident megabytes and the number of open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


@contextmanager
def unchanged(server):
    """Check after rounds of work that the server recognises as before, without more memory or open files."""
    if sys.platform != "linux":
        pytest.skip("only Linux reports the resources of a process")
    before = []

    def rounds():
        for begin in range(0, NUM_INPUTS, AT_ONCE):
            if begin >= WARM_UP and not before:
                before.extend(state(server.pid))
            yield begin
            while not re.search(r"^u2moe_streams 0\.0$", httpx.get(metrics).text, re.MULTILINE):
                time.sleep(0.1)  # otherwise they would accumulate on a busy machine

    metrics = f"http://127.0.0.1:{server.port}/metrics"
    yield rounds()
    time.sleep(3)
    found = asyncio.run(first_buffers(server.url, speech_buffers(2.0)))
    assert any(is_final and text for _, is_final, text in found)
    memory_mb, num_files = state(server.pid)
    assert memory_mb < 1.1 * before[0]
    assert num_files <= before[1] + 8
