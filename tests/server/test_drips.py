"""Clients that send nothing, or messages without progress, lose their slot."""

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import pytest
from dialects import START, WYOMING_AUDIO, realtime_audio, wyoming_event
from websockets.exceptions import ConnectionClosed

from u2moe.runtime.server.options import Limits

PATIENCE_S = 120
DRIPS = {f"nothing for {path}": (path, start, None) for path, start in START.items()} | {
    "an empty block": ("/stream", ["{}"], b""),
    "a sample": ("/stream", ["{}"], bytes(2)),
    "an empty block for WeNet": ("/wenet", START["/wenet"], b""),
    "an empty block for sherpa": ("/sherpa", [], b""),
    "an empty recording": ("/sherpa-offline", [], np.array([16_000, 0], "<i4").tobytes()),
    "a recording of a sample": ("/sherpa-offline", [], np.array([16_000, 4, 0], "<i4").tobytes()),
    "a byte of a recording": ("/sherpa-offline", [np.array([16_000, 4000], "<i4").tobytes()], bytes(1)),
    "an empty block for vosk": ("/vosk", [], b""),
    "a sample for vosk": ("/vosk", [], bytes(2)),
    "a configuration": ("/vosk", [], '{"config": {"sample_rate": 16000}}'),
    "a reset": ("/vosk", [], '{"reset": 1}'),
    "settings": ("/v1/realtime", [], '{"type": "session.update", "session": {}}'),
    "no audio": ("/v1/realtime", [], realtime_audio(b"")),
    "a sample in base64": ("/v1/realtime", [], realtime_audio(bytes(2))),
    "nonsense": ("/v1/realtime", [], "{}"),
}


@pytest.fixture(scope="module")
def server(running):
    """Return a server with an idle timeout of half a second."""
    with running(limits=Limits(idle_s=0.5), protocol_ports={"wyoming": 0}, capacity=2 * len(DRIPS)) as server:
        yield server


def at_once(function, cases):
    """Return the results of a function for all cases, in threads, since each mostly waits for the server."""
    with ThreadPoolExecutor(len(cases)) as pool:
        return dict(zip(cases, pool.map(function, cases), strict=True))


def keep_sending(client, message, send=None):
    """Send a message up to 50 times a second until the connection is closed. Only the client's own thread reads."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(0.02)
        try:
            if message is not None:
                (send or client.send)(message)
            client.websocket.recv(0)
        except TimeoutError:
            continue
        except (ConnectionClosed, OSError):
            return
    pytest.fail("it is not closed")


def test_messages_that_move_nothing_on(server):
    def drip(name):
        path, start, message = DRIPS[name]
        with server.connect(path) as client:
            with contextlib.suppress(ConnectionClosed):  # it may be closed already on a busy machine
                for first in start:
                    client.send(first)
            keep_sending(client, message)
            return client.websocket.close_code, client.websocket.close_reason

    num_idle = server.metric("failures", "idle")
    reason = "less than 0.005 seconds of audio received in 0.5 seconds"
    assert at_once(drip, DRIPS) == {
        name: (1000 if path == "/wenet" else 1008, reason) for name, (path, _, _) in DRIPS.items()
    }
    server.wait_until(lambda: server.metric("failures", "idle") == num_idle + len(DRIPS))
    server.wait_until_empty()


FRAMES = {
    "bytes of a message": (b"\x02\xfe\xff\xff\0\0\0\0", b"\x00"),
    "empty fragments of a message": (b"\x02\x80\0\0\0\0", b"\0\x80\0\0\0\0"),
    "pings": (b"\x02\x80\0\0\0\0", b"\x89\x80\0\0\0\0"),
}


def test_frames_that_never_become_a_message(server, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.transport._CLOSE_S", 1.0)

    def drip(name):
        begin, piece = FRAMES[name]
        with server.connect() as client:
            client.start()
            client.websocket.socket.sendall(begin)
            keep_sending(client, piece, send=client.websocket.socket.sendall)
            return client.close_code()

    assert at_once(drip, FRAMES) == dict.fromkeys(FRAMES, 1008)
    server.wait_until_empty()


def test_neither_audio_nor_wyoming_events_after_the_end_move_anything_on(server):
    with server.connect("/wenet") as client:
        client.tell(signal="start")
        assert client.receive()["type"] == "server_ready"
        client.tell(signal="end")
        keep_sending(client, bytes(2))
        assert client.close_code() == 1000

    def drip(name):
        begin, event = WYOMING[name]
        with server.open_plain("wyoming") as plain:
            return dripped(plain, [begin, *repeat(event, 900)])

    for name, answer in at_once(drip, WYOMING).items():
        assert b'"error"' in answer
        lacking = b"1 event" if name == "bytes of data" else b"0.005 seconds of audio"
        assert b"less than %b received in 0.5 seconds" % lacking in answer, name
    server.wait_until_empty()


def dripped(plain, pieces):
    """Return the server's answer before it closes a connection on which pieces are sent one by one."""
    plain.settimeout(0.02)
    answer, deadline = b"", time.monotonic() + PATIENCE_S
    for piece in pieces:
        assert time.monotonic() < deadline, "it is not closed"
        try:
            plain.sendall(piece)
            if not (data := plain.recv(10_000)):
                break
            answer += data
        except TimeoutError:
            continue
        except OSError:  # it was closed with unread data
            break
    return answer


AUDIO_START = wyoming_event("audio-start", WYOMING_AUDIO)
WYOMING = {
    "nothing": (AUDIO_START, b""),
    "empty chunks": (AUDIO_START, wyoming_event("audio-chunk", WYOMING_AUDIO)),
    "samples": (AUDIO_START, wyoming_event("audio-chunk", WYOMING_AUDIO, bytes(2))),
    "pings": (AUDIO_START, wyoming_event("ping")),
    "bytes of a line": (AUDIO_START, b" "),
    "bytes of data": (b'{"type": "ping", "data_length": 1000}\n', b" "),
}


def test_an_upload_that_stops_or_drips(server, monkeypatch):
    head = (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )

    def drip(piece):
        with server.open_plain() as plain:
            return dripped(plain, [head, *repeat(piece, 10_000)])

    for answer in at_once(drip, [b"", b"x"]).values():
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"less than 250 bytes received in 0.5 seconds" in answer
    server.wait_until_empty()


REQUESTS = {
    "a first header": (b"GET / HTTP/1.1\r\nHost:", b""),
    "the header of a second request": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\nX: ", b"x"),
    "the body of the first": (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n\r\n", b"x"),
}


def test_a_request_that_is_never_whole(server, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.transport._REQUEST_S", 1.0)

    def drip(name):
        begin, piece = REQUESTS[name]
        with server.open_plain() as plain:
            return dripped(plain, [begin, *repeat(piece, 9000)])

    for name, answer in at_once(drip, REQUESTS).items():
        assert answer.startswith(b"HTTP/1.1 200 ") or (not answer and name == "a first header"), name


def test_a_response_that_is_not_read(server, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.transport._UNREAD_S", 0.2)
    with server.open_plain() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.sendall(200 * b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.wait_until(lambda: not server.server.connections.num_open)
