"""What clients do wrong, and what may fail: each gets an answer of its protocol, and nothing is left behind."""

import base64
import contextlib
import json
import socket
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from websockets.exceptions import ConnectionClosed

from u2moe.runtime.server.options import Limits

START = {
    "/stream": ["{}"],
    "/wenet": ['{"signal": "start"}'],
    "/sherpa": [],
    "/sherpa-offline": [],
    "/vosk": ['{"config": {"sample_rate": 16000}}'],
    "/v1/realtime": ['{"type": "session.update", "session": {}}'],
}
END = {
    "/stream": '{"type": "finish"}',
    "/wenet": '{"signal": "end"}',
    "/sherpa": "Done",
    "/sherpa-offline": "Done",
    "/vosk": '{"eof": 1}',
    "/v1/realtime": '{"type": "input_audio_buffer.commit"}',
}


def count_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def audio_message(path, samples):
    if path == "/sherpa":
        return (samples / np.float32(32768)).astype(np.float32).tobytes()
    if path == "/sherpa-offline":
        return np.array([16_000, 4 * len(samples)], "<i4").tobytes() + audio_message("/sherpa", samples)
    if path == "/v1/realtime":
        audio = base64.b64encode(samples.tobytes()).decode()
        return json.dumps({"type": "input_audio_buffer.append", "audio": audio})
    return samples.tobytes()


def cut(client):
    """Lose the connection, as when a cable is pulled and a router says so."""
    client.websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.websocket.socket.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("path", START)
@pytest.mark.parametrize("is_polite", [False, True])
def test_a_client_may_leave_at_any_point(server, speech, path, is_polite):
    audio = [audio_message(path, samples) for samples in (speech()[:40_000], speech()[40_000:])]
    messages = [*START[path], *audio, END[path]]
    num_files = count_files()
    for num_sent in range(len(messages) + 1):
        with server.connect(path) as client:
            for message in messages[:num_sent]:
                client.send(message)
            if not is_polite:
                cut(client)
    server.wait_until_empty()
    server.wait_until(lambda: count_files() <= num_files)


@pytest.mark.parametrize("path", START)
def test_a_message_that_is_too_large(running, path):
    with running(limits=Limits(message_bytes=10_000)) as small, small.connect(path) as client:
        client.send(bytes(20_000))
        assert client.close_code() == 1009
        small.wait_until_empty()


@pytest.mark.parametrize("path", START)
def test_a_client_that_says_nothing(running, path):
    with running(limits=Limits(idle_s=1.0)) as impatient, impatient.connect(path) as client:
        for message in START[path]:
            client.send(message)
        assert client.close_code() == 1008
        assert "less than 0.01 seconds of audio came within 1 seconds" in client.websocket.close_reason
        impatient.wait_until_empty()
        assert impatient.metric("failures", "idle") == 1


@pytest.mark.parametrize("path", START)
def test_a_stream_that_is_too_long(running, speech, path):
    with running(limits=Limits(duration_s=2.0)) as strict, strict.connect(path) as client:
        for message in START[path]:
            client.send(message)
        client.send(audio_message(path, speech()))
        assert client.close_code() == 1009
        strict.wait_until_empty()
        assert strict.metric("failures", "too_large") == 1


AUDIO = {"rate": 16_000, "width": 2, "channels": 1}


def wyoming_event(kind, data, payload=b""):
    return json.dumps({"type": kind, "data": data, "payload_length": len(payload)}).encode() + b"\n" + payload


