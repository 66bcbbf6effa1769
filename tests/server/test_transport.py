"""Connections: invalid requests, clients that vanish or do not send, and accounting of processor time."""

import ast
import asyncio
import contextlib
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import websockets
from dialects import PATIENCE_S, UPGRADE, upload, wyoming_event

from u2moe.runtime import server as server_package
from u2moe.runtime.bundle_location import DEMO_FOLDER
from u2moe.runtime.decoding.context import ContextGraph
from u2moe.runtime.server import accounts, log
from u2moe.runtime.server.launch import open_sockets
from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.server.transport import PacedConnection
from u2moe.runtime.text.grammar import Grammar

BEYOND = (
    "Content-Length: 5\r\n\r\nhello",
    "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",  # a body
    "".join(f"X-{number}: a\r\n" for number in range(130)) + "\r\n",
    f"X-Long: {'a' * 9000}\r\n\r\n",
)
TOO_LONG = 431 if int(websockets.__version__.split(".")[0]) >= 17 else 400  # answer to headers beyond the limits
POST = (
    "POST /v1/audio/transcriptions HTTP/{version}\r\nHost: localhost\r\nContent-Length: {length}\r\n"
    "Content-Type: multipart/form-data; boundary=x{more}\r\n\r\n"
)
CHUNKED = POST.format(version="1.1", length=9, more="").replace("Content-Length: 9", "Transfer-Encoding: chunked")


@pytest.mark.parametrize(("decoding_s", "least_s", "most_s"), [(0.0, 0.0, 0.05), (0.06, 0.06, 0.1), (9.0, 0.1, 0.5)])
def test_clients_in_debt_wait_for_decoding_but_not_for_long(decoding_s, least_s, most_s):
    """The clock is the test's own, so that a busy machine changes nothing."""

    class Loop(asyncio.SelectorEventLoop):
        now = 0.0

        def time(self):
            Loop.now += 1e-4
            return Loop.now

    async def wait():
        loop, passed_on = asyncio.get_running_loop(), asyncio.Queue()
        visit = accounts.Connections(10).enter(SimpleNamespace(getpeername=lambda: ("10.0.0.1", 0)))
        visit.wait_s = lambda now: max(start - now, 0.0)
        connection = PacedConnection(visit, set(), lambda _: None)
        connection.inner = SimpleNamespace(data_received=lambda data: passed_on.put_nowait((data, loop.time())))
        connection._transport = SimpleNamespace(pause_reading=lambda: None, resume_reading=lambda: None)
        start = loop.time() + 0.01  # the client's debt ends then
        visit.connections.is_decoding = lambda: loop.time() < start + decoding_s
        connection.get_buffer(0)[:1] = b"G"
        connection.buffer_updated(1)
        assert passed_on.empty()
        data, then = await passed_on.get()
        assert data == b"G"
        assert least_s <= then - start <= most_s

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(wait())


