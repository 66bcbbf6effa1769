"""Log, metrics and documentation for operators, with examples of clients and deployment."""

import asyncio
import contextlib
import itertools
import json
import logging
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from dialects import PATIENCE_S
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus

from u2moe.runtime import Result, cli
from u2moe.runtime.errors import AudioError
from u2moe.runtime.server import errors, launch, log
from u2moe.runtime.server.log import LATENCY_BUCKETS, Metrics, shared_rows
from u2moe.runtime.server.models import REQUEST_OPTIONS
from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.server.protocols import PROTOCOLS as TABLE

FEW_FILES = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))"
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
LIFE = (
    ("INFO", "listening at http"), ("WARNING", "only 272 connections at a time: the limit on open files is low"),
    ("INFO", "loaded"), ("INFO", "ready: 1 live streams at a time"), ("WARNING", "all slots are taken"),
    ("WARNING", "violated the protocol"), ("WARNING", "sent or read too little"), ("INFO", "stopping"),
    ("INFO", "stopped"),
)  # fmt: skip


def test_the_life_of_a_server(serving, client_of, speech, talk, expected):
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
        live = talk.read_bytes()[:40] + bytes(4) + talk.read_bytes()[44:]  # as a recorder writes it while recording
        for content in (damaged, {"files": {"file": ("live.wav", live)}}):  # not logged
            httpx.post(f"http://{address}/v1/audio/transcriptions", trust_env=False, timeout=PATIENCE_S, **content)
        for messages in (["secret-text"], []):
            code = 1013
            while code == 1013:  # until the slot of the client before is free
                with client_of(url) as client:
                    for message in messages:
                        client.send(message)
                    code = client.close_code()
            assert code == 1008
        process.send_signal(signal.SIGTERM)
        said = process.said + process.communicate(timeout=PATIENCE_S)[1]
    first, *rest = said.splitlines()
    assert first.startswith("demo model")  # from the command; a bundle suppresses it
    assert len(rest) == len(LIFE), said
    for line, (level, part) in zip(rest, LIFE, strict=True):
        assert re.fullmatch(rf"{TIME} {level} u2moe\.server: .*{re.escape(part)}.*", line), said
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
    options = ("--capacity", "2", "--log-format", "json", "--api-key", tmp_path / "key")
    with serving(*options, early=signal.SIGHUP) as process:
        process.read_to("reloaded keys")
        process.send_signal(signal.SIGHUP)
        process.read_to("reloaded keys")
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


def test_incidents_are_counted_and_each_kind_has_a_line_once_a_minute_also_of_libraries(monkeypatch, caplog):
    """Lines of libraries are grouped by code location, since their text may quote a client."""
    now, seen, library, handler = [100.0], [], logging.getLogger("u2moe-test-library"), logging.Handler()
    monkeypatch.setattr("u2moe.runtime.server.log.time", SimpleNamespace(monotonic=lambda: now[0]))
    library.setLevel(logging.INFO)
    library.propagate = False
    handler.emit = lambda record: seen.append(record.getMessage())
    handler.addFilter(log._Rate().is_due)
    library.addHandler(handler)
    metrics, rate = Metrics(), log._Rate()
    for now[0] in (100.0, 101.0, 159.0, 161.0, 162.0, 230.0):
        metrics.refuse("full")
        library.error("of a client: %s", now[0])
        library.info("not limited")
    counts = ["", " (2 more since the last such line)", " (1 more since the last such line)"]
    assert [each.getMessage().partition("all slots are taken")[2] for each in caplog.records] == counts
    at = 100.0, 161.0, 230.0
    assert seen.count("not limited") == 6
    limited = [line for line in seen if line != "not limited"]
    assert limited == [f"of a client: {time}{count}" for time, count in zip(at, counts, strict=True)]
    assert [rate.more(kind) for kind in range(1000)].count("") == 100
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


# -------------------- documentation

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
PROTOCOLS = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples" / "server"


def blocks_of(language):
    found = []
    for section in PROTOCOLS.split("\n## ")[1:]:
        heading = section.partition("\n")[0].strip("`")
        found += [(heading, code) for code in re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)]
    return found


@pytest.fixture
def adapted(server, speech, talk, tmp_path, monkeypatch):
    """Return a function that makes code of the page use the tests' server, in a folder with a recording."""
    shutil.copy(talk, tmp_path)
    (tmp_path / "talk.raw").write_bytes(speech().tobytes())
    monkeypatch.chdir(tmp_path)
    return lambda code: code.replace(":8000", f":{server.ports['http']}").replace("10300", f"{server.ports['wyoming']}")


