"""Several workers behind one port, and a Unix socket, directly and behind the proxies of docs/proxies.md."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from dialects import PATIENCE_S, wait_until

from u2moe.runtime.server import launch as workers_module
from u2moe.runtime.server.launch import open_sockets
from u2moe.runtime.server.log import Metrics, shared_rows
from u2moe.runtime.server.options import ServerOptions
from u2moe.runtime.server.server import have_others_room

TWO = ("--workers", "2", "--capacity", "1")


def metric(team, name):
    text = httpx.get(f"{team.urls[0]}/metrics", trust_env=False, timeout=PATIENCE_S).text
    return float(re.search(rf"^u2moe_{name} (\S+)$", text, re.MULTILINE)[1])


def workers_of(team):
    """Return the worker processes. There may also be a child that tracks shared memory."""
    children = Path(f"/proc/{team.pid}/task/{team.pid}/children").read_text(encoding="utf-8").split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_the_one_with_room_gets_the_next_and_one_that_stands_still_or_dies_is_replaced(serving, client_of):
    """The server may stop while a replaced worker still starts."""
    before = "from u2moe.runtime.server import launch; launch.SILENT_S = 4"
    with serving(*TWO, "--protocol", "vosk=0", "--protocol", "wyoming=0", before=before) as team:
        http, vosk, wyoming = (url.replace("http", "ws") for url in team.urls)
        with client_of(vosk) as client:
            client.send('{"eof" : 1}')
            assert client.receive() == {"text": ""}
        with socket.create_connection(("127.0.0.1", int(wyoming.rpartition(":")[2])), PATIENCE_S) as plain:
            plain.sendall(b'{"type": "ping"}\n')
            assert b'"pong"' in plain.recv(1000)
        for _ in range(2):
            wait_until(lambda: metric(team, "streams") == 0)
            with client_of(f"{http}/stream") as one, client_of(f"{http}/stream") as other:
                one.start()
                other.start()
                assert (metric(team, "streams"), metric(team, "capacity")) == (2, 2)
                with client_of(f"{http}/stream") as third:
                    assert third.close_code() == 1013
        workers = workers_of(team)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGSTOP)
        team.read_to("does not respond")
        for _ in range(4):
            assert httpx.get(f"{team.urls[0]}/healthz", trust_env=False, timeout=PATIENCE_S).status_code == 200
        team.read_to("restarting it")
        wait_until(lambda: metric(team, "ready") == 2)
        os.kill(workers[1], signal.SIGKILL)
        team.read_to("restarting it")
        team.terminate()
        assert team.wait(PATIENCE_S) == 0


def test_workers_that_never_become_ready_are_started_ever_more_seldom(monkeypatch):
    now, started, ended = [1000.0], [], SimpleNamespace(exitcode=1, pid=None)  # as soon as it is started
    monkeypatch.setattr(workers_module, "time", type("Time", (), {"monotonic": lambda: now[0]}))
    team = workers_module.Team(1, lambda *_: None)
    team._was_ready, team._processes = True, [ended]

    def start(number):
        team._start_times[number] = now[0]
        started.append(now[0])
        return ended

    monkeypatch.setattr(team, "_start", start)
    for _ in range(3000):
        now[0] += 0.1
        team._look_after()
    gaps = np.diff(started)
    assert 7 < len(started) < 12
    assert gaps[0] < 3
    assert max(gaps) == pytest.approx(60, abs=1)


@pytest.mark.parametrize("is_killed", [False, True])
def test_workers_finish_utterances_and_end_at_a_second_signal_or_with_the_process_that_started_them(
    serving, client_of, speech, texts, is_killed
):
    with serving(*TWO) as team, contextlib.ExitStack() as stack:
        url = f"{team.urls[0].replace('http', 'ws')}/stream"
        clients = [stack.enter_context(client_of(url)) for _ in range(2)]
        for client in clients:
            client.start()
            client.play(speech()[:24_000])
            client.wait_for_text()
        workers = workers_of(team)
        assert len(workers) == 2
        if is_killed:
            team.kill()
        else:
            team.send_signal(signal.SIGTERM)
            team.read_to("stopping 2 workers")
            client.play(speech()[24_000:])  # the other one does not end
            finals = [event["text"] for event in client.receive_until("done") if event["type"] == "final"]
            assert finals == texts[: len(finals)] != []
            assert client.close_code() == 1001
            time.sleep(0.6)  # earlier it would count as the same signal
            team.send_signal(signal.SIGTERM)
            team.read_to("stopped at once")
            assert team.wait(PATIENCE_S) == 128 + signal.SIGTERM
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


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


def test_a_model_that_no_worker_can_load_is_an_error(tmp_path):
    command = [sys.executable, "-m", "u2moe", "serve", str(tmp_path), "--workers", "2", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1
    assert "before it was ready" in ended.stderr
    assert "Traceback" not in ended.stderr


PAGE = (Path(__file__).parents[2] / "docs" / "proxies.md").read_text(encoding="utf-8")
SOCKET = "/run/u2moe/u2moe.sock"
NGINX = """
{user} daemon off; error_log stderr; pid {folder}/nginx.pid;
events {{}}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
    uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; {more}
    {block}
}}
"""


def block_of(heading):
    return re.search(rf"## {heading}\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)[1]


def nginx(folder, port, more=""):
    block = re.sub(r"ssl_certificate.*\n", "", block_of("nginx")).replace("443 ssl", f"127.0.0.1:{port}")
    user = "user root;" if os.getuid() == 0 else ""
    text = NGINX.format(user=user, folder=folder, more=more, block=block.replace(SOCKET, f"{folder}/u2moe.sock"))
    (folder / "nginx.conf").write_text(text, encoding="utf-8")
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy(folder, port):
    block = block_of("Caddy").replace("speech.example", f"http://127.0.0.1:{port}")
    text = "{\n  admin off\n}\n" + block.replace(SOCKET, f"{folder}/u2moe.sock")
    (folder / "Caddyfile").write_text(text, encoding="utf-8")
    return ["caddy", "run", "--config", str(folder / "Caddyfile")]


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def proxy(make, folder, *more):
    if shutil.which(make.__name__) is None:
        pytest.skip(f"needs the Debian package {make.__name__}")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    home = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(make(folder, port, *more), stderr=log, env=home) as process,
    ):
        try:
            wait_until(lambda: answers(port) or process.poll() is not None)
            assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def post(url, talk, **data):
    headers = {"Origin": url, "X-Request-ID": "mine"}
    url = f"{url}/v1/audio/transcriptions"
    return httpx.post(url, files={"file": talk.read_bytes()}, data=data, headers=headers, timeout=120, trust_env=False)


@pytest.mark.parametrize("make", [nginx, caddy])
def test_everything_passes(running, make, tmp_path, talk, demo, speech, texts, client_of):
    with running(host=f"unix:{tmp_path}/u2moe.sock"), proxy(make, tmp_path) as url:
        assert httpx.get(f"{url}/", trust_env=False).text.startswith("<!doctype html>")
        answer = post(url, talk)
        assert answer.json()["text"] == demo.transcribe(talk).text
        assert answer.headers["x-request-id"] == "mine"
        assert "transcript.text.done" in post(url, talk, stream="true").text
        with client_of(f"{url.replace('http', 'ws')}/stream", origin=url) as client:
            client.start(partials=False)
            client.play(speech())
            assert [event["text"] for event in client.finish()[:-1]] == texts
        evil = httpx.post(f"{url}/v1/audio/transcriptions", headers={"Origin": "http://evil.example"}, trust_env=False)
        assert evil.status_code == 403


@pytest.mark.parametrize(("seconds", "more"), [
    (2, "proxy_read_timeout 1s;"), pytest.param(75, "", marks=pytest.mark.endurance)
])  # fmt: skip
def test_what_takes_long_is_kept_by_what_is_sent_meanwhile(running, held, tmp_path, talk, monkeypatch, seconds, more):
    """The shorter timeout is a second, with blanks at the same ratio as nginx's 60 and our 15 seconds."""
    for name in ("_SILENCE_S", "_PROGRESS_S") if more else ():
        monkeypatch.setattr(f"u2moe.runtime.server.protocols.rest.{name}", 0.25)
    with (
        running(held, host=f"unix:{tmp_path}/u2moe.sock"),
        proxy(nginx, tmp_path, more) as url,
        ThreadPoolExecutor() as pool,
    ):
        asked = ({}, {"stream": "true"}, {"response_format": "srt"})
        answers = [pool.submit(post, url, talk, **data) for data in asked]
        assert held.is_held.wait(PATIENCE_S)
        time.sleep(seconds)
        held.release()
        plain, events, silent = (answer.result() for answer in answers)
    assert plain.text.startswith(" ")
    assert json.loads(plain.text)["text"]
    assert "transcript.progress" in events.text
    assert "transcript.text.done" in events.text
    assert silent.status_code == 504  # as documented


def test_a_socket_that_a_killed_server_left(tmp_path):
    options = ServerOptions(host=f"unix:{tmp_path}/a.sock")
    with contextlib.ExitStack() as opened:
        open_sockets(options, opened)
        with pytest.raises(OSError, match=r"a.sock: Address already in use"):
            open_sockets(options, opened)
    with contextlib.ExitStack() as opened:
        open_sockets(options, opened)
        assert (tmp_path / "a.sock").stat().st_mode & 0o777 == 0o666
        (tmp_path / "b.sock").write_text("a file of somebody", encoding="utf-8")
        with pytest.raises(OSError, match="Address already in use"):
            open_sockets(ServerOptions(host=f"unix:{tmp_path}/b.sock"), opened)
    with pytest.raises(ValueError, match="serves only HTTP and WebSocket"):
        ServerOptions(host="unix:x", protocol_ports={"vosk": 1})
    with pytest.raises(ValueError, match="an address, a network or"):
        ServerOptions(forwarded_allow_ips=("10.0.0.300",))
