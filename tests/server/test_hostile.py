"""Malicious clients: the memory, time and log lines that they cost are bounded."""

import contextlib
import json
import logging
import socket
import struct
import sys
import time
from types import SimpleNamespace

import pytest
from damage import resident_mb
from dialects import PATIENCE_S, UPGRADE, WYOMING_AUDIO, wyoming_event

from u2moe.runtime.server import accounts
from u2moe.runtime.server.accounts import Connections

MEGABYTE = 1 << 20


def frame_of(num_bytes, num_sent):
    return b"\x82\xff" + struct.pack("!Q", num_bytes) + bytes(4) + bytes(num_sent)


def send_what_is_taken(plain, data):
    plain.settimeout(0.5)
    with contextlib.suppress(OSError):
        plain.sendall(data)


@pytest.fixture(scope="module")
def small(running):
    with running(capacity=1, protocol_ports={"wyoming": 0}) as server:
        yield server


def test_a_refused_websocket_discards_what_comes_and_is_sent_nothing_after_its_end(small):
    """Browsers treat data after the close frame as an error and hide the reason."""
    with small.connect() as client, contextlib.ExitStack() as stack:
        client.start()
        plain, *others = (stack.enter_context(small.open_plain()) for _ in range(13))
        plain.sendall(f"{UPGRADE}\r\n".encode())
        answer = b""
        while b"1 streams at a time" not in answer[answer.find(b"\x88") :]:
            answer += plain.recv(10_000)
        plain.settimeout(1)
        with contextlib.suppress(TimeoutError):
            answer += plain.recv(10_000)
        assert answer.endswith(b"1 streams at a time")
        before_mb, num_refused = resident_mb(), small.metric("refusals", "full")
        for plain in others:
            plain.sendall(f"{UPGRADE}\r\n".encode())
        small.wait_until(lambda: small.metric("refusals", "full") == num_refused + 12)
        for plain in others:
            send_what_is_taken(plain, frame_of(3 * MEGABYTE, 2 * MEGABYTE))
            plain.close()
        assert client.finish()[-1]["type"] == "done"
    small.wait_until(lambda: not small.server.connections.num_open)
    assert resident_mb() - before_mb < 12
    small.wait_until_empty()


def test_wyoming_reads_no_payload_but_audio(small):
    """It reads them neither without a slot nor for other events."""
    with small.connect() as client, small.open_plain("wyoming") as pinging, small.open_plain("wyoming") as speaking:
        client.start()
        for plain, kind in ((pinging, "ping"), (speaking, "audio-chunk")):
            send_what_is_taken(plain, wyoming_event(kind, WYOMING_AUDIO, bytes(3 * MEGABYTE)))
        assert b'"pong"' in pinging.recv(1000)
        assert b"the server is full" in b"".join(iter(lambda: speaking.recv(1000), b""))
        assert client.finish()[-1]["type"] == "done"
    small.wait_until_empty()


def test_names_are_built_with_a_place_and_limited_in_all(small, monkeypatch):
    built = []
    monkeypatch.setattr("u2moe.runtime.server.models.writable", lambda phrases, _: built.append(phrases) or [])
    names = [f"{number:04} {'A' * 180}" for number in range(1000)]
    data = json.dumps({"transcript_names": names}).encode()
    transcribe = wyoming_event("transcribe", data_length=len(data)) + data
    with small.connect() as client, small.open_plain("wyoming") as plain:
        client.start()
        plain.sendall(transcribe + wyoming_event("ping"))
        assert b'"pong"' in plain.recv(1000)
        plain.sendall(wyoming_event("audio-chunk", WYOMING_AUDIO, bytes(2)))
        assert b"the server is full" in b"".join(iter(lambda: plain.recv(1000), b""))
        assert not built
    small.wait_until_empty()
    request = transcribe + wyoming_event("audio-chunk", WYOMING_AUDIO, bytes(2)) + wyoming_event("audio-stop")
    assert b'"transcript"' in small.answer(request, "wyoming")
    assert sum(map(len, built[0])) <= 30_000
    assert len(built[0]) > 100
    with small.connect() as client:
        client.tell(hotwords=names)
        assert "30000 characters in total, got" in client.rest()[0]
    small.wait_until_empty()


def test_a_frame_is_no_longer_than_a_protocol_needs(small, caplog):
    """The first ones come with the handshake, from clients that do not wait for the response."""
    before = small.metric("failures", "recognition")
    others = [small.open_plain() for _ in range(8)]
    for plain in others:
        send_what_is_taken(plain, f"{UPGRADE}\r\n".encode() + frame_of(16 * MEGABYTE, MEGABYTE))
    for plain in others:
        with contextlib.suppress(ConnectionError):
            plain.recv(1)  # an answer or the end
        plain.close()
    small.wait_until_empty()
    for frame in (frame_of(5 * MEGABYTE, 0), b"\x81\xff" + struct.pack("!Q", 2 * MEGABYTE) + bytes(4 + 2 * MEGABYTE)):
        with small.connect() as client:
            client.websocket.socket.sendall(frame)
            assert client.close_code() == 1009
        small.wait_until_empty()
    assert small.metric("failures", "recognition") == before
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


class Peer:
    def __init__(self, *address):
        self.getpeername = lambda: address


