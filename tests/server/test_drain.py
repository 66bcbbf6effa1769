"""Admission of clients, and a stopping server: it finishes running utterances and refuses new clients."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from dialects import END, PATIENCE_S, REALTIME, START, audio_messages

from u2moe.runtime.decoding.stream_state import SearchWords
from u2moe.runtime.server.accounts import Admission, Lateness
from u2moe.runtime.server.errors import UnavailableError
from u2moe.runtime.server.log import Metrics


def test_utterances_are_finished_the_silent_are_closed_at_once_and_nobody_is_let_in(running, speech, expected):
    pause = round((expected().segments[1].start - 0.05) * 16_000)  # after the first segment
    with (
        running(drain_s=PATIENCE_S) as server,
        httpx.Client(base_url=server.url, trust_env=False) as http,
        contextlib.ExitStack() as stack,
    ):
        assert http.get("/readyz").status_code == 200
        silent = {path: stack.enter_context(server.connect(path)) for path in START}
        silent["/stream"].start()
        silent["/stream"].play(np.zeros(32_000, np.int16))
        client, vosk = (stack.enter_context(server.connect(path)) for path in ("/stream", "/vosk"))
        client.start()
        client.play(speech()[:24_000])
        client.wait_for_text()
        vosk.tell(config={"sample_rate": 16000})
        vosk.send(speech()[:24_000].tobytes())
        assert vosk.receive()["partial"]
        server.wait_until(lambda: server.metric("streams") == len(START) + 2)
        server.stop()
        assert {path: each.close_code() for path, each in silent.items()} == dict.fromkeys(START, 1001)
        assert http.get("/readyz").status_code == 503  # on the existing connection
        assert http.get("/healthz").status_code == 200
        with server.connect() as late:
            assert late.close_code() == 1001
        assert server.post(files={"file": b""}).status_code == 503
        client.play(speech()[24_000:pause])
        finals = [event["text"] for event in client.receive_until("done") if event["type"] == "final"]
        answer = {}
        for block in np.split(speech()[24_000:], range(8000, len(speech()) - 24_000, 8000)):
            vosk.send(block.tobytes())
            if "text" in (answer := vosk.receive()):  # it waits for an answer to each block
                break
        assert finals == [answer["text"]] == [expected().segments[0].text]
        assert client.close_code() == vosk.close_code() == 1001
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
def test_what_a_client_ends_itself_is_whole_or_an_error(running, speech, expected, is_in_time):
    offline, realtime = (audio_messages(path, speech()) for path in ("/sherpa-offline", "/v1/realtime"))
    update = REALTIME % '{"format": {"type": "audio/pcm", "rate": 16000}, "turn_detection": null}'
    messages = {"/sherpa-offline": offline, "/v1/realtime": [update, *realtime, END["/v1/realtime"]]}
    with running(drain_s=PATIENCE_S if is_in_time else 0.5) as server, contextlib.ExitStack() as stack:
        clients = {path: stack.enter_context(server.connect(path)) for path in messages}
        for path, client in clients.items():
            for part in messages[path][: len(messages[path]) // 2]:  # to a pause
                client.send(part)
        scheduler = server.service.scheduler
        server.wait_until(lambda: sum(each.duration > 4 and each.queued_s < 1 for each in scheduler.streams) == 2)
        server.stop()
        server.wait_until(lambda: not server.service.is_ready)
        for path, client in clients.items():
            for part in messages[path][len(messages[path]) // 2 :] if is_in_time else ():
                client.send(part)
            events = [json.loads(event) for event in client.rest()]
            assert client.websocket.close_code == 1001
            texts = [event[name] for event in events for name in ("text", "transcript") if name in event]
            assert texts == ([expected().text] if is_in_time else [])
        server.join()


NEW_NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
HAS_NAMESPACES = shutil.which("unshare") is not None and not subprocess.call(
    [*NEW_NAMESPACE, "true"], stderr=subprocess.DEVNULL
)
needs_namespaces = pytest.mark.skipif(not HAS_NAMESPACES, reason="needs process namespaces")


@pytest.mark.parametrize(("number", "status", "more", "before"), [
    (signal.SIGINT, 130, ["--host", "unix:{}"], ()), (signal.SIGTERM, 0, ["--workers", "2", "--port", "0"], ()),
    pytest.param(signal.SIGTERM, 0, ["--port", "0"], NEW_NAMESPACE, marks=needs_namespaces),
])  # fmt: skip
def test_one_that_has_hardly_started_ends_at_once_and_removes_only_its_own_socket(
    tmp_path, number, status, more, before
):
    """In a container, process 1 receives only signals that it handles."""
    file = tmp_path / "socket"
    command = [*before, sys.executable, "-m", "u2moe", "serve", *(option.format(file) for option in more)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert "demo model" in process.stderr.readline()
        assert "listening" in process.stderr.readline()
        file.unlink(missing_ok=True)
        file.write_text("of another", encoding="utf-8")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        os.kill(int(children.read_text(encoding="ascii")) if before else process.pid, number)
        assert process.wait(PATIENCE_S) == status
    assert file.read_text(encoding="utf-8") == "of another"


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
