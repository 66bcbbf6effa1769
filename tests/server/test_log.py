"""Log and metrics, which operators read."""

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
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus

from u2moe.runtime.errors import AudioError
from u2moe.runtime.server import errors, launch, log
from u2moe.runtime.server.log import LATENCY_BUCKETS, Metrics, shared_rows
from u2moe.runtime.server.options import ServerOptions

PATIENCE_S = 120
FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) u2moe\.server: (.+)")
LIFE = (
    ("INFO", "listening at http"), ("WARNING", "only 272 connections at a time: the limit on open files is low"),
    ("INFO", "loaded"), ("INFO", "ready: 1 live streams at a time"), ("WARNING", "all slots are taken"),
    ("WARNING", "violated the protocol"), ("WARNING", "sent or read too little"), ("INFO", "stopping"),
    ("INFO", "stopped"),
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


def without_length(samples):
    """Return a WAV file without a length, as a recorder writes it while recording."""
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format="WAV")
    data = bytearray(file.getvalue())
    data[40:44] = bytes(4)
    return bytes(data)


def test_the_life_of_a_server(serving, client_of, speech, expected):
    with serving("--capacity", "1", "--idle-timeout", "3", before=FEW_FILES) as process:
        address = process.urls[0].removeprefix("http://")
        url = f"ws://{address}/stream?api_key=secret-key"
        with client_of(url) as client:
            client.start(hotwords=["seventy"])
            for _ in range(3):
                with client_of(url) as refused:
                    assert refused.close_code() == 1013
            client.play(speech())
            client.finish()
        damaged = {"content": b"--x\r\nno", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
        for content in (damaged, {"files": {"file": ("live.wav", without_length(speech()))}}):  # not logged
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
    last = json.loads(refused.stderr.splitlines()[-1])
    assert (refused.returncode, last["logger"]) == (1, "stderr")
    assert f"cannot listen on 127.0.0.1 port {port}" in last["message"]


def test_libraries_leave_a_line_of_each_kind_in_a_minute(monkeypatch):
    """Lines are grouped by code location, since their text may quote a client."""
    now, seen = [0.0], []
    monkeypatch.setattr("u2moe.runtime.server.log.time", SimpleNamespace(monotonic=lambda: now[0]))
    library, handler = logging.getLogger("u2moe-test-library"), logging.Handler()
    library.setLevel(logging.INFO)
    library.propagate = False
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


def test_each_incident_is_counted_and_has_a_line_once_in_a_while(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("u2moe.runtime.server.log.time", SimpleNamespace(monotonic=lambda: now[0]))
    metrics = Metrics()
    for now[0] in (100.0, 101.0, 159.0, 161.0, 162.0, 230.0):
        metrics.refuse("full")
    refused = "refused a client: all slots are taken"
    more = " more since the last such line)"
    assert [each.getMessage() for each in caplog.records] == [refused, f"{refused} (2{more}", f"{refused} (1{more}"]
    for reason in ("stopping", "key", "origin"):
        metrics.refuse(reason)
    wrong = errors.RequestError("wrong"), errors.IdleError("late"), errors.TooLargeError("large"), AudioError("noise")
    for error in (*wrong, errors.RecognitionError("failed"), RuntimeError("a bug"), errors.StoppingError()):
        metrics.fail(error)
    kinds = ("request", "idle", "too_large", "recognition")
    assert [metrics.total("failures", kind) for kind in kinds] == [2, 1, 1, 2]
    assert metrics.total("refusals", "full") == 6
    assert len(caplog.records) == 3 + 3 + len(kinds)
    assert "read too little for too long" in caplog.text


@pytest.mark.parametrize(("host", "key", "is_warned"), [
    ("127.0.0.1", None, False), ("0.0.0.0", None, True), ("0.0.0.0", "k", False)
])  # fmt: skip
def test_a_server_that_is_open_to_all_warns(host, key, is_warned, caplog):
    sockets = launch.open_sockets(options := ServerOptions(port=0, host=host, api_key=key), contextlib.ExitStack())
    caplog.set_level("INFO")
    launch._log_addresses(options, sockets)
    assert f"listening at http://{host}:{sockets['http'].getsockname()[1]}/" in caplog.text
    assert ("it has no API key" in caplog.text) == is_warned
    sockets["http"].close()


METRIC = re.compile(r'^[a-z0-9_]+(\{[a-z]+="[^"]*"\})? -?[0-9.e+-]+$')


def values(text):
    """Return the values of metrics in Prometheus' text format."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(METRIC.match(line) for line in lines), lines
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_of_a_stream(running, speech, expected):
    with running(capacity=7) as server:
        assert values(server.get("/metrics").text)["u2moe_ready"] == 1
        with server.connect() as client:
            client.start()
            client.play(speech())
            events = client.finish()
            assert values(server.get("/metrics").text)["u2moe_streams"] in (0, 1)
        server.wait_until_empty()
        found = values(server.get("/metrics").text)
    assert found["u2moe_capacity"] == 7
    assert found['u2moe_connections_total{protocol="stream"}'] == 1
    assert found['u2moe_audio_seconds_total{source="stream"}'] == pytest.approx(len(speech()) / 16_000)
    assert found["u2moe_real_time_factor"] > 0
    assert found["u2moe_queue_seconds"] == found["u2moe_streams"] == 0
    assert found['u2moe_results_total{kind="final"}'] == len(expected().segments)
    partials = sum(event["type"] == "partial" for event in events)
    assert found['u2moe_results_total{kind="partial"}'] >= partials > 0  # some may have been replaced by later ones
    for name in ("u2moe_partial_latency_seconds", "u2moe_final_latency_seconds"):
        assert found[f'{name}_bucket{{le="+Inf"}}'] == found[f"{name}_count"] > 0
        assert found[f"{name}_sum"] > 0


@given(st.lists(st.floats(0, 20), max_size=30))
def test_a_histogram_is_cumulative(latencies):
    metrics = Metrics()
    for latency in latencies:
        metrics.observe("final_latency_seconds", latency)
    found = values(metrics.text())
    for bound in LATENCY_BUCKETS:
        wanted = sum(latency <= bound for latency in latencies)
        assert found[f'u2moe_final_latency_seconds_bucket{{le="{bound}"}}'] == wanted
    assert found["u2moe_final_latency_seconds_count"] == len(latencies)
    assert found["u2moe_final_latency_seconds_sum"] == pytest.approx(sum(latencies), abs=1e-5)


def test_metrics_of_workers_are_summed():
    rows = shared_rows(3)
    workers = [Metrics((), rows, worker) for worker in range(3)]
    for number, metrics in enumerate(workers, start=1):
        metrics.count("audio_seconds", "file", number)
        metrics.set("capacity", 10)
    assert values(workers[0].text())['u2moe_audio_seconds_total{source="file"}'] == 6
    assert workers[2].total("capacity") == 30
