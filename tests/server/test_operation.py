"""Operation: options, signals, full disks, certificates, keys, origins, and the log."""

import asyncio
import errno
import json
import logging
import os
import re
import socket
import ssl
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from dialects import PATIENCE_S, upload
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from u2moe.runtime import cli
from u2moe.runtime.audio.decoder import FileDecoder
from u2moe.runtime.server import log
from u2moe.runtime.server.access import Key, read_keys
from u2moe.runtime.server.log import notify


def certificate(folder, name):
    files = ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem"), "-days", "2"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", *files]
    subprocess.run(make, check=True, capture_output=True)
    return ssl.PEM_cert_to_DER_cert((folder / f"{name}.pem").read_text(encoding="ascii"))


def test_uploads_and_files_are_cut_off_at_the_deadline(running, held, talk, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    with running(held, drain_s=0.3) as server, ThreadPoolExecutor() as pool:
        recognising = pool.submit(server.post, files={"file": talk.read_bytes()})
        assert held.is_held.wait(PATIENCE_S)
        with server.open_plain() as plain:
            head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n"
            kind = "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
            plain.sendall(f"{head}{kind}".encode() + upload(bytes(2 << 20)))
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


@pytest.mark.parametrize(("owner", "name", "number", "status"), [
    (tempfile, "TemporaryFile", errno.ENOSPC, 507),
    (tempfile, "TemporaryFile", errno.EROFS, 503),
    (FileDecoder, "start", errno.EMFILE, 503),
])  # fmt: skip
def test_a_system_without_room(server, monkeypatch, owner, name, number, status, caplog):
    def fail(*_args, **_settings):
        raise OSError(number, os.strerror(number))

    before = server.metric("failures", "storage")
    monkeypatch.setattr(owner, name, fail)
    answer = server.post(files={"file": bytes(2 << 20)})
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "server_error")
    assert server.metric("failures", "storage") == before + 1
    assert not any(record.exc_info for record in caplog.records)


def test_certificate_and_keys_are_read_anew(running, tmp_path, capsys):
    """Files that do not belong together are found before the model is loaded."""

    def shown(port):
        return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate(("127.0.0.1", port)))

    first, keys = certificate(tmp_path, "tls"), tmp_path / "keys"
    certificate(tmp_path, "other")
    wrong = ["--tls-certificate", str(tmp_path / "tls.pem"), "--tls-key", str(tmp_path / "other.key")]
    assert cli.main(["serve", "no-bundle", "--port", "0", *wrong]) == 1
    assert f"{tmp_path / 'tls.pem'}, {tmp_path / 'other.key'}: " in capsys.readouterr().err
    keys.write_text("# name, key, streams\nalice key-of-alice\nbob key-of-bob\n", encoding="utf-8")
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
                async with client("key-of-bob"), client("key-of-bob"):
                    pass
                keys.write_text("carol key-of-carol\n", encoding="utf-8")
                second = await asyncio.to_thread(certificate, tmp_path, "tls")
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
    with pytest.raises(KeyError) as caught:
        {}["secret\n" * 1000]
    record.exc_info = (caught.type, caught.value, caught.tb)  # its message may quote a client
    line = log._Formatter("%(message)s", is_json=False).format(record)
    assert re.fullmatch(r"two lines KeyError at test_operation.py:\d+ test_requests_\w+ \(request r1\)", line)
    log.REQUEST_ID.reset(token)


