"""Clients that send nothing, or something all the time that never moves their session on: none keeps its place."""

import socket
import time
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
    """One that waits half a second for something."""
    with running(limits=Limits(idle_s=0.5), protocol_ports={"wyoming": 0}) as server:
        yield server


def keep_sending(client, message, send=None):
    """At most 50 times a second, until the connection is closed; the client's own thread alone reads from it."""
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


@pytest.mark.parametrize("name", DRIPS)
def test_messages_that_move_nothing_on(server, name):
    path, start, message = DRIPS[name]
    num_idle = server.metric("failures", "idle")
    with server.connect(path) as client:
        for first in start:
            client.send(first)
        keep_sending(client, message)
        assert client.websocket.close_code == (1000 if path == "/wenet" else 1008)
        assert client.websocket.close_reason == "less than 0.005 seconds of audio came within 0.5 seconds"
    server.wait_until(lambda: server.metric("failures", "idle") == num_idle + 1)
    server.wait_until_empty()


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"\x02\xfe\xff\xff\0\0\0\0", b"\x00"),
        *((b"\x02\x80\0\0\0\0", head + b"\x80\0\0\0\0") for head in (b"\0", b"\x89")),
    ],
    ids=["bytes of a message", "empty fragments of a message", "pings"],
)
def test_frames_that_never_become_a_message(server, monkeypatch, begin, piece):
    monkeypatch.setattr("u2moe.runtime.server.handlers._CLOSE_S", 1.0)
    with server.connect() as client:
        client.start()
        client.websocket.socket.sendall(begin)
        keep_sending(client, piece, send=client.websocket.socket.sendall)
        assert client.close_code() == 1008
    server.wait_until_empty()


def test_audio_after_the_end_does_not_prolong_an_utterance(server):
    with server.connect("/wenet") as client:
        client.tell(signal="start")
        assert client.receive()["type"] == "server_ready"
        client.tell(signal="end")
        keep_sending(client, bytes(2))
        assert client.close_code() == 1000


def dripped(plain, pieces):
    """What the server answers before it closes a connection on which one piece after the other is sent."""
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
        except OSError:  # it was closed, with something unread
            break
    return answer


@pytest.mark.parametrize(
    ("begin", "event", "complaint"),
    [
        (
            wyoming_event("audio-start", WYOMING_AUDIO),
            event,
            b"less than 0.005 seconds of audio came within 0.5 seconds",
        )
        for event in (
            b"",
            wyoming_event("audio-chunk", WYOMING_AUDIO),
            wyoming_event("audio-chunk", WYOMING_AUDIO, bytes(2)),
            wyoming_event("ping"),
            b" ",
        )
    ]
    + [(b'{"type": "ping", "data_length": 1000}\n', b" ", b"less than 1 event came within 0.5 seconds")],
    ids=["nothing", "empty chunks", "samples", "pings", "bytes of a line", "bytes of data"],
)
def test_wyoming_events_that_move_nothing_on(server, begin, event, complaint):
    with server.open_plain("wyoming") as plain:
        answer = dripped(plain, [begin, *repeat(event, 900)])
    assert b'"error"' in answer
    assert complaint in answer
    server.wait_until_empty()


@pytest.mark.parametrize("piece", [b"", b"x"])
def test_an_upload_that_stops_or_drips(server, piece):
    head = (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    with server.open_plain() as plain:
        answer = dripped(plain, [head, *repeat(piece, 10_000)])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"less than 250 bytes came within 0.5 seconds" in answer
    server.wait_until_empty()


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET / HTTP/1.1\r\nHost:", b""),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\nX: ", b"x"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n\r\n", b"x"),
    ],
    ids=["a first header", "the header of a second request", "the body of the first"],
)
def test_a_request_that_is_never_whole(server, monkeypatch, begin, piece):
    monkeypatch.setattr("u2moe.runtime.server.handlers._HEADER_S", 0.3)
    with server.open_plain() as plain:
        answer = dripped(plain, [begin, *repeat(piece, 9000)])
    assert answer.startswith(b"HTTP/1.1 200 ") or (not answer and not piece)


def test_a_response_that_is_not_read(server, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.handlers._READ_S", 0.2)
    with server.open_plain() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.sendall(200 * b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.wait_until(lambda: not server.server.server_state.connections)
