"""Untrusted files: their effect on the libraries that read them, and fairness among clients."""

import io
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import soundfile
from dialects import upload
from media import write_media

from u2moe.runtime.audio import decoder

PATIENCE_S = 120
CRASH = """
import os
import u2moe.runtime.audio.decoder as decoder
read = decoder.read_blocks

def crash(file, *args, **kwargs):
    if getattr(file, "name", "") == "crash.mp3":
        file.read(10)
        os.abort()
    return read(file, *args, **kwargs)

decoder.read_blocks = crash
decoder.main()
"""


@pytest.fixture(scope="module")
def talk(speech):
    content = io.BytesIO()
    soundfile.write(content, speech(), 16_000, format="WAV")
    return content.getvalue()


@pytest.fixture(scope="module")
def text(demo, talk):
    return demo.transcribe(talk).text


def test_files_of_many_channels_and_libraries_that_print_nothing(server, speech, text, tmp_path, capfd):
    """PyAV counted nine for eight planar channels, which crashed the server. 255 channels took four gigabytes."""
    file = write_media(tmp_path / "talk.wv", [np.repeat((speech() / np.float32(32768))[:, None], 8, axis=1)])
    assert server.post(files={"file": (file.name, file.read_bytes())}).json()["text"] == text
    with soundfile.SoundFile(tmp_path / "many.ogg", "w", 192_000, 255, "VORBIS", format="OGG") as many:
        many.write(np.zeros((100, 255), np.float32))
    answer = server.post(files={"file": ("many.ogg", (tmp_path / "many.ogg").read_bytes())})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "many.ogg: has 255 channels, expected at most 64"
    # libmpg123 prints errors about damaged frames
    content = io.BytesIO()
    soundfile.write(content, np.random.default_rng(0).normal(0, 0.1, 48_000), 16_000, format="MP3")
    damaged = bytearray(content.getvalue())
    for place in range(1000, len(damaged), 300):
        damaged[place : place + 4] = b"\xff\xfb\xff\xff"
    server.post(files={"file": ("odd.mp3", bytes(damaged))})
    assert capfd.readouterr() == ("", "")


def test_a_file_that_crashes_its_decoder_is_an_error_for_it_alone(running, talk, text, monkeypatch, caplog):
    monkeypatch.setattr(decoder, "_CODE", CRASH)
    with running() as server, ThreadPoolExecutor() as pool:
        names = ["talk.wav", "crash.mp3", "talk.wav", "crash.mp3", "talk.wav"]
        answers = list(pool.map(lambda name: server.post(files={"file": (name, talk)}), names))
        assert [answer.status_code for answer in answers] == [200, 400, 200, 400, 200]
        assert {answer.json()["text"] for answer in answers[::2]} == {text}
        error = answers[1].json()["error"]
        assert error["param"] == "file"
        assert error["message"].startswith("crash.mp3: cannot be decoded: the decoder process died")
        assert server.metric("failures", "decoder") == 2
    assert sum("crashed the decoder process" in record.getMessage() for record in caplog.records) == 1


def test_a_short_file_does_not_wait_for_a_long_one(server, talk, text):
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", 8000, 1, format="FLAC") as file:
        for _ in range(120):
            file.write(np.zeros(8000 * 60, np.int16))
    body = upload(content.getvalue())
    head = "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.open_plain() as plain:
        plain.sendall(head.encode() + body)
        server.wait_until(lambda: any(task.duration > 30 for task in server.service.files._running))
        assert server.post(files={"file": ("a.wav", talk)}).json()["text"] == text
        server.wait_until(lambda: len(server.service.files._running) == 1)
        (long,) = server.service.files._running
        assert 30 < long.duration < long.whole_s == 7200
    server.wait_until_empty()
    server.wait_until(lambda: not server.service.files._running)
    assert len(server.service.files._decoders) == 1


def test_one_client_leaves_places_and_turns_to_others(running, held, talk, text, monkeypatch):
    """One of four uploads of an address is refused. Another address comes next although it came last."""
    monkeypatch.setattr("u2moe.runtime.server.files._AT_ONCE", 1)
    with running(held, max_files=5) as server, ThreadPoolExecutor() as pool:
        order, post = [], pool.submit

        def send(address):
            with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=PATIENCE_S) as http:
                answer = http.post(f"{server.url}/v1/audio/transcriptions", files={"file": ("a.wav", talk)})
            order.append(address)
            return answer

        greedy = [post(send, "127.0.0.1")]
        assert held.is_held.wait(PATIENCE_S)
        greedy.append(post(send, "127.0.0.1"))
        server.wait_until(lambda: len(server.service.files._tasks) == 1)
        refused = send("127.0.0.1")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "rate_limit")
        other = post(send, "127.0.0.2")
        server.wait_until(lambda: len(server.service.files._tasks) == 2)
        held.release()
        answers = [each.result() for each in (*greedy, other)]
        assert {answer.json()["text"] for answer in answers} == {text}
        assert order == ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.1"]  # the first was refused
        server.wait_until_empty()
        assert not server.service.files._placed


def test_who_a_client_is(running, tmp_path):
    (tmp_path / "keys").write_text("alice a 2\nbob b\n", encoding="utf-8")
    with running(keys_file=tmp_path / "keys") as several, running(api_key="k") as single:
        for service, key, host, client in (
            (several.service, several.service.keys.find(["a"]), "10.0.0.1", "key alice"),
            (single.service, single.service.keys.find(["k"]), "10.0.0.1", "10.0.0.1"),
            (single.service, None, "2001:db8::1:2", "2001:db8::/64"),
            (single.service, None, "unknown", "unknown"),
        ):
            assert service.client_of({"u2moe.key": key, "client": (host, 1)}) == client
        assert single.service.client_of({"u2moe.key": None, "client": None}) == ""


def test_one_client_leaves_room_to_others(running, held, talk, monkeypatch):
    room = SimpleNamespace(free=3 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    with running(held) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(server.post, files={"file": ("a.wav", talk + bytes(2 << 20))})
        assert held.is_held.wait(PATIENCE_S)
        assert server.post(files={"file": ("b.wav", bytes(2 << 20))}).status_code == 507
        held.release()
        assert first.result().status_code == 200
        server.wait_until_empty()
        assert server.post(files={"file": ("b.wav", talk + bytes(4 << 20))}).status_code == 200  # its only file
