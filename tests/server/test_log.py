"""The log that operators read."""

import contextlib
import io
import json
import logging
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import httpx
import pytest
import soundfile
from websockets.exceptions import InvalidStatus

from u2moe.runtime.errors import AudioError
from u2moe.runtime.server import errors, launch, log
from u2moe.runtime.server.log import Metrics
from u2moe.runtime.server.options import ServerOptions

PATIENCE_S = 120
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) u2moe\.server: (.+)")
LIFE = (
    ("INFO", "listening at http"), ("INFO", "loaded"), ("INFO", "ready: 1 live streams at a time"),
    ("WARNING", "all slots are taken"), ("WARNING", "violated the protocol"), ("WARNING", "sent or read too little"),
    ("INFO", "stopping"), ("INFO", "stopped"),
)  # fmt: skip


def close_code(client_of, url, *messages):
    """Return the close code of a connection, after waiting for a free slot."""
    code = 1013
    while code == 1013:
        with client_of(url) as client:
            for message in messages:
                client.send(message)
            code = client.close_code()
    return code


def damaged_form():
    return {"content": b"--x\r\nno", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}


def without_length(samples):
    """Return a WAV file without a length, as a recorder writes it while recording."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    data = bytearray(file.getvalue())
    data[40:44] = bytes(4)
    return bytes(data)


def test_the_life_of_a_server(serving, client_of, speech, expected):
    with serving("--capacity", "1", "--idle-timeout", "3") as process:
        address = process.urls[0].removeprefix("http://")
        url = f"ws://{address}/stream?api_key=secret-key"
        with client_of(url) as client:
            client.start(hotwords=["seventy"])
            for _ in range(3):
                with client_of(url) as refused:
                    assert refused.close_code() == 1013
            client.play(speech())
            client.finish()
        for content in (damaged_form(), {"files": {"file": ("live.wav", without_length(speech()))}}):  # not logged
            httpx.post(f"http://{address}/v1/audio/transcriptions", trust_env=False, timeout=PATIENCE_S, **content)
        assert close_code(client_of, url, "secret-text") == 1008
        assert close_code(client_of, url) == 1008
        process.send_signal(signal.SIGTERM)
        said = process.said + process.communicate(timeout=PATIENCE_S)[1]
    first, *rest = said.splitlines()
    assert first.startswith("demo model")  # from the command; a bundle suppresses it
    lines = [LINE.fullmatch(line) for line in rest]
    assert all(lines), said
    assert len(lines) == len(LIFE), said
    for line, (level, part) in zip(lines, LIFE, strict=True):
        assert line[1] == level, said
        assert part in line[2], said
    secrets = {word for segment in expected().segments for word in segment.text.split()} | {"secret", "seventy"}
    assert not {word for word in secrets if word in said}


JUNK = (
    b"GET /healthz HTTP/1.1\r\nHost: [\r\n\r\n",
    b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nOrigin: http://[\r\n\r\n",
    b"GET /stream HTTP/1.1\r\nHost: example.com\r\n\r\n",
    b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
    b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\0\xff\r\n\r\n",
)
"""Requests that get a status of 400 or more, or no response."""


def test_each_line_is_json_and_each_kind_comes_once(serving, client_of, tmp_path):
    (tmp_path / "key").write_text("k", encoding="ascii")
    with serving("--capacity", "2", "--log-format", "json", "--api-key", str(tmp_path / "key")) as process:
        place = process.urls[0].removeprefix("http://")
        for _ in range(4):
            for junk in JUNK:
                with socket.create_connection(place.split(":"), PATIENCE_S) as plain, contextlib.suppress(OSError):
                    plain.settimeout(0.5)
                    plain.sendall(junk)
                    assert not plain.recv(1000).startswith(b"HTTP/1.1 2")
            with pytest.raises(InvalidStatus, match="401"), client_of(f"ws://{place}/stream"):
                pass
            with client_of(f"ws://{place}/stream?api_key=k") as client:
                client.websocket.socket.sendall(b"\x81\x82\0\0\0\0\xff\xff")  # not UTF-8
                assert client.close_code() in (1006, 1007)
        port = place.partition(":")[2]
        command = [sys.executable, "-m", "u2moe", "serve", "--log-format", "json", "--port", port]
        refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        process.send_signal(signal.SIGTERM)
        said = process.said + process.communicate(timeout=PATIENCE_S)[1]
    lines = [json.loads(line) for line in said.splitlines()]
    told = Counter(line["message"] for line in lines if line["level"] != "info")
    assert told
    assert set(told.values()) == {1}, told
    assert "ValueError" not in said
    (last,) = [json.loads(line) for line in refused.stderr.splitlines()][-1:]
    assert (refused.returncode, last["logger"]) == (1, "stderr")
    assert f"cannot listen on 127.0.0.1 port {port}" in last["message"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not have this limit")
def test_few_open_files_are_warned_of(serving):
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))"
    with serving("--capacity", "1", before=few) as process:
        assert "WARNING u2moe.server: only 272 connections at a time" in process.said
        assert "ulimit -Hn" in process.said


def test_libraries_leave_a_line_of_each_kind_in_a_minute(monkeypatch):
    """Lines are grouped by code location, since their text may quote a client."""
    now, seen = [0.0], []
    monkeypatch.setattr("u2moe.runtime.server.log.time", SimpleNamespace(monotonic=lambda: now[0]))
    library = logging.getLogger("u2moe-test-library")
    library.setLevel(logging.INFO)
    library.propagate = False
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    handler.addFilter(log._Rate().is_due)
    library.addHandler(handler)
    for now[0] in (0.0, 1.0, 59.0, 61.0):
        library.error("of a client: %s", now[0])
        library.info("not limited")
    last = "of a client: 61.0 (2 more since the last such line)"
    assert [line for line in seen if line != "not limited"] == ["of a client: 0.0", last]
    assert len(seen) == 6
    rate = log._Rate()
    assert [rate.more(kind) for kind in range(1000)].count("") == 100


def test_what_clients_do_is_counted_each_time_and_logged_once_in_a_while(monkeypatch, caplog):
    times = iter((100.0, 101.0, 159.0, 161.0, 162.0, 230.0, 230.0))
    monkeypatch.setattr("u2moe.runtime.server.log.time", SimpleNamespace(monotonic=lambda: next(times)))
    metrics = Metrics()
    for _ in range(6):
        metrics.refuse("full")
    metrics.fail(errors.IdleError("late"))
    assert (metrics.total("refusals", "full"), metrics.total("failures", "idle")) == (6, 1)
    full = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    refused = "refused a client: all slots are taken"
    since = "more since the last such line"
    assert full == [refused, f"{refused} (2 {since})", f"{refused} (1 {since})"]
    assert "read too little for too long" in caplog.text


def test_each_refusal_and_failure_has_words(caplog):
    metrics = Metrics()
    for reason in ("full", "stopping", "key", "origin"):
        metrics.refuse(reason)
    wrong = errors.RequestError("wrong"), errors.IdleError("late"), errors.TooLargeError("large"), AudioError("noise")
    for error in (*wrong, errors.RecognitionError("failed"), RuntimeError("a bug"), errors.StoppingError()):
        metrics.fail(error)
    kinds = ("request", "idle", "too_large", "recognition")
    assert [metrics.total("failures", kind) for kind in kinds] == [2, 1, 1, 2]
    assert len(caplog.records) == 8


@pytest.mark.parametrize(
    ("options", "is_warned"),
    [({"host": "127.0.0.1"}, False), ({"host": "0.0.0.0"}, True), ({"host": "0.0.0.0", "api_key": "k"}, False)],
)
def test_a_server_that_is_open_to_all_warns(options, is_warned, caplog):
    chosen = ServerOptions(port=0, **options)
    sockets = launch.open_sockets(chosen, contextlib.ExitStack())
    caplog.set_level("INFO")
    launch._log_addresses(chosen, sockets)
    assert f"listening at http://{chosen.host}:{sockets['http'].getsockname()[1]}/" in caplog.text
    assert ("it has no API key" in caplog.text) == is_warned
    sockets["http"].close()
