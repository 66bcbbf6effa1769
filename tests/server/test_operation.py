"""Operation: signals, full disks, certificates, keys, and the log."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import soundfile
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from u2moe.runtime import cli
from u2moe.runtime.server import log
from u2moe.runtime.server.access import Key, read_keys
from u2moe.runtime.server.log import notify

PATIENCE_S = 120
HEAD = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'


def wav(tmp_path, seconds=1):
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000 * seconds, np.int16), 16_000)
    return (tmp_path / "a.wav").read_bytes()


def test_uploads_and_files_are_cut_off_at_the_deadline(running, held, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    with running(held, drain_s=0.3) as server, ThreadPoolExecutor() as pool:
        recognising = pool.submit(server.post, files={"file": wav(tmp_path)})
        assert held.is_held.wait(PATIENCE_S)
        with server.open_plain() as plain:
            plain.sendall(HEAD + b"Content-Length: 9000000\r\n\r\n" + PART + bytes(2 << 20))
            server.wait_until(lambda: server.metric("files") == 2)
            server.stop()
            answer = b"".join(iter(lambda: plain.recv(10_000), b""))
        held.release()
        server.join()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"the server is stopping" in answer
    assert recognising.result().status_code == 503
    assert not list((tmp_path / "uploads").iterdir())
    assert "cut off 0 streams and 2 files" in caplog.text
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(("signals", "status"), [(1, 0), (2, 128 + signal.SIGTERM)])
def test_the_process_ends_though_an_upload_goes_on(serving, tmp_path, signals, status):
    options = ("--capacity", "1", "--drain-timeout", "0.5" if signals == 1 else "60")
    with serving(*options, TMPDIR=str(tmp_path)) as process:
        port = int(process.urls[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as plain:
            plain.sendall(HEAD + b"Content-Length: 9000000\r\n\r\n" + PART + bytes(2 << 20))
            process.send_signal(signal.SIGHUP)
            assert "reloaded keys" in process.stderr.readline()
            deadline = time.monotonic() + PATIENCE_S
            while "\nu2moe_files 1.0\n" not in httpx.get(f"{process.urls[0]}/metrics", trust_env=False).text:
                assert time.monotonic() < deadline
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.6)
            assert process.wait(PATIENCE_S) == status
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 507), (errno.EROFS, 503)])
def test_a_temporary_folder_without_room(server, monkeypatch, number, status, caplog):
    def fail(*_args, **_settings):
        raise OSError(number, os.strerror(number))

    before = server.metric("failures", "storage")
    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    answer = server.post(files={"file": bytes(2 << 20)})
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "server_error")
    assert server.metric("failures", "storage") == before + 1
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("expects", [b"", b"Expect: 100-continue\r\n"])
def test_a_declared_size_is_refused_before_anything_is_read(server, expects):
    with server.open_plain() as plain:
        plain.sendall(HEAD + expects + b"Content-Length: 99000000000\r\n\r\n")
        assert plain.recv(10_000).startswith(b"HTTP/1.1 413 ")


def test_a_wrong_tls_key_is_found_before_the_model_is_loaded(tmp_path, capsys):
    for name in ("a", "b"):
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
        files = ["-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.pem")]
        subprocess.run([*make, *files], check=True, capture_output=True)
    wrong = ["--tls-certificate", str(tmp_path / "a.pem"), "--tls-key", str(tmp_path / "b.key")]
    assert cli.main(["serve", "no-bundle", "--port", "0", *wrong]) == 1
    assert f"{tmp_path / 'a.pem'}, {tmp_path / 'b.key'}: " in capsys.readouterr().err


def test_certificate_and_keys_are_read_anew(running, tmp_path):
    def make(name):
        call = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-days", "2"]
        files = ["-keyout", str(tmp_path / "tls.key"), "-out", str(tmp_path / "tls.pem")]
        subprocess.run([*call, *files], check=True, capture_output=True)
        return ssl.PEM_cert_to_DER_cert((tmp_path / "tls.pem").read_text(encoding="ascii"))

    def shown(port):
        return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port)))

    first, keys = make("first"), tmp_path / "keys"
    keys.write_text("# name, key, streams\nalice key-of-alice 1\nbob key-of-bob\n", encoding="utf-8")
    unsafe = ssl._create_unverified_context()
    tls = {"tls_certificate": tmp_path / "tls.pem", "tls_key": tmp_path / "tls.key"}
    with running(keys_file=keys, **tls) as server:
        port = server.ports["http"]

        def client(key):
            settings = {"ssl": unsafe, "additional_headers": {"Authorization": f"Bearer {key}"}}
            return connect(f"wss://127.0.0.1:{port}/stream", open_timeout=PATIENCE_S, proxy=None, **settings)

        def reload():
            server.service.scheduler._loop.call_soon_threadsafe(server.server.reload)

        async def talk():
            """Use a client of one thread: the other one reads and writes in two, which OpenSSL does not support."""
            async with client("key-of-alice") as speaking:
                async with client("key-of-alice") as another:
                    assert "the key alice allows 1 streams at a time" in await another.recv()
                async with client("key-of-bob"), client("key-of-bob"):
                    pass
                keys.write_text("carol key-of-carol\n", encoding="utf-8")
                second = await asyncio.to_thread(make, "second")
                reload()
                await asyncio.to_thread(server.wait_until, lambda: shown(port) == second)
                with pytest.raises(InvalidStatus):
                    await client("key-of-bob")
                async with client("key-of-carol"):
                    pass
                keys.write_text("no key here at all\n", encoding="utf-8")
                reload()
                async with client("key-of-carol"):
                    pass
                keys.unlink()
                os.mkfifo(keys)
                reload()
                async with client("key-of-carol"):  # the event loop does not wait for data of the pipe
                    pass
                await speaking.send('{"sample_rate": 16000}')
                assert "ready" in await speaking.recv()

        assert shown(port) == first
        asyncio.run(asyncio.wait_for(talk(), PATIENCE_S))


def test_a_file_of_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("single\n", encoding="utf-8")
    assert read_keys(file) == (Key(name="default", secret="single"),)
    for text, complaint in (
        ("", "contains no API key"),
        ("a b c d\n", "line 1 must be"),
        ("# first\na b\n\nc d many\n", "line 4 must be"),
        ("a b\nc b\n", "the same secret"),
        ("a b 0\n", "at least 1"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{file}: .*{complaint}"):
            read_keys(file)
    file.write_bytes(b"a \xff\n")
    with pytest.raises(ValueError, match=f"{file}: 'utf-8' codec can't decode byte 0xff in position 2"):
        read_keys(file)


def test_keys_are_not_awaited_from_a_pipe(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")

    def end():
        with contextlib.suppress(OSError):  # nobody reads
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))

    ending = threading.Timer(2.0, end)
    ending.start()
    with pytest.raises(ValueError, match=f"{pipe}: must be a regular file"):
        read_keys(pipe)
    ending.cancel()


def test_requests_have_an_id_that_lines_of_json_and_text_bear(server, monkeypatch):
    assert server.get("/healthz", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = server.get("/no-such", headers={"X-Request-ID": "not one\u00e9".encode("latin-1")}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", made)
    with server.connect() as client:
        assert client.websocket.response.headers["x-request-id"]
    record = logging.LogRecord("u2moe.server", logging.WARNING, "", 0, "two\nlines", (), None)
    token = log.REQUEST_ID.set("r1")
    line = json.loads(log._Formatter("worker 1: %(message)s", is_json=True).format(record))
    assert (line["level"], line["message"], line["request"]) == ("warning", "worker 1: two lines", "r1")
    assert log._Formatter("%(message)s", is_json=False).format(record) == "two lines (request r1)"
    log.REQUEST_ID.reset(token)


def test_an_address_behind_a_proxy_is_believed_from_it_alone_and_systemd_is_told(running, tmp_path, monkeypatch):
    headers = {"X-Forwarded-Proto": "https", "Origin": "https://speech.example", "Host": "speech.example"}
    with running(forwarded_allow_ips=("127.0.0.1",)) as server:
        answer = httpx.post(f"{server.url}/v1/audio/transcriptions", headers=headers, trust_env=False)
        assert answer.status_code == 400  # not a form
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert channel.recv(100) == b"READY=1"
