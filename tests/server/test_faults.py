"""Errors of clients and failures of the server: each gets an answer of its protocol, and nothing is left behind."""

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
from dialects import END, START, WYOMING_AUDIO, audio_messages, wyoming_event
from websockets.exceptions import ConnectionClosed

from u2moe.runtime.server.options import Limits

LONG = "x" * 1_000_000


def count_files():
    """Return the number of descriptors of files and connections. Memory that a server shares with its workers is
    ignored: it is freed when the server's object is collected."""
    count = 0
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the folder itself
            count += "/pym-" not in str(file.readlink())
    return count


def cut(client):
    """Reset the connection, as a router does after a cable is pulled."""
    client.websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.websocket.socket.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def strict(running):
    """Return a server with low limits."""
    limits = Limits(message_bytes=40_000, upload_bytes=10_000, duration_s=1.0)
    with running(limits=limits, protocol_ports={"wyoming": 0}) as server:
        yield server


@pytest.mark.parametrize("path", START)
@pytest.mark.parametrize("is_polite", [False, True])
def test_a_client_may_leave_at_any_point(server, speech, path, is_polite):
    messages = [*START[path], *audio_messages(path, speech(), 40_000), END[path]]
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
def test_a_message_that_is_too_large(strict, path):
    with strict.connect(path) as client:
        client.send(bytes(50_000))
        assert client.close_code() == 1009
    strict.wait_until_empty()


@pytest.mark.parametrize("path", START)
def test_a_stream_that_is_too_long(strict, speech, path):
    before = strict.metric("failures", "too_large")
    with strict.connect(path) as client:
        with contextlib.suppress(ConnectionClosed):
            for message in (*START[path], *audio_messages(path, speech()[:32_000], 6000)):
                client.send(message)
        assert client.close_code() == 1009
    strict.wait_until_empty()
    assert strict.metric("failures", "too_large") == before + 1


def test_a_wyoming_stream_that_is_too_long(strict):
    before = strict.metric("failures", "too_large")
    chunks = 2 * wyoming_event("audio-chunk", WYOMING_AUDIO, bytes(20_000))
    answer = strict.answer(wyoming_event("audio-start", WYOMING_AUDIO) + chunks, "wyoming")
    assert b'"error"' in answer
    assert b"at most 1 seconds of audio" in answer
    strict.wait_until_empty()
    assert strict.metric("failures", "too_large") == before + 1


def test_who_sends_faster_than_is_recognised_is_held_back_by_the_connection(running, held):
    """While recognition stands still, the client can send only a small part of ten minutes."""
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
        while num_sent != before:  # still makes progress
            before = num_sent
            time.sleep(1.0)
        assert 50 < num_sent < 600  # 5 s, and the buffers on the way
        cut(client)
        sending.join(120)
        held.release()
        server.wait_until_empty()


def test_clients_that_do_not_read(running, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.transport._UNREAD_S", 0.3)
    data = json.dumps({"text": LONG[:200_000]}).encode()
    with running(limits=Limits(send_s=0.3), protocol_ports={"wyoming": 0}) as impatient:
        with impatient.connect("/v1/realtime", max_size=None, max_queue=1, close_timeout=1) as client:
            with contextlib.suppress(ConnectionClosed):
                for _ in range(50):  # the error in the answer is as long
                    client.tell(type="nothing", event_id=LONG)
            impatient.wait_until(lambda: impatient.metric("failures", "idle") == 1)
            impatient.wait_until_empty()
        with impatient.open_plain("wyoming") as plain:
            with contextlib.suppress(OSError):
                plain.sendall(250 * (wyoming_event("ping", data_length=len(data)) + data))
            impatient.wait_until(lambda: impatient.metric("failures", "idle") == 2)


def test_an_upload_that_is_too_large_or_too_long(strict, tmp_path):
    before = strict.metric("failures", "too_large")
    answer = strict.post(files={"file": ("a.wav", bytes(20_000))})
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "file")
    form = httpx.Request("POST", "http://x", files={"file": ("a.wav", bytes(1 << 20))})
    parts = [form.read()[start : start + 4096] for start in range(0, 1 << 20, 4096)]
    kind = {"Content-Type": form.headers["Content-Type"]}
    assert strict.post(content=iter(parts), headers=kind).status_code == 413  # without a declared length
    soundfile.write(tmp_path / "long.flac", np.zeros(16_000 * 20, np.int16), 16_000)
    answer = strict.post(files={"file": (tmp_path / "long.flac").read_bytes()})
    assert (answer.status_code, "1 seconds" in answer.json()["error"]["message"]) == (413, True)
    strict.wait_until(lambda: strict.metric("failures", "too_large") == before + 3)
    strict.wait_until_empty()


def test_damaged_frames_and_uploads_that_are_cut_at_any_point(server):
    form = httpx.Request("POST", "http://x", files={"file": ("a.wav", bytes(2 << 20))})  # too large to stay in memory
    body = form.read()
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    whole = f"{head}Content-Type: {form.headers['Content-Type']}\r\n\r\n".encode() + body
    server.service.files._decoders[0].start()  # its pipes stay open
    num_files, num_received = count_files(), server.metric("connections", "file")
    for length in (10, len(head) + 5, len(whole) - len(body), len(whole) - 30_000, len(whole) - 1):
        with server.open_plain() as plain:
            plain.sendall(whole[:length])
    server.wait_until(lambda: server.metric("connections", "file") == num_received + 3)  # those with complete headers
    server.wait_until_empty()
    server.wait_until(lambda: count_files() <= num_files)
    for garbage in (b"\xff\xff\xff\xff", b"\x81\x05hello", b"\x83\x80\0\0\0\0", b"\xc1\x80\0\0\0\0"):
        with server.connect() as client:
            client.websocket.socket.sendall(garbage)
            assert client.close_code() == 1002
    with server.connect() as client:
        client.websocket.socket.sendall(b"\x81\x81\0\0\0\0\xff")  # text that is not UTF-8
        assert client.close_code() == 1007
    server.wait_until_empty()


def test_a_client_that_leaves_while_its_file_is_recognised(running, held, speech, tmp_path, capfd):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    num_files = count_files()
    with running(held) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.post(files={"file": (tmp_path / "talk.wav").read_bytes()}, timeout=1)
        server.wait_until(lambda: server.metric("files") == 0)
        held.release()
    assert not capfd.readouterr().err
    assert count_files() <= num_files


def test_a_ping_is_answered_while_recognition_is_busy(running, held, speech):
    with running(held) as server, server.connect() as client:
        client.start()
        client.play(speech()[:32_000])
        assert held.is_held.wait(120)
        assert client.websocket.ping().wait(120)
        assert not held.may_go_on.is_set()
        held.release()
        assert client.finish()[-1]["type"] == "done"


def test_recognition_that_fails_ends_those_it_was_for(running, held, speech, expected, caplog):
    with running(held) as server:
        for failure in (RuntimeError("a mistake"), MemoryError()):
            with server.connect() as client:
                client.start()
                held.failure = failure
                client.play(speech()[:32_000])
                held.release()
                error = client.receive_until("error")[-1]
                assert (error["message"], error["code"]) == ("recognition has failed", 1011)
                assert client.close_code() == 1011
            server.wait_until_empty()
        assert server.metric("failures", "recognition") == 2
        with server.connect() as client:
            client.start(partials=False)
            client.play(speech())
            texts = [event["text"] for event in client.finish()[:-1]]
        assert texts == [segment.text for segment in expected().segments]
    assert "recognition failed" in caplog.text