@pytest.mark.parametrize(("sent", "status", "told"), [
    *((UPGRADE + beyond, status, "") for beyond, status in zip(BEYOND, (400, 400, TOO_LONG, TOO_LONG), strict=True)),
    ("\x16\x03\x01\x02\0\x01\0", 400, ""),
    ("GET\r\n\r\n", 400, ""),
    ("GET / HTTP/1.1\r\nHost: localhost\r\nHost: b\r\n\r\n", 400, ""),
    (CHUNKED + "5\r\nhelloXX\r\n", 400, ""),
    (CHUNKED.replace("\r\n\r\n", "\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"), 400, "not both"),
    (POST.format(version="1.1", length=0, more="; charset=punycode"), 400, "a form must be UTF-8"),
    (POST.format(version="1.1", length=99_000_000_000, more=""), 413, ""),  # before anything is read
    (POST.format(version="1.1", length=99_000_000_000, more="\r\nExpect: 100-continue"), 413, ""),
    (UPGRADE + "Origin: http://elsewhere\r\n\r\n", 403, ""),
    (UPGRADE.replace("/stream", "/streams") + "\r\n", 404, "no protocol has this path"),
    ("GET http://localhost/healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 200, "ok"),
])  # fmt: skip
def test_what_is_odd_is_no_error_of_the_server(server, caplog, sent, status, told):
    num_open, num_failed = server.server.connections.num_open, server.metric("failures", "request")
    answer = server.answer(sent.encode()).decode()
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert told in answer
    server.wait_until(lambda: server.server.connections.num_open <= num_open)
    is_counted = sent.removeprefix(UPGRADE) in BEYOND
    server.wait_until(lambda: server.metric("failures", "request") > num_failed or not is_counted)
    assert not [each for each in caplog.records if each.levelname == "ERROR" or "internal error" in each.getMessage()]


def test_a_connection_is_a_whole_transport_and_leaves_a_lost_one_of_tls_alone():
    """A TLS transport that is closed twice fails, and a lost one has no socket and no reading state."""

    async def lose(is_lost):
        closed = []

        def close():
            assert not closed
            closed.append(True)

        def read():
            assert not closed

        names = "get_extra_info", "get_write_buffer_size", "is_reading", "pause_reading", "resume_reading"
        state = dict.fromkeys((*names, "set_write_buffer_limits"), read)
        state |= {"is_closing": lambda: bool(closed), "can_write_eof": lambda: False}
        transport = SimpleNamespace(close=close, abort=close, **state)
        visit = accounts.Connections(10).enter(SimpleNamespace(getpeername=lambda: ("10.0.0.1", 0)))
        connection = PacedConnection(visit, set(), lambda _: None)
        connection.inner = asyncio.Protocol()
        connection.connection_made(transport)
        never_called = {"get_protocol", "get_write_buffer_limits", "write_eof", "writelines"}  # by inner protocols
        assert {name for name in dir(asyncio.Transport) if name[0] != "_"} - never_called <= set(dir(connection))
        connection.pause_reading()
        connection.get_buffer(0)[:5] = b"GET /"
        connection.buffer_updated(5)
        connection.eof_received()
        close() if is_lost else connection.close()
        if is_lost:
            connection.connection_lost(None)
        connection.resume_reading()
        await asyncio.sleep(0.01)
        connection.check(time.monotonic())

    for is_lost in (False, True):
        asyncio.run(lose(is_lost))


def test_who_sends_no_more_still_gets_the_answer_of_a_stopping_server(running, held):
    clip = DEMO_FOLDER / "clips" / "command.flac"
    body = upload(clip.read_bytes())

    def ask(version):
        with server.open_plain() as plain:
            plain.sendall(POST.format(version=version, length=len(body), more="").encode() + body)
            plain.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: plain.recv(10_000), b""))

    with running(held, drain_s=PATIENCE_S) as server, ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask, version) for version in ("1.1", "1.0")]
        assert held.is_held.wait(PATIENCE_S)
        server.wait_until(lambda: server.metric("files") == len(answers))
        server.stop()
        time.sleep(1.5)  # connections are checked once a second
        held.release()
        for answer in answers:
            assert f'"{held.transcribe(clip).text}"'.encode() in answer.result()
            assert b"HTTP/1.1 200 OK" in answer.result()


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_who_sends_no_more_gets_the_answers_of_all_requests(server, pause_s):
    body = upload((DEMO_FOLDER / "clips" / "command.flac").read_bytes())
    post = POST.format(version="1.1", length=len(body), more="").encode() + body
    for request in (post, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with server.open_plain() as plain:
            plain.sendall(request * 5)
            time.sleep(pause_s)
            plain.shutdown(socket.SHUT_WR)
            assert b"".join(iter(lambda: plain.recv(10_000), b"")).count(b"HTTP/1.1 200 OK") == 5


def test_who_sends_no_more_and_reads_slowly_gets_the_whole_answer(server):
    def read(is_half_closed):
        with server.open_plain() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
            plain.sendall(b"GET /u2moe/core.wasm HTTP/1.1\r\nHost: localhost\r\n\r\n" * 11)
            plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            if is_half_closed:
                plain.shutdown(socket.SHUT_WR)
                time.sleep(2.5)  # connections are checked once a second
            return b"".join(iter(lambda: plain.recv(1 << 20), b""))

    assert read(is_half_closed=True).count(b"HTTP/1.1 200 OK") == read(is_half_closed=False).count(b"HTTP/1.1 200 OK")
    assert server.server._config.timeout_keep_alive > 30  # uvicorn would close connections whose data must wait


def test_who_sends_no_more_is_not_kept_after_an_error(server, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.transport._CLOSE_S", 1000.0)
    close = PacedConnection.close

    def close_later(connection):  # when the end has been read
        connection._loop.call_later(0.1, close, connection)

    monkeypatch.setattr(PacedConnection, "close", close_later)
    before = set(server.server.served)  # of other tests
    with server.open_plain("wyoming") as plain:
        plain.sendall(wyoming_event("audio-stop"))
        plain.shutdown(socket.SHUT_WR)
        assert b"expected audio" in b"".join(iter(lambda: plain.recv(10_000), b""))
    server.wait_until(lambda: set(server.server.served) <= before)


def test_a_response_is_not_copied_for_who_does_not_read(server):
    with server.open_plain() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 15)
        plain.sendall(b"GET /u2moe/core.wasm HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")

        def unread():
            return [each for each in server.server.served if each._unread]

        server.wait_until(unread)
        assert all(each._transport.get_write_buffer_size() < 128 << 10 for each in unread())
        _, _, content = b"".join(iter(lambda: plain.recv(100_000), b"")).partition(b"\r\n\r\n")
    assert content == server.get("/u2moe/core.wasm").content


def test_connections_answer_at_once_and_a_mistake_of_ours_is_logged(server, caplog, monkeypatch):
    """asyncio sends small answers without delay only if the socket names TCP."""
    with contextlib.ExitStack() as opened:
        assert open_sockets(ServerOptions(port=0), opened)["http"].proto == socket.IPPROTO_TCP
    monkeypatch.setattr(server.service.metrics, "_rate", log._Rate())
    monkeypatch.setattr(server.service.metrics, "text", lambda: 1 / 0)
    assert server.get("/metrics").status_code == 500
    server.wait_until(lambda: any("internal error in a request" in each.getMessage() for each in caplog.records))


def test_pongs_that_nobody_reads_are_not_kept(server):
    with server.open_plain() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.sendall((UPGRADE + "\r\n").encode())
        assert plain.recv(1000).startswith(b"HTTP/1.1 101 ")
        plain.settimeout(1.0)
        pings = (b"\x89\xfd" + bytes(4 + 125)) * 1000
        num_sent = 0
        with contextlib.suppress(TimeoutError):
            while num_sent < 500:
                plain.sendall(pings)
                num_sent += 1
        (connection,) = server.server.served
        assert connection._transport.get_write_buffer_size() < 256 << 10
    assert num_sent < 50
    server.wait_until_empty()


def test_fragments_without_end_are_ended(server, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.transport._MOST_OPEN_S", 0.02)
    with server.connect() as client:
        client.start()
        with contextlib.suppress(OSError):
            client.websocket.socket.sendall(b"\x02\x81\0\0\0\0a" + b"\x00\x81\0\0\0\0a" * 300_000)
        assert client.close_code() in (1006, None)
    server.wait_until_empty()


def test_connections_that_end_before_their_first_step_are_closed(server):
    """They were accepted in the turn of the event loop in which the server stops."""
    accepted, ended = [], threading.Event()

    def take_and_cancel():
        for speaks in ("http", "wyoming"):
            here, there = socket.socketpair()
            accepted.append((here, there))
            before = set(server.server._tasks)
            server.server._take(speaks, here)
            (begun,) = server.server._tasks - before
            begun.cancel()
            begun.add_done_callback(lambda _: ended.set())

    server.wait_until(lambda: not server.server.served)
    num_open = server.server.connections.num_open
    server.service.scheduler._loop.call_soon_threadsafe(take_and_cancel)
    assert ended.wait(PATIENCE_S)
    server.wait_until(lambda: all(here.fileno() == -1 for here, _ in accepted))
    assert [there.recv(1) for _, there in accepted] == [b"", b""]
    server.wait_until(lambda: server.server.connections.num_open == num_open)
    for _, there in accepted:
        there.close()


def test_wyoming_holds_little_before_there_is_a_place(running, monkeypatch):
    monkeypatch.setattr("u2moe.runtime.server.service._MOST_HELD", 300_000)
    with running(protocol_ports={"wyoming": 0}) as server:
        half = wyoming_event("transcribe", data_length=200_000) + bytes(100)
        with server.open_plain("wyoming") as first, server.open_plain("wyoming") as second:
            first.sendall(half)
            server.wait_until(lambda: server.service._num_held == 200_000)
            second.sendall(half)
            assert b"clients are sending too much data" in second.recv(10_000)
        server.wait_until(lambda: server.service._num_held == 0)


def test_a_stream_takes_as_many_places_as_it_costs(running, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("alice key-of-alice 5\nbob key-of-bob\n", encoding="utf-8")
    dear = {"beam_size": 40, "hotwords": ["SEVEN"]}
    with running(capacity=8, keys_file=keys) as server:
        model = server.service.default
        assert len(model.costs) == 4
        assert min(model.costs) >= 1
        model.costs, model.beam_size = (1.0, 2.0, 1.5, 6.0), 10
        assert model.cost(model.stream_options, None) == 1
        assert model.cost(replace(model.stream_options, grammar=Grammar(lines=["SEVEN"])), None) == 1.5
        path = "/stream?api_key=key-of-bob"
        with server.connect(path) as client:
            client.start(**dear)
            assert server.metric("streams") == 6
            with server.connect(path) as another:
                another.tell(hotwords=["SEVEN"], beam_size=25)
                refusal = another.receive()
                assert refusal["code"] == 1013
                assert "this one costs as much as 3.8" in refusal["message"]
            with server.connect(path) as plain, server.connect(path) as other:
                plain.start()
                other.start()
                with server.connect(path) as late:
                    assert late.close_code() == 1013
        server.wait_until_empty()
        with server.connect("/stream?api_key=key-of-alice") as client:
            client.start(**dear)
            assert server.metric("streams") == 6
            with server.connect("/stream?api_key=key-of-alice") as another:
                assert "the key alice allows 5 streams" in another.receive()["message"]


@pytest.mark.parametrize(("kind", "least_s"), [("thread", 0.2), ("request", 0.2), ("headers", 0.01)])
def test_what_is_done_for_a_client_is_charged_to_it(server, monkeypatch, kind, least_s):
    """Hotwords are built in a thread; the client of a file is determined in a step of the request's task; headers are
    expensive to parse, on one persistent connection."""
    charged = []
    charge = accounts.Visit.charge
    monkeypatch.setattr(accounts.Visit, "charge", lambda *given: (charged.append(given[1]), charge(*given))[1])

    def burn(*_):
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass
        return ""

    if kind == "thread":
        monkeypatch.setattr("u2moe.runtime.server.models.ContextGraph", lambda *given: burn() or ContextGraph(*given))
        with server.connect() as client:
            client.start(hotwords=["SEVEN"])
    elif kind == "request":
        monkeypatch.setattr(server.service, "client_of", burn)
        assert server.post(files={"file": b"RIFF"}).status_code == 400
    else:
        request = b"GET /healthz?%b HTTP/1.1\r\nHost: localhost\r\n%b\r\n" % (b"a=b&" * 1000, b"X: y\r\n" * 1500)
        with server.open_plain() as plain:
            for _ in range(20):
                plain.sendall(request)
                while not plain.recv(10_000).endswith(b"ok\n"):
                    pass
    assert sum(charged) >= least_s


def test_only_public_names_of_the_servers_below_are_used():
    """Any version from the minimum on should then work. The tests run with the newest one."""
    for file in Path(server_package.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                name = f"{module}{alias.name}"
                if name.split(".", maxsplit=1)[0] in ("uvicorn", "websockets", "h11", "asyncio"):
                    assert name in ("uvicorn", "asyncio"), f"{file}: {name}"
    needed = metadata("u2moe").get_all("Requires-Dist")
    of_server = [each for each in needed if re.match(r"(uvicorn|websockets|h11|starlette|python-multipart)\b", each)]
    assert of_server
    assert not [each for each in of_server if "<" in each or "==" in each.partition(";")[0]]
