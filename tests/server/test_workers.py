"""Several worker processes behind one port."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from u2moe.runtime.server import launch as workers_module
from u2moe.runtime.server.log import Metrics, shared_rows
from u2moe.runtime.server.server import have_others_room

PATIENCE_S = 120


@pytest.fixture(scope="module")
def team(serving):
    """Return a server with two workers of one stream each."""
    with serving("--workers", "2", "--capacity", "1", "--protocol", "vosk=0", "--protocol", "wyoming=0") as process:
        process.ports = [int(url.rpartition(":")[2]) for url in process.urls]
        yield process


def metric(team, name):
    text = httpx.get(f"{team.urls[0]}/metrics", trust_env=False, timeout=PATIENCE_S).text
    return float(re.search(rf"^u2moe_{name} (\S+)$", text, re.MULTILINE)[1])


def wait_until(holds):
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(team):
    """Return the worker processes. There may also be a child that tracks shared memory."""
    children = Path(f"/proc/{team.pid}/task/{team.pid}/children").read_text(encoding="utf-8").split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def connect(team, client_of, stack, path="/stream"):
    return stack.enter_context(client_of(f"ws://127.0.0.1:{team.ports[0]}{path}"))


def test_the_one_with_room_gets_the_next(team, client_of, speech, expected):
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            first, second = (connect(team, client_of, stack) for _ in range(2))
            for client in (first, second):
                client.start(partials=False)
            assert (metric(team, "streams"), metric(team, "capacity")) == (2, 2)
            assert connect(team, client_of, stack).close_code() == 1013
            for client in (first, second):
                client.play(speech())
                texts = [event["text"] for event in client.finish() if event["type"] == "final"]
                assert texts == [segment.text for segment in expected().segments]
        wait_until(lambda: metric(team, "streams") == 0)


def test_every_port_leads_to_the_workers(team, client_of):
    _, vosk_port, wyoming_port = team.ports
    with client_of(f"ws://127.0.0.1:{vosk_port}/") as client:
        client.send('{"eof" : 1}')
        assert client.receive() == {"text": ""}

    async def ping():
        reader, writer = await asyncio.open_connection("127.0.0.1", wyoming_port)
        writer.write(b'{"type": "ping"}\n')
        answer = await reader.readline()
        writer.close()
        return answer

    assert b'"pong"' in asyncio.run(ping())


def test_one_that_dies_is_replaced_and_all_stop_together(team, client_of, speech):
    before = workers_of(team)
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: len(set(workers_of(team)) - {before[0]}) == 2)
    wait_until(lambda: metric(team, "ready") == 2)
    with contextlib.ExitStack() as stack:
        clients = [connect(team, client_of, stack) for _ in range(2)]
        for client in clients:
            client.start()
            client.play(speech()[:24_000])
            while not client.receive()["text"]:
                pass
        team.send_signal(signal.SIGTERM)
        for client in clients:
            client.play(speech()[24_000:])
            assert "final" in {event["type"] for event in client.receive_until("done")}
            assert client.close_code() == 1001
    assert team.wait(PATIENCE_S) == 0


def test_one_that_stands_still_is_replaced(serving):
    """It is stopped while it has a stream, and gets no connections until it is killed."""
    before = "from u2moe.runtime.server import launch; launch.SILENT_S = 4"
    with serving("--workers", "2", "--capacity", "2", before=before) as process:
        workers = workers_of(process)
        os.kill(workers[0], signal.SIGSTOP)
        while "does not respond" not in process.stderr.readline():
            assert process.poll() is None
        for _ in range(4):
            answer = httpx.get(f"{process.urls[0]}/healthz", trust_env=False, timeout=PATIENCE_S)
            assert answer.status_code == 200
        wait_until(lambda: len(set(workers_of(process)) - {workers[0]}) == 2)
        wait_until(lambda: metric(process, "ready") == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


def test_a_replaced_worker_that_still_starts_is_no_failure_at_the_end(serving):
    with serving("--workers", "2", "--capacity", "1") as process:
        os.kill(workers_of(process)[0], signal.SIGKILL)
        while "restarting it" not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()
        assert process.wait(PATIENCE_S) == 0


class Ended:
    """A worker that exits as soon as it is started."""

    exitcode, pid = 1, None


def test_workers_that_never_become_ready_are_started_ever_more_seldom(monkeypatch):
    now, started = [1000.0], []
    monkeypatch.setattr(workers_module, "time", type("Time", (), {"monotonic": lambda: now[0]}))
    team = workers_module.Team(1, lambda *_: None)
    team._was_ready, team._processes = True, [Ended()]

    def start(number):
        team._start_times[number] = now[0]
        started.append(now[0])
        return Ended()

    monkeypatch.setattr(team, "_start", start)
    for _ in range(3000):
        now[0] += 0.1
        team._look_after()
    gaps = np.diff(started)
    assert 7 < len(started) < 12
    assert gaps[0] < 3
    assert max(gaps) == pytest.approx(60, abs=1)


def test_a_second_signal_ends_all_at_once(serving, client_of, speech):
    with serving("--workers", "2", "--capacity", "1") as process:
        with client_of(f"{process.urls[0].replace('http', 'ws')}/stream") as client:
            client.start()
            client.play(speech()[:24_000])
            while not client.receive()["text"]:
                pass
            workers = workers_of(process)
            process.send_signal(signal.SIGTERM)
            while "stopping 2 workers" not in process.stderr.readline():
                assert process.poll() is None
            time.sleep(0.6)  # earlier it would count as the same signal
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
            wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
        assert "stopped at once" in process.stderr.read()


def test_connections_are_left_to_those_with_clearly_more_room():
    rows = shared_rows(2)
    one, other = (Metrics(rows=rows, worker=number) for number in range(2))

    def is_left(**changes):
        """Return whether the first worker leaves a connection to the second, which is free except for `changes`."""
        free = {"ready": 1, "capacity": 10, "streams": 0, "newcomers": 0, "heartbeats": time.monotonic()}
        for name, value in {**free, **changes}.items():
            other.set(name, value)
        return have_others_room(one, 0)

    for name, value in {"ready": 1, "capacity": 10, "streams": 3, "heartbeats": time.monotonic() + PATIENCE_S}.items():
        one.set(name, value)
    assert is_left()
    assert not have_others_room(other, 1)
    assert not is_left(streams=1, newcomers=1)  # eight free slots instead of seven
    assert not is_left(ready=0)
    assert not is_left(heartbeats=time.monotonic() - 3)
    one.set("streams", 10)
    assert is_left(streams=9)
    assert not is_left(streams=10, newcomers=2)


def test_workers_end_with_the_process_that_started_them_or_end_it_without_a_start(serving, tmp_path):
    with serving("--workers", "2", "--capacity", "1") as process:
        workers = workers_of(process)
        assert len(workers) == 2
        process.kill()
        wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    command = [sys.executable, "-m", "u2moe", "serve", str(tmp_path), "--workers", "2", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1
    assert "before it was ready" in ended.stderr
    assert "Traceback" not in ended.stderr
