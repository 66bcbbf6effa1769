"""Errors, slow clients and failures of the server: each gets an answer of its protocol, and nothing is left behind."""

import contextlib
import itertools
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from dialects import END, PATIENCE_S, START, WYOMING_AUDIO, audio_messages, realtime_audio, wyoming_event
from websockets.exceptions import ConnectionClosed

from u2moe.runtime.server.options import Limits

RESET = b"\1\0\0\0\0\0\0\0"  # SO_LINGER without a wait
LONG = "x" * 1_000_000


def count_files():
    """Return the number of descriptors of files and connections. Memory that a server shares with its workers is
    ignored: it is freed when the server's object is collected."""
    count = 0
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the folder itself
            count += "/pym-" not in str(file.readlink())
    return count


@pytest.fixture(scope="module")
def strict(running):
    limits = Limits(message_bytes=40_000, upload_bytes=10_000, duration_s=1.0)
    with running(limits=limits, protocol_ports={"wyoming": 0}) as server:
        yield server


@pytest.mark.parametrize("path", START)
def test_a_client_may_leave_at_any_point(server, speech, path):
    messages = [*START[path], *audio_messages(path, speech(), 40_000), END[path]]
    num_files = count_files()
    for is_polite, num_sent in itertools.product((False, True), range(len(messages) + 1)):
        with server.connect(path) as client:
            for message in messages[:num_sent]:
                client.send(message)
            if not is_polite:  # as a router does after a cable is pulled
                client.websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                client.websocket.socket.shutdown(socket.SHUT_RDWR)
    server.wait_until_empty()
    server.wait_until(lambda: count_files() <= num_files)


@pytest.mark.parametrize("path", [*START, "wyoming"])
def test_a_message_or_a_stream_that_is_too_large(strict, speech, path):
    if path in START:
        with strict.connect(path) as client:
            client.send(bytes(50_000))
            assert client.close_code() == 1009
        strict.wait_until_empty()
    before = strict.metric("failures", "too_large")
    if path in START:
        with strict.connect(path) as client:
            with contextlib.suppress(ConnectionClosed):
                for message in (*START[path], *audio_messages(path, speech()[:32_000], 6000)):
                    client.send(message)
            assert client.close_code() == 1009
    else:
        chunks = 2 * wyoming_event("audio-chunk", WYOMING_AUDIO, bytes(20_000))
        answer = strict.answer(wyoming_event("audio-start", WYOMING_AUDIO) + chunks, "wyoming")
        assert b'"error"' in answer
        assert b"at most 1 seconds of audio" in answer
    strict.wait_until_empty()
    assert strict.metric("failures", "too_large") == before + 1


