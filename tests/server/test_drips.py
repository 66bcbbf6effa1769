"""Clients that send something all the time, and never anything that moves their session on: none keeps its place."""

import base64
import json
import socket
import time
from itertools import repeat

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from u2moe.runtime.server.options import Limits

PATIENCE_S = 120


def audio_event(data):
    return json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(data).decode()})


DRIPS = {
    "an empty block": ("/stream", ["{}"], b""),
    "a sample": ("/stream", ["{}"], bytes(2)),
    "an empty block for WeNet": ("/wenet", ['{"signal": "start"}'], b""),
    "an empty block for sherpa": ("/sherpa", [], b""),
    "an empty recording": ("/sherpa-offline", [], np.array([16_000, 0], "<i4").tobytes()),
    "a recording of a sample": ("/sherpa-offline", [], np.array([16_000, 4, 0], "<i4").tobytes()),
    "a byte of a recording": ("/sherpa-offline", [np.array([16_000, 4000], "<i4").tobytes()], bytes(1)),
    "an empty block for vosk": ("/vosk", [], b""),
    "a sample for vosk": ("/vosk", [], bytes(2)),
    "a configuration": ("/vosk", [], '{"config": {"sample_rate": 16000}}'),
    "a reset": ("/vosk", [], '{"reset": 1}'),
    "settings": ("/v1/realtime", [], '{"type": "session.update", "session": {}}'),
    "no audio": ("/v1/realtime", [], audio_event(b"")),
    "a sample in base64": ("/v1/realtime", [], audio_event(bytes(2))),
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
        assert client.websocket.close_code == 1008
        assert client.websocket.close_reason == "less than 0.005 seconds of audio came within 0.5 seconds"
    assert server.metric("failures", "idle") == num_idle + 1
    server.wait_until_empty()


def test_audio_after_the_end_does_not_prolong_an_utterance(running):
    with running() as patient, patient.connect("/wenet") as client:
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


def open_plain(server, name="http"):
    return socket.create_connection(("127.0.0.1", server.ports[name]))


@pytest.mark.parametrize(
    "piece",
    [b"\x00", b"\x00\x80\0\0\0\0", b"\x89\x80\0\0\0\0"],
    ids=["bytes of a message", "empty fragments of a message", "pings"],
)
def test_frames_that_never_become_a_message(server, piece):
    begin = b"\x02\xfe\xff\xff\0\0\0\0" if len(piece) == 1 else b"\x02\x80\0\0\0\0"
    num_idle = server.metric("failures", "idle")
    with server.connect() as client:
        client.start()
        client.websocket.socket.sendall(begin)
        keep_sending(client, piece, send=client.websocket.socket.sendall)
        assert client.close_code() == 1008
    server.wait_until(lambda: server.metric("failures", "idle") == num_idle + 1)
    server.wait_until_empty()


def test_small_fragments_are_put_together_as_they_come(running, speech, expected):
    data = speech().tobytes()
    with running() as patient, patient.connect() as client:
        client.start(partials=False)
        halfway = []

        def fragments():
            for start in range(0, len(data), 100):
                if start == 100_000:
                    time.sleep(0.1)
                    halfway.extend(len(handler.frames) for handler in patient.server.server_state.connections)
                yield data[start : start + 100]

        client.send(fragments())
        assert [event["text"] for event in client.finish()[:-1]] == [part.text for part in expected().segments]
        assert halfway in ([0], [1])


AUDIO = {"rate": 16_000, "width": 2, "channels": 1}


def wyoming_event(kind, data, payload=b""):
    return json.dumps({"type": kind, "data": data, "payload_length": len(payload)}).encode() + b"\n" + payload


@pytest.mark.parametrize(
    ("event", "complaint"),
    [
        (wyoming_event("audio-chunk", AUDIO), b"less than 0.005 seconds of audio came within 0.5 seconds"),
        (wyoming_event("audio-chunk", AUDIO, bytes(2)), b"less than 0.005 seconds of audio"),
        (wyoming_event("ping", {}), b"less than 0.005 seconds of audio"),
        (b" ", b"less than 0.005 seconds of audio"),
    ],
    ids=["empty chunks", "samples", "pings", "bytes of a line"],
)
def test_wyoming_events_that_move_nothing_on(server, event, complaint):
    with open_plain(server, "wyoming") as plain:
        answer = dripped(plain, [wyoming_event("audio-start", AUDIO), *repeat(event, 10_000)])
    assert b'"error"' in answer
    assert complaint in answer
    server.wait_until_empty()


def test_a_wyoming_event_that_is_never_whole(server):
    with open_plain(server, "wyoming") as plain:
        answer = dripped(plain, [b'{"type": "ping", "data_length": 1000}\n', *repeat(b" ", 900)])
        assert b"less than 1 event came within 0.5 seconds" in answer


def test_an_upload_that_drips(server):
    head = (
        b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    with open_plain(server) as plain:
        answer = dripped(plain, [head, *repeat(b"x", 10_000)])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"less than 250 bytes came within 0.5 seconds" in answer
    server.wait_until_empty()


@pytest.mark.parametrize(
    "rest", [b"GET / HTTP/1.1\r\nX: ", b""], ids=["the header of a second request", "the body of the first"]
)
def test_a_request_that_is_never_whole(server, monkeypatch, rest):
    monkeypatch.setattr("u2moe.runtime.server.handlers._HEADER_S", 0.3)
    length = 0 if rest else 10_000
    first = f"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()
    with open_plain(server) as plain:
        assert dripped(plain, [first + rest, *repeat(b"x", 9000)]).startswith(b"HTTP/1.1 200 ")


def test_a_response_that_is_not_read(server, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.handlers._READ_S", 0.2)
    with open_plain(server) as plain:
        plain.settimeout(PATIENCE_S)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.sendall(200 * b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_until(lambda: not server.server.server_state.connections)