@pytest.mark.parametrize(
    ("audio", "kind", "complaint"),
    [
        (b"", "idle", b"less than 0.01 seconds of audio came within 1 seconds"),
        (bytes(128_000), "too_large", b"may last 2 seconds"),
    ],
)
def test_a_wyoming_client_that_stops_or_does_not(running, audio, kind, complaint):
    with (
        running(limits=Limits(idle_s=1.0, duration_s=2.0), protocol_ports={"wyoming": 0}) as strict,
        socket.create_connection(("127.0.0.1", strict.ports["wyoming"])) as plain,
    ):
        plain.settimeout(120)
        plain.sendall(wyoming_event("audio-start", AUDIO))
        if audio:
            plain.sendall(wyoming_event("audio-chunk", AUDIO, audio))
        answer = b"".join(iter(lambda: plain.recv(1000), b""))
        assert b'"error"' in answer
        assert complaint in answer
        assert strict.metric("failures", kind) == 1
        strict.wait_until_empty()


def test_who_sends_faster_than_is_recognised_is_held_back_by_the_connection(running, held):
    """With recognition at a standstill, a small part of ten minutes leaves the client."""
    num_sent = 0

    def send():
        nonlocal num_sent
        with contextlib.suppress(ConnectionClosed):
            for num_sent in range(1, 6001):  # noqa: B007 - read by the test
                client.send(bytes(3200))

    with running(held) as server, server.connect() as client:
        client.websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        client.start()
        sending = threading.Thread(target=send)
        sending.start()
        assert held.is_held.wait(120)
        before = -1
        while num_sent != before:  # still gets on
            before = num_sent
            time.sleep(1.0)
        assert 50 < num_sent < 600  # 5 s, and what buffers on the way take
        cut(client)
        sending.join(120)
        held.release()
        server.wait_until_empty()


MEGABYTE = "x" * (1 << 20)


def test_a_client_that_does_not_read(running, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.handlers._CLOSE_S", 0.2)
    settings = {"path": "/v1/realtime", "max_size": None, "max_queue": 1}
    with running(limits=Limits(send_s=0.3)) as impatient, impatient.connect(**settings) as client:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(50):  # the answer to what is wrong is as long
                client.tell(type="nothing", event_id=MEGABYTE)
        impatient.wait_until(lambda: impatient.metric("failures", "idle") == 1)
        impatient.wait_until_empty()


def test_a_wyoming_client_that_does_not_read(running):
    data = json.dumps({"text": MEGABYTE}).encode()
    event = json.dumps({"type": "ping", "data_length": len(data)}).encode() + b"\n" + data
    with (
        running(limits=Limits(send_s=0.3), protocol_ports={"wyoming": 0}) as impatient,
        socket.create_connection(("127.0.0.1", impatient.ports["wyoming"])) as plain,
    ):
        plain.settimeout(120)
        with contextlib.suppress(OSError):
            for _ in range(50):
                plain.sendall(event)
        impatient.wait_until(lambda: impatient.metric("failures", "idle") == 1)


def test_one_that_connects_and_asks_for_nothing(running, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.handlers._HEADER_S", 0.2)
    with running() as impatient, socket.create_connection(("127.0.0.1", impatient.ports["http"])) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost:")
        plain.settimeout(120)
        assert plain.recv(1) == b""


def post(server, **content):
    return httpx.post(f"{server.url}/v1/audio/transcriptions", trust_env=False, timeout=120, **content)


def test_an_upload_that_is_too_large(running):
    with running(limits=Limits(upload_bytes=10_000)) as small:
        answer = post(small, files={"file": ("a.wav", bytes(20_000))})
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, "file")
        form = httpx.Request("POST", "http://x", files={"file": ("a.wav", bytes(1 << 20))})
        parts = [form.read()[start : start + 4096] for start in range(0, 1 << 20, 4096)]
        kind = {"Content-Type": form.headers["Content-Type"]}
        assert post(small, content=iter(parts), headers=kind).status_code == 413  # without saying how long it is
        small.wait_until(lambda: small.metric("failures", "too_large") == 2)
        small.wait_until_empty()


def test_a_file_that_is_too_long(running, tmp_path):
    soundfile.write(tmp_path / "long.flac", np.zeros(16_000 * 20, np.int16), 16_000)
    with running(limits=Limits(duration_s=10.0)) as strict:
        answer = post(strict, files={"file": (tmp_path / "long.flac").read_bytes()})
        assert answer.status_code == 413
        assert "10 seconds" in answer.json()["error"]["message"]


def test_an_upload_that_stops(running):
    with running(limits=Limits(idle_s=0.3)) as impatient:
        with socket.create_connection(("127.0.0.1", impatient.ports["http"])) as plain:
            plain.settimeout(120)
            plain.sendall(
                b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
                b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
            )
            assert plain.recv(1000).startswith(b"HTTP/1.1 408 ")
        impatient.wait_until_empty()


def test_an_upload_may_be_cut_at_any_point(server):
    form = httpx.Request("POST", "http://x", files={"file": ("a.wav", bytes(2 << 20))})  # more than stays in memory
    body = form.read()
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    whole = f"{head}Content-Type: {form.headers['Content-Type']}\r\n\r\n".encode() + body
    num_files, num_received = count_files(), server.metric("connections", "file")
    for length in (10, len(head) + 5, len(whole) - len(body), len(whole) - 30_000, len(whole) - 1):
        with socket.create_connection(("127.0.0.1", server.ports["http"])) as plain:
            plain.sendall(whole[:length])
    server.wait_until(lambda: server.metric("connections", "file") == num_received + 3)  # those with complete headers
    server.wait_until_empty()
    server.wait_until(lambda: count_files() <= num_files)


def test_a_client_that_leaves_while_its_file_is_recognised(running, held, speech, tmp_path):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    held.warm_up()
    with running(held) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/audio/transcriptions",
                files={"file": (tmp_path / "talk.wav").read_bytes()},
                trust_env=False,
                timeout=1,
            )
        server.wait_until(lambda: server.metric("files") == 0)
        held.release()