def test_who_sends_faster_than_is_recognised_is_held_back_and_may_vanish(running, held, monkeypatch):
    """While recognition stands still, the client can send only a small part of ten minutes. When it vanishes, much is
    unread, but its slot is free before recognition goes on, also in a protocol without pings."""
    monkeypatch.setattr("u2moe.runtime.server.server._PING_S", 0.5)
    num_sent = 0

    def send():
        nonlocal num_sent
        with contextlib.suppress(ConnectionClosed):
            for num_sent in range(1, 6001):  # noqa: B007 - read by the test
                client.send(bytes(3200))

    with running(held, protocol_ports={"wyoming": 0}) as server:
        with server.connect() as client:
            client.websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
            client.start()
            sending = threading.Thread(target=send)
            sending.start()
            assert held.is_held.wait(PATIENCE_S)
            before = -1
            while num_sent != before:  # still makes progress
                before = num_sent
                time.sleep(1.0)
            assert 50 < num_sent < 600  # 5 s, and the buffers on the way
            client.websocket.socket.shutdown(socket.SHUT_RDWR)
            sending.join(PATIENCE_S)
        with server.open_plain("wyoming") as plain, contextlib.suppress(TimeoutError):
            plain.settimeout(1.0)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            plain.sendall(AUDIO_START + 600 * wyoming_event("audio-chunk", WYOMING_AUDIO, bytes(32_000)))
        server.wait_until(lambda: server.metric("streams") == 0)
        assert server.metric("failures", "recognition") == 0
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
        with impatient.open_plain() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            plain.sendall(200 * b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
            impatient.wait_until(lambda: not impatient.server.connections.num_open)


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
    num_faults = server.metric("failures", "recognition")
    for before in (b"", b"\x81\x82\0\0\0\0{}"):
        with server.connect() as client:
            client.websocket.socket.sendall(before + b"\x81\x81\0\0\0\0\xff")  # text that is not UTF-8
            assert client.close_code() == 1007
    server.wait_until_empty()
    assert server.metric("failures", "recognition") == num_faults  # these count faults of the server


def test_a_client_that_leaves_while_its_file_is_recognised(running, held, talk, capfd):
    num_files = count_files()
    with running(held) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.post(files={"file": talk.read_bytes()}, timeout=1)
        server.wait_until(lambda: server.metric("files") == 0)
        held.release()
    assert not capfd.readouterr().err
    assert count_files() <= num_files


def test_recognition_that_fails_ends_those_it_was_for(running, held, speech, texts, caplog):
    with running(held) as server:
        for failure in (RuntimeError("a mistake"), MemoryError()):
            with server.connect() as client:
                client.start()
                held.failure = failure
                held.is_held.clear()
                held.may_go_on.clear()
                client.play(speech()[:32_000])
                assert held.is_held.wait(PATIENCE_S)
                assert client.websocket.ping().wait(PATIENCE_S)  # answered while recognition is busy
                assert server.server.connections.is_decoding()  # so clients in debt wait
                held.release()
                error = client.receive_until("error")[-1]
                assert (error["message"], error["code"]) == ("recognition has failed", 1011)
                assert client.close_code() == 1011
            server.wait_until_empty()
            server.wait_until(lambda: not server.server.connections.is_decoding())
        assert server.metric("failures", "recognition") == 2
        assert [event["text"] for event in server.recognised(speech(), partials=False)[:-1]] == texts
    assert "recognition failed" in caplog.text


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
"""Messages by name: path, messages at the start, and the message that is sent again and again."""
FRAMES = {
    "bytes of a message": (b"\x02\xfe\xff\xff\0\0\0\0", b"\x00"),
    "empty fragments of a message": (b"\x02\x80\0\0\0\0", b"\0\x80\0\0\0\0"),
    "pings": (b"\x02\x80\0\0\0\0", b"\x89\x80\0\0\0\0"),
}
UPLOAD = (
    b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
)
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
SLOW_UPLOAD = rb"^HTTP/1.1 408 .*less than 250 bytes received in 0.5 seconds"
SLOW_AUDIO, SLOW_EVENT = rb'"error".*less than 0.005 seconds of audio received', rb'"error".*less than 1 event received'
AUDIO_START = wyoming_event("audio-start", WYOMING_AUDIO)
BYTES = {
    "wyoming: nothing": (AUDIO_START, b"", SLOW_AUDIO),
    "wyoming: empty chunks": (AUDIO_START, wyoming_event("audio-chunk", WYOMING_AUDIO), SLOW_AUDIO),
    "wyoming: samples": (AUDIO_START, wyoming_event("audio-chunk", WYOMING_AUDIO, bytes(2)), SLOW_AUDIO),
    "wyoming: pings": (AUDIO_START, wyoming_event("ping"), SLOW_AUDIO),
    "wyoming: bytes of a line": (AUDIO_START, b" ", SLOW_AUDIO),
    "wyoming: bytes of data": (b'{"type": "ping", "data_length": 1000}\n', b" ", SLOW_EVENT),
    "http: nothing of an upload": (UPLOAD, b"", SLOW_UPLOAD),
    "http: bytes of an upload": (UPLOAD, b"x", SLOW_UPLOAD),
    "http: nothing of a header": (b"GET / HTTP/1.1\r\nHost:", b"", b"^$"),
    "http: bytes of a second header": (HEALTH + b"\r\nGET / HTTP/1.1\r\nX: ", b"x", b"^HTTP/1.1 200 "),
    "http: bytes of a body": (HEALTH + b"Content-Length: 10000\r\n\r\n", b"x", b"^HTTP/1.1 200 "),
}
"""For a port's protocol and name: the beginning, the bytes that follow one by one, and the answer."""


@pytest.fixture(scope="module")
def hasty(running):
    with running(limits=Limits(idle_s=0.5), protocol_ports={"wyoming": 0}, capacity=2 * len(DRIPS)) as hasty:
        yield hasty


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


def test_messages_that_move_nothing_on(hasty):
    def drip(name):
        path, start, message = DRIPS[name]
        with hasty.connect(path) as client:
            with contextlib.suppress(ConnectionClosed):  # it may be closed already on a busy machine
                for first in start:
                    client.send(first)
            keep_sending(client, message)
            return client.websocket.close_code, client.websocket.close_reason

    num_idle = hasty.metric("failures", "idle")
    reason = "less than 0.005 seconds of audio received in 0.5 seconds"
    assert at_once(drip, DRIPS) == {
        name: (1000 if path == "/wenet" else 1008, reason) for name, (path, _, _) in DRIPS.items()
    }
    hasty.wait_until(lambda: hasty.metric("failures", "idle") == num_idle + len(DRIPS))
    hasty.wait_until_empty()


def test_frames_that_never_become_a_message_and_audio_after_the_end(hasty, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.transport._CLOSE_S", 1.0)

    def drip(name):
        begin, piece = FRAMES[name]
        with hasty.connect() as client:
            client.start()
            client.websocket.socket.sendall(begin)
            keep_sending(client, piece, send=client.websocket.socket.sendall)
            return client.close_code()

    assert at_once(drip, FRAMES) == dict.fromkeys(FRAMES, 1008)
    with hasty.connect("/wenet") as client:
        client.tell(signal="start")
        assert client.receive()["type"] == "server_ready"
        client.tell(signal="end")
        keep_sending(client, bytes(2))
        assert client.close_code() == 1000
    hasty.wait_until_empty()


def test_bytes_that_move_nothing_on(hasty, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.transport._REQUEST_S", 1.0)

    def drip(name):
        begin, piece, _ = BYTES[name]
        answer, deadline = b"", time.monotonic() + PATIENCE_S
        with hasty.open_plain(name.partition(":")[0]) as plain:
            plain.settimeout(0.02)
            while time.monotonic() < deadline:
                try:
                    plain.sendall(begin)
                    begin = piece
                    if not (data := plain.recv(10_000)):
                        return answer
                    answer += data
                except TimeoutError:
                    continue
                except OSError:  # it was closed with unread data
                    return answer
        return b"it is not closed"

    for name, answer in at_once(drip, BYTES).items():
        assert re.search(BYTES[name][2], answer, re.DOTALL), (name, answer)
    hasty.wait_until_empty()
