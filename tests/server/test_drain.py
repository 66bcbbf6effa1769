"""A stopping server finishes running utterances and refuses new clients."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from dialects import END, START, audio_messages
from websockets.exceptions import ConnectionClosed

PATIENCE_S = 120


def wait_for_speech(client):
    """Wait for a partial result of an unfinished utterance."""
    while not (event := client.receive())["text"]:
        assert event["type"] == "partial"


def test_an_utterance_is_finished_then_the_connection_is_closed(running, speech, expected):
    samples = speech()
    with running(drain_s=PATIENCE_S) as server, server.connect() as client:
        client.start()
        client.play(samples[:24_000])
        wait_for_speech(client)
        server.stop()
        server.wait_until(lambda: not server.service.is_ready)
        end = round((expected().segments[1].start - 0.05) * 16_000)  # in the pause
        client.play(samples[24_000:end])
        finals = [event["text"] for event in client.receive_until("done") if event["type"] == "final"]
        assert finals == [expected().segments[0].text]
        assert client.close_code() == 1001
        server.join()


def test_those_that_say_nothing_are_closed_at_once(running):
    with running(drain_s=PATIENCE_S) as server, contextlib.ExitStack() as stack:
        clients = {path: stack.enter_context(server.connect(path)) for path in START}
        clients["/stream"].start()
        clients["/stream"].play(np.zeros(32_000, np.int16))
        server.wait_until(lambda: server.metric("streams") == len(START))
        server.stop()
        assert {path: client.close_code() for path, client in clients.items()} == dict.fromkeys(START, 1001)
        server.join()


def test_who_speaks_without_end_is_cut_off_with_what_was_recognised(running, speech, demo):
    samples = speech()[:28_000]
    with running(drain_s=0.5) as server, server.connect() as client:
        client.start()
        client.play(samples)
        wait_for_speech(client)
        server.stop()
        events = client.receive_until("done")
        text = demo.transcribe(samples, options=server.service.default.stream_options).text
        assert [event["text"] for event in events if event["type"] == "final"] == [text]
        server.join()


@pytest.mark.parametrize("is_in_time", [True, False])
@pytest.mark.parametrize("path", ["/sherpa-offline", "/v1/realtime"])
def test_what_a_client_ends_itself_is_whole_or_an_error(running, speech, expected, path, is_in_time):
    messages = audio_messages(path, speech())
    if path == "/v1/realtime":
        audio = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
        update = {"type": "session.update", "session": {"audio": {"input": audio}}}
        messages = [json.dumps(update), *messages, END[path]]
    with running(drain_s=PATIENCE_S if is_in_time else 0.5) as server, server.connect(path) as client:
        middle = len(messages) // 2  # in a pause
        for part in messages[:middle]:
            client.send(part)
        server.wait_until(
            lambda: any(each.duration > 4 and each.queued_s < 1 for each in server.service.scheduler.streams)
        )
        server.stop()
        server.wait_until(lambda: not server.service.is_ready)
        for part in messages[middle:] if is_in_time else ():
            client.send(part)
        said = []
        with contextlib.suppress(ConnectionClosed):
            while True:
                said.append(client.receive())
        assert client.websocket.close_code == 1001
        texts = [event[name] for event in said for name in ("text", "transcript") if name in event]
        assert texts == ([expected().text] if is_in_time else [])
        server.join()


def test_vosk_gets_the_answer_it_waits_for(running, speech):
    samples = speech()
    with running() as server, server.connect("/vosk") as client:
        client.tell(config={"sample_rate": 16000})
        client.send(samples[:24_000].tobytes())
        assert client.receive()["partial"]
        server.stop()
        server.wait_until(lambda: not server.service.is_ready)
        answer = {}
        for start in range(24_000, len(samples), 8000):
            client.send(samples[start : start + 8000].tobytes())
            answer = client.receive()
            if "text" in answer:
                break
        assert answer["text"]
        assert client.close_code() == 1001
        server.join()


def test_a_file_is_finished(running, held, speech, tmp_path):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    content = (tmp_path / "talk.wav").read_bytes()
    with running(held) as server, ThreadPoolExecutor() as pool:
        posting = pool.submit(server.post, files={"file": content})
        assert held.is_held.wait(PATIENCE_S)
        server.stop()
        server.wait_until(lambda: not server.service.is_ready)
        held.release()
        server.join()
    assert posting.result().json()["text"] == held.transcribe(tmp_path / "talk.wav").text


def test_nobody_is_let_in(running, speech):
    with running() as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        assert http.get("/readyz").status_code == 200
        with server.connect() as client:
            client.start()
            client.play(speech()[:24_000])
            wait_for_speech(client)
            server.stop()
            server.wait_until(lambda: not server.service.is_ready)
            assert http.get("/readyz").status_code == 503  # on the existing connection
            assert http.get("/healthz").status_code == 200
            with server.connect() as late:
                assert late.close_code() == 1001
            assert server.post(files={"file": b""}).status_code == 503
            client.play(speech()[24_000:])
            client.receive_until("done")
        server.join()


@pytest.mark.parametrize(("workers", "number"), [("1", signal.SIGINT), ("2", signal.SIGTERM)])
def test_one_that_has_hardly_started_ends_at_once(workers, number):
    command = [sys.executable, "-m", "u2moe", "serve", "--port", "0", "--workers", workers]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert "demo model" in process.stderr.readline()
        assert "listening" in process.stderr.readline()
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == (0 if number == signal.SIGTERM else 130)


NEW_NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
HAS_NAMESPACES = shutil.which("unshare") is not None and not subprocess.call(
    [*NEW_NAMESPACE, "true"], stderr=subprocess.DEVNULL
)


@pytest.mark.skipif(not HAS_NAMESPACES, reason="needs process namespaces")
def test_process_1_finishes_an_utterance(serving, client_of, speech, expected):
    """In a container, process 1 receives only signals that it handles."""
    end = round((expected().segments[1].start - 0.05) * 16_000)  # in the pause
    with serving("--capacity", "4", command=(*NEW_NAMESPACE, sys.executable)) as process:
        (server,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        with client_of(f"{process.urls[0].replace('http', 'ws')}/stream") as client:
            client.start()
            client.play(speech()[:24_000])
            wait_for_speech(client)
            os.kill(int(server), signal.SIGTERM)
            assert "finished first" in process.stderr.readline()
            client.play(speech()[24_000:end])
            finals = [event["text"] for event in client.receive_until("done") if event["type"] == "final"]
            assert finals == [expected().segments[0].text]
            assert client.close_code() == 1001
        assert process.wait(PATIENCE_S) == 0