def test_each_protocol_has_its_place_in_tables_and_an_example_also_with_curl(adapted, demo):
    for page, protocol in itertools.product((PROTOCOLS, GUIDE), TABLE.values()):
        rows = page.partition("| clients of | where |")[2].partition("\n\n")[0]
        place = f"--protocol {protocol.name}=PORT" if protocol.run_tcp else protocol.path or "/v1/audio/transcriptions"
        assert f"{place}`" in rows
    assert len({heading for heading, _ in blocks_of("python")}) == len(TABLE)
    ((_, command),) = blocks_of("bash")
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    done = subprocess.run(shlex.split(adapted(command)), capture_output=True, text=True, check=True)
    assert done.stdout.split() == demo.transcribe("talk.wav").text.split()


# Warnings of libraries when they are imported or connect.
@pytest.mark.filterwarnings("ignore:'audioop' is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:connect.* must be used as a context manager:DeprecationWarning")
@pytest.mark.parametrize(("heading", "code"), blocks_of("python"))
def test_the_examples_in_python(heading, code, adapted, speech, expected, demo, capsys):
    names = {}
    exec(compile(adapted(code), "docs/protocols.md", "exec"), names)
    said = capsys.readouterr().out
    if heading == "/stream":
        said = " ".join(asyncio.run(names["recognise"](speech())))
    wanted = demo.transcribe("talk.wav") if heading == "OpenAI, files" else expected()
    assert said.split() == wanted.text.split()


def test_the_example_in_javascript(adapted, expected, tmp_path):
    ((_, code),) = blocks_of("javascript")
    node = ["node", "--experimental-websocket"]
    if shutil.which("node") is None or subprocess.run([*node, "-v"], capture_output=True, check=False).returncode:
        pytest.skip("needs Node 20.10 or newer")
    use = """
    const bytes = require("fs").readFileSync("talk.raw");
    const samples = new Int16Array(bytes.buffer, bytes.byteOffset, bytes.length / 2);
    const blocks = [];
    for (let start = 0; start < samples.length; start += 1600) blocks.push(samples.slice(start, start + 1600));
    const partials = [];
    const show = (segments) => console.log(JSON.stringify({ segments, partials }));
    recognise(blocks, (text) => partials.push(text)).then(show);
    """
    (tmp_path / "example.js").write_text(adapted(code) + use, encoding="utf-8")
    done = subprocess.run([*node, "example.js"], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["segments"] == [segment.text for segment in expected().segments]
    assert found["partials"]


def test_the_guide_and_openapi_name_all_options_fields_and_metrics(server):
    rows = PROTOCOLS.partition("| field |")[2].partition("\n\n")[0].splitlines()
    fields = [name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(fields) == sorted(Result.__dataclass_fields__)
    metrics = set(re.findall(r"^# TYPE (\w+)", Metrics().text(), re.MULTILINE)) - {"u2moe_ready"}
    assert {f"`{name}`" for name in metrics} <= set(re.findall(r"`u2moe_\w+`", GUIDE))
    document = server.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method in operations:
            answer = server.get(path) if method == "get" else None
            assert answer is None or str(answer.status_code) in operations[method]["responses"], path
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert name in document["components"]["schemas"]
    form = document["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]["multipart/form-data"]
    properties = form["schema"]["properties"]
    assert {"file", "prompt", "response_format", "stream", *REQUEST_OPTIONS} < properties.keys()
    assert (properties["beam_size"]["minimum"], properties["beam_size"]["maximum"]) == (1, 40)


def test_the_image_its_healthcheck_and_the_systemd_unit(server, tmp_path):
    """The server is process 1, not the child of a shell that would swallow SIGTERM, and does not run as root."""
    text = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", "")
    stage = re.split(r"^FROM ", lines, flags=re.MULTILINE)[-1].partition("\n")[2]  # the last one
    found = dict(line.split(maxsplit=1) for line in stage.splitlines() if line)
    assert json.loads(found["ENTRYPOINT"]) == ["u2moe"]
    args = cli.parser(command := json.loads(found["CMD"])).parse_args(command)
    assert args.host == "0.0.0.0"
    assert found["EXPOSE"] == str(args.port)
    assert int(found["USER"]) > 0
    assert found["STOPSIGNAL"] == "SIGTERM"
    options, _, check = found["HEALTHCHECK"].partition(" CMD ")
    assert {option.partition("=")[0] for option in options.split()} == {"--start-period", "--interval", "--timeout"}
    check = json.loads(check)
    assert f"http://127.0.0.1:{args.port}/readyz" in check[-1]
    for url, is_well in ((server.url, True), ("http://127.0.0.1:9", False)):
        command = [sys.executable, check[1], check[2].replace("http://127.0.0.1:8000", url)]
        assert (subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0) == is_well
    unit = EXAMPLES / "u2moe.service"
    text = unit.read_text(encoding="utf-8")
    command = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1])
    args = cli.parser(command[1:]).parse_args(command[1:])
    assert (args.drain_s or ServerOptions().drain_s) < int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[1])
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    mine = tmp_path / unit.name
    mine.write_text(text.replace(command[0], "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(mine)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