def test_systemd_is_told(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        assert channel.recv(100) == b"READY=1"


def test_the_key_may_be_in_a_file_or_in_the_environment(tmp_path, monkeypatch):
    def chosen(*arguments):
        launched = []
        monkeypatch.setattr("u2moe.runtime.server.launch.launch", lambda options, _: launched.append(options) or 0)
        assert cli.main(["serve", *arguments]) == 0
        return launched[0].api_key, launched[0].keys_file

    file = tmp_path / "key"
    monkeypatch.delenv("U2MOE_API_KEY", raising=False)
    assert chosen() == (None, None)
    monkeypatch.setenv("U2MOE_API_KEY", "from-the-environment")
    assert chosen() == ("from-the-environment", None)
    assert chosen("--api-key", str(file)) == (None, file)


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--port", "70000"], "at most 65535"),
    (["--protocol", "vosk=1", "--protocol", "vosk=2"], "found vosk twice, expected different names"),
    (["--model", "a=x", "--model", "a=y"], "name models as BUNDLE or with --model, not both"),
    (["--tls-certificate", "no.pem", "--tls-key", "no.key"], "no.pem: no such file; TLS needs a PEM file"),
    (["--protocol", "grpc=1"], "must be one of wenet, sherpa, sherpa-offline, vosk, wyoming"),
    (["--protocol", "vosk"], "NAME=PORT"),
    (["--workers", "0"], "workers must be at least 1"),
    (["--capacity", "0"], "capacity must be at least 1"),
    (["--max-duration", "nan"], "duration_s must be"),
    (["--tls-key", "x"], "both the certificate and its key"),
    (["--host", "0.0.0.0", "--protocol", "wyoming=1", "--api-key", "key"], "wyoming does not support API keys"),
    (["--hotwords", "names.txt"], "names.txt"),
    (["--api-key", "/dev/null"], "/dev/null: must be a regular file"),
    (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
    (["--host", f"unix:/{'x' * 120}"], "path too long"),
    (["--host", "unix:"], "unix:PATH as --host needs a path"),
])  # fmt: skip
def test_options_are_checked_before_the_model_is_loaded(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("secret\n", encoding="utf-8")
    (tmp_path / "names.txt").write_text("ALICE :much\n", encoding="utf-8")
    assert cli.main(["serve", "no-bundle", *arguments]) == 1
    assert complaint in capsys.readouterr().err


KEY = "a-key-of-20-letters."


@pytest.fixture(scope="module")
def guarded(running):
    with running(api_key=KEY, cors_origins=("https://app.example",), forwarded_allow_ips=("127.0.0.1",)) as server:
        yield server


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/audio/transcriptions"])
def test_what_needs_the_key(guarded, path, monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda given, key: compared.append((given, key)) or given == key)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer"}):
        answer = guarded.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert (b"wrong", KEY.encode()) in compared  # in constant time
    assert guarded.get(path, headers={"Authorization": f"bearer {KEY}"}).status_code != 401
    assert guarded.get(path, params={"api_key": KEY}).status_code != 401


def test_what_needs_none_and_that_openais_client_sends_it(guarded):
    for path in ("/", "/page.js", "/healthz", "/readyz", "/openapi.json"):
        assert guarded.get(path).status_code == 200, path
    with openai.OpenAI(api_key=KEY, base_url=f"{guarded.url}/v1") as client:
        assert client.models.list().data


@pytest.mark.parametrize("path", ["/stream", "/v1/realtime", "/vosk"])
def test_a_websocket_needs_the_key(guarded, path):
    refusals = guarded.metric("refusals", "key")
    with pytest.raises(InvalidStatus) as caught, guarded.connect(path):
        pass
    assert caught.value.response.status_code == 401
    assert guarded.metric("refusals", "key") == refusals + 1
    with guarded.connect(path, additional_headers={"Authorization": f"Bearer {KEY}"}):
        pass
    with guarded.connect(f"{path}?api_key={KEY}"):
        pass
    own, openais = f"u2moe-api-key.{KEY}", f"openai-insecure-api-key.{KEY}"
    # The key alone is chosen: browsers close the connection if none of their subprotocols is.
    for offered, chosen in ((["u2moe", own], None), (["realtime", openais], None), ([own], own)):
        with guarded.connect(path, subprotocols=offered) as client:
            assert client.websocket.subprotocol == chosen or chosen is None


def test_pages_of_other_origins_post_nothing(server, guarded):
    url = f"{server.url}/v1/audio/transcriptions"
    for origin in ("https://evil.example", ""):
        answer = httpx.post(url, headers={"Origin": origin}, trust_env=False)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin")
    assert httpx.post(url, headers={"Origin": server.url}, trust_env=False).status_code == 400  # not a form
    proxied = {"X-Forwarded-Proto": "https", "Origin": "https://speech.example", "Host": "speech.example"}
    for each, status in ((server, 403), (guarded, 400)):  # an address behind a proxy is believed from it alone
        url = f"{each.url}/v1/audio/transcriptions?api_key={KEY}"
        assert httpx.post(url, headers=proxied, trust_env=False).status_code == status
    # allowed pages can also read why they were refused
    answer = guarded.get("/v1/models", headers={"Origin": "https://app.example", "Authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
    ask = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    for origin, is_allowed in (("https://app.example", True), ("https://evil.example", False)):
        answer = httpx.options(f"{guarded.url}/v1/models", headers={**ask, "Origin": origin}, trust_env=False)
        assert ("Access-Control-Allow-Origin" in answer.headers) == is_allowed
    assert "Access-Control-Allow-Origin" not in server.get("/v1/models", headers=ask).headers


def test_origins_of_websockets(server, guarded):
    for origin in ("https://evil.example", "null", ""):
        with pytest.raises(InvalidStatus) as caught, server.connect(origin=origin):
            pass
        assert caught.value.response.status_code == 403
    with server.connect("/v1/realtime", origin=server.url, subprotocols=["realtime", "openai-beta.realtime-v1"]) as one:
        assert one.websocket.subprotocol == "realtime"
    with guarded.connect(f"/stream?api_key={KEY}", origin="https://app.example"):
        pass
    # WeNet's page comes from another origin, and the user can only set this port.
    with server.connect("/", port=server.ports["wenet"], origin="https://wenet.example"):
        pass


def test_names_that_lead_here_but_are_none_of_ours(server):
    """DNS rebinding: page and Host header have the same name, which is not a local one."""
    headers = {"Origin": "http://evil.example:8000", "Host": "evil.example:8000"}
    for path in ("/", "/metrics", "/v1/audio/transcriptions"):
        answer = server.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host")
    own_port = f"http://127.0.0.1:{server.ports['vosk']}/"
    assert httpx.get(own_port, headers=headers, trust_env=False).status_code == 403
    for name in ("localhost", "[::1]:8000", "127.0.0.1", "[0:0:0:0:0:0:0:1]:8000"):
        assert server.get("/", headers={"Host": name}).status_code == 200