def test_who_connects_again_and_again_waits_for_what_that_costs():
    connections = Connections(1000, is_proxy=lambda peer: str(peer) == "10.0.0.9")

    def waits(address):
        """Yield the waits of connections that cost 50 ms each, until one is refused."""
        for port in range(60):
            if (visit := connections.enter(Peer(address, port))) is None:
                return
            now = time.monotonic()
            yield visit.wait_s(now)
            visit.charge(0.05, now)
            visit.leave()

    waited = list(waits("10.0.0.1"))
    assert waited[:9] == [0.0] * 9  # half a second of processor time in advance
    assert waited == sorted(waited)
    assert 9 < waited[-1] <= 10
    assert next(waits("::ffff:10.0.0.1"), None) is None  # the same address; it would wait too long
    assert [*waits("10.0.0.2")][:9] == waited[:9]
    assert max(waits("10.0.0.9")) == 0.0
    for address in ("127.0.0.1", "::1"):  # this machine also waits, but later, and is never refused
        waited = list(waits(address))
        assert len(waited) == 60
        assert max(waited[:19]) == 0.0
        assert 5 < waited[-1] < 9
    assert connections.num_open == 0


def test_who_takes_more_than_a_share_waits_for_the_others_who_do():
    connections = Connections(1000)
    speaker, *greedy = (connections.enter(Peer("10.0.0.1", port)) for port in range(4))
    slots = contextlib.ExitStack()
    for visit in (speaker, *greedy):
        slots.enter_context(visit.place())
    now = time.monotonic() + 1
    for _ in range(100):
        for visit in greedy:
            visit.charge(0.002, now)
        speaker.charge(0.0001, now)
    assert connections.together.wait_s(now) > 5  # 0.3 s, at 5 % of a core
    assert [visit.wait_s(now) > 1 for visit in (speaker, *greedy)] == [False, True, True, True]  # 2 ms, at 0.1 %
    assert speaker.wait_s(now) == 0.0
    speaker.charge(0.0905, now)
    assert 0.4 < speaker.wait_s(now) < 0.6  # only because of its own debt
    speaker.earn(1.0)
    assert speaker.wait_s(now) == 0.0
    speaker.charge(0.02, now)
    speaker.earn(1.0)  # audio faster than real time earns nothing more
    assert 0.4 < speaker.wait_s(now) < 0.6
    assert connections.enter(Peer("10.0.0.1", 9)).wait_s(now) == 0.0  # slots cost the address nothing
    slots.close()  # the address is charged when a slot is released
    greedy[0].charge(0.3, now)
    assert connections.enter(Peer("10.0.0.1", 9)).wait_s(now) > 0.5


def test_nobody_pays_for_time_in_which_others_had_the_processor(monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 10.0, thread_time=lambda: 3.0)
    monkeypatch.setattr(accounts, "time", clock)
    connections = Connections(1000)
    connections.looked_s = 3.0
    assert connections.since(9.9995) == pytest.approx(0.0005)
    clock.thread_time = lambda: 3.004
    assert connections.since(9.9) == pytest.approx(0.004)  # out of 0.1 s
    assert connections.since(9.9) == 0.0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have only one loopback address")
def test_an_address_in_debt_is_served_once_it_has_paid(server):
    begin = time.monotonic()
    server.server.connections.enter(Peer("127.0.0.2", 0)).charge(0.52, begin)
    place = ("127.0.0.1", server.ports["http"])
    with socket.create_connection(place, PATIENCE_S, source_address=("127.0.0.2", 0)) as plain:
        plain.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert plain.recv(100).startswith(b"HTTP/1.1 200 ")
    assert time.monotonic() - begin > 0.4  # 20 ms of processor time, at 5 % of a core


def test_connections_are_limited_in_all_and_by_address():
    connections = Connections(4, is_proxy=lambda peer: str(peer) == "10.0.0.9")
    first = [connections.enter(Peer("10.0.0.1", port)) for port in range(3)]
    assert [visit is not None for visit in first] == [True, True, False]
    first[0].leave()
    first[0].leave()
    assert connections.enter(Peer("10.0.0.1", 4)) is not None
    site = [connections.enter(Peer("2001:db8::1", port)) for port in range(2)]
    assert all(site)
    assert connections.enter(Peer("10.0.0.9", 1)) is None  # no connections are left
    site[0].leave()
    assert connections.enter(Peer("2001:db8::2", 1)) is not None
    proxy = Connections(4, is_proxy=lambda peer: str(peer) == "10.0.0.9")
    assert all(proxy.enter(Peer("10.0.0.9", port)) for port in range(4))


def test_too_many_connections_are_closed_with_one_line(running, caplog):
    with running() as server:
        server.server.connections.limit = 10
        server.server.connections._most_of_one = 5
        silent = [server.open_plain() for _ in range(20)]
        server.wait_until(lambda: server.metric("refusals", "connections") == 15)
        silent[-1].settimeout(PATIENCE_S)
        assert silent[-1].recv(1) == b""
        assert sum("too many" in record.getMessage() for record in caplog.records) == 1
        for plain in silent:
            plain.close()
        server.wait_until(lambda: server.get("/healthz").status_code == 200)
