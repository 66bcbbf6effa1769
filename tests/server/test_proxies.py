"""The server on a Unix socket, directly and behind the proxies of docs/proxies.md."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import soundfile

from u2moe.runtime.server.launch import open_sockets
from u2moe.runtime.server.options import ServerOptions

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
    """Start a proxy for a socket in the folder, and yield its URL."""
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
            deadline = time.monotonic() + 120
            while not answers(port):
                assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.fixture
def talk(speech, tmp_path):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    return {"file": (tmp_path / "talk.wav").read_bytes()}


def post(url, files, **data):
    headers = {"Origin": url, "X-Request-ID": "mine"}
    url = f"{url}/v1/audio/transcriptions"
    return httpx.post(url, files=files, data=data, headers=headers, timeout=120, trust_env=False)


@pytest.mark.parametrize("make", [nginx, caddy])
def test_everything_passes(running, make, tmp_path, talk, demo, speech, expected, client_of):
    with running(host=f"unix:{tmp_path}/u2moe.sock"), proxy(make, tmp_path) as url:
        assert httpx.get(f"{url}/", trust_env=False).text.startswith("<!doctype html>")
        answer = post(url, talk)
        assert answer.json()["text"] == demo.transcribe(speech()).text
        assert answer.headers["x-request-id"] == "mine"
        assert "transcript.text.done" in post(url, talk, stream="true").text
        with client_of(f"{url.replace('http', 'ws')}/stream", origin=url) as client:
            client.start(partials=False)
            client.play(speech())
            assert [event["text"] for event in client.finish()[:-1]] == [each.text for each in expected().segments]
        evil = httpx.post(f"{url}/v1/audio/transcriptions", headers={"Origin": "http://evil.example"}, trust_env=False)
        assert evil.status_code == 403


def test_what_takes_long_is_kept_by_what_is_sent_meanwhile(running, held, tmp_path, talk, monkeypatch):
    """The timeout is a second, with blanks at the same ratio as nginx's 60 and our 15 seconds."""
    for name in ("_SILENCE_S", "_PROGRESS_S"):
        monkeypatch.setattr(f"u2moe.runtime.server.protocols.rest.{name}", 0.25)
    keep_waiting(running, held, tmp_path, talk, 2, "proxy_read_timeout 1s;")


@pytest.mark.endurance
def test_what_takes_long_is_kept_by_nginx_as_it_is(running, held, tmp_path, talk):
    keep_waiting(running, held, tmp_path, talk, 75, "")


def keep_waiting(running, held, tmp_path, talk, seconds, more):
    with (
        running(held, host=f"unix:{tmp_path}/u2moe.sock"),
        proxy(nginx, tmp_path, more) as url,
        ThreadPoolExecutor() as pool,
    ):
        asked = ({}, {"stream": "true"}, {"response_format": "srt"})
        answers = [pool.submit(post, url, talk, **data) for data in asked]
        assert held.is_held.wait(120)
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
