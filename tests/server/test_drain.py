"""Admission of clients, and a stopping server: it finishes running utterances and refuses new clients."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from dialects import END, START, audio_messages
from websockets.exceptions import ConnectionClosed

from u2moe.runtime.decoding.stream_state import SearchWords
from u2moe.runtime.server.accounts import Admission, Lateness
from u2moe.runtime.server.errors import UnavailableError
from u2moe.runtime.server.log import Metrics

PATIENCE_S = 120


@pytest.fixture(scope="session")
def pause(expected):
    """Return the sample in the pause after the first segment."""
    return round((expected().segments[1].start - 0.05) * 16_000)


def test_an_utterance_is_finished_then_the_connection_is_closed_and_nobody_is_let_in(running, speech, expected, pause):
    with running(drain_s=PATIENCE_S) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        assert http.get("/readyz").status_code == 200
        with server.connect() as client:
            client.start()
            client.play(speech()[:24_000])
            client.wait_for_text()
            server.stop()
            server.wait_until(lambda: not server.service.is_ready)
            assert http.get("/readyz").status_code == 503  # on the existing connection
            assert http.get("/healthz").status_code == 200
            with server.connect() as late:
                assert late.close_code() == 1001
            assert server.post(files={"file": b""}).status_code == 503
            client.play(speech()[24_000:pause])
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
        client.wait_for_text()
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
        scheduler = server.service.scheduler
        server.wait_until(lambda: any(each.duration > 4 and each.queued_s < 1 for each in scheduler.streams))
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
    blocks = [speech()[start : start + 8000].tobytes() for start in range(0, len(speech()), 8000)]
    with running() as server, server.connect("/vosk") as client:
        client.tell(config={"sample_rate": 16000})
        client.send(b"".join(blocks[:3]))
        assert client.receive()["partial"]
        server.stop()
        server.wait_until(lambda: not server.service.is_ready)
        answer = {}
        for block in blocks[3:]:
            client.send(block)
            if "text" in (answer := client.receive()):
                break
        assert answer["text"]
        assert client.close_code() == 1001
        server.join()


def test_a_file_is_finished(running, held, talk):
    with running(held, drain_s=PATIENCE_S) as server, ThreadPoolExecutor() as pool:
        posting = pool.submit(server.post, files={"file": talk.read_bytes()})
        assert held.is_held.wait(PATIENCE_S)
        server.stop()
        server.wait_until(lambda: not server.service.is_ready)
        held.release()
        server.join()
    assert posting.result().json()["text"] == held.transcribe(talk).text


@pytest.mark.parametrize(("number", "status", "more"), [
    (signal.SIGINT, 130, ["--host", "unix:{}"]), (signal.SIGTERM, 0, ["--workers", "2", "--port", "0"])
])  # fmt: skip
def test_one_that_has_hardly_started_ends_at_once_and_removes_only_its_own_socket(tmp_path, number, status, more):
    file = tmp_path / "socket"
    command = [sys.executable, "-m", "u2moe", "serve", *(option.format(file) for option in more)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert "demo model" in process.stderr.readline()
        assert "listening" in process.stderr.readline()
        file.unlink(missing_ok=True)
        file.write_text("of another", encoding="utf-8")
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == status
    assert file.read_text(encoding="utf-8") == "of another"


NEW_NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
HAS_NAMESPACES = shutil.which("unshare") is not None and not subprocess.call(
    [*NEW_NAMESPACE, "true"], stderr=subprocess.DEVNULL
)


@pytest.mark.skipif(not HAS_NAMESPACES, reason="needs process namespaces")
def test_process_1_finishes_an_utterance(serving, client_of, speech, expected, pause):
    """In a container, process 1 receives only signals that it handles."""
    with serving("--capacity", "4", command=(*NEW_NAMESPACE, sys.executable)) as process:
        (server,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        with client_of(f"{process.urls[0].replace('http', 'ws')}/stream") as client:
            client.start()
            client.play(speech()[:24_000])
            client.wait_for_text()
            os.kill(int(server), signal.SIGTERM)
            process.read_to("finished first")
            client.play(speech()[24_000:pause])
            finals = [event["text"] for event in client.receive_until("done") if event["type"] == "final"]
            assert finals == [expected().segments[0].text]
            assert client.close_code() == 1001
        assert process.wait(PATIENCE_S) == 0


def test_each_protocol_says_that_it_is_full_and_a_place_is_free_again_when_its_client_leaves(running, speech, texts):
    with running(capacity=2) as small:
        with small.connect() as inside, small.connect("/sherpa"):
            inside.start(partials=False)
            assert small.metric("streams") == 2
            for path, samples in zip(START, np.array_split(speech(), len(START)), strict=True):
                with small.connect(path) as refused:
                    told = refused.rest()
                    assert refused.close_code() == 1013, path
                    assert "the server is full" in refused.websocket.close_reason
                    assert path != "/stream" or '"code": 1013' in told[0]
                inside.play(samples)
            assert [event["text"] for event in inside.finish()[:-1]] == texts
            assert small.metric("refusals", "full") == len(START)
        small.wait_until_empty()
        with small.connect() as again:
            again.start()


def test_capacity_is_measured_with_the_language_model(running, monkeypatch):
    """Streams with a language model are the plain ones: their cost is 1, and the capacity counts them."""
    fusion, found = SearchWords.fusion, []
    monkeypatch.setattr(SearchWords, "fusion", lambda *given: found.append(fusion(*given)) or found[-1])
    with running(capacity=None) as server:
        assert server.metric("capacity") == server.service.admission.num_slots >= 1
    assert found
    assert None not in found


def test_nobody_is_admitted_while_results_are_late(monkeypatch):
    """Refusals start at 0.6 seconds and end below 0.3, or without live audio. One stream is always admitted."""
    now = [100.0]
    monkeypatch.setattr("u2moe.runtime.server.accounts.time", SimpleNamespace(monotonic=lambda: now[0]))
    metrics, lateness = Metrics(), Lateness()
    admission = Admission(10, metrics, "streams", lateness)

    def is_open():
        try:
            with admission.slot():
                return True
        except UnavailableError:
            return False

    def observe(seconds, times=40):
        for _ in range(times):
            now[0] += 0.1
            lateness.observe(seconds)

    observe(2.0, 4)  # a long round counts as much as several short ones
    assert is_open()
    with admission.slot():
        assert not is_open()
        for seconds, is_admitted in ((0.5, False), (0.2, True), (0.5, True), (2.0, False)):
            observe(seconds)
            assert is_open() == is_admitted
        now[0] += 3
        assert is_open()
    assert metrics.total("refusals", "late") == 3