def test_a_ping_is_answered_while_recognition_is_busy(running, held, speech):
    with running(held) as server, server.connect() as client:
        client.start()
        client.play(speech()[:32_000])
        assert held.is_held.wait(120)
        assert client.websocket.ping().wait(120)
        assert not held.may_go_on.is_set()
        held.release()
        assert client.finish()[-1]["type"] == "done"


@pytest.mark.parametrize("failure", [RuntimeError("a mistake"), MemoryError()])
def test_recognition_that_fails_ends_those_it_was_for(running, held, speech, expected, failure, caplog):
    with running(held) as server:
        with server.connect() as client:
            client.start()
            held.failure = failure
            client.play(speech()[:32_000])
            held.release()
            error = client.receive_until("error")[-1]
            assert (error["message"], error["code"]) == ("recognition has failed", 1011)
            assert client.close_code() == 1011
        server.wait_until_empty()
        assert server.metric("failures", "recognition") == 1
        with server.connect() as client:
            client.start(partials=False)
            client.play(speech())
            texts = [event["text"] for event in client.finish()[:-1]]
        assert texts == [segment.text for segment in expected().segments]
    assert "recognition failed" in caplog.text


def test_damaged_frames(server):
    for garbage in (b"\xff\xff\xff\xff", b"\x81\x05hello", b"\x83\x80\0\0\0\0", b"\xc1\x80\0\0\0\0"):
        with server.connect() as client:
            client.websocket.socket.sendall(garbage)
            assert client.close_code() == 1002
    with server.connect() as client:
        client.websocket.socket.sendall(b"\x81\x81\0\0\0\0\xff")  # text that is no UTF-8
        assert client.close_code() == 1007
    server.wait_until_empty()


def test_neither_text_nor_audio_nor_urls_are_logged(server, speech, expected, caplog):
    caplog.set_level("WARNING")
    with server.connect("/stream?api_key=secret") as client:
        client.start()
        client.play(speech())
        client.finish()
    words = {word for segment in expected().segments for word in segment.text.split()}
    assert not {word for word in words | {"secret"} if word in caplog.text}
