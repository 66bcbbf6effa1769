"""Broken connections and damaged messages: the server answers or closes, and releases all resources. And the study of
live speakers: their results, and how many a server sustains."""

import argparse
import asyncio
import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import damage
import httpx
import numpy as np
import pytest
import soundfile
from dialects import START, conversation, upload, wyoming_request
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from u2moe.benchmarks.results.files import read_json
from u2moe.benchmarks.studies import hostile, serving
from u2moe.benchmarks.studies.shared import load
from u2moe.benchmarks.studies.shared.load import Received, RunningServer, first_buffers, speak_together, speech_buffers
from u2moe.runtime.audio.reading import read_audio
from u2moe.runtime.bundle_location import DEMO_FOLDER

REST, WYOMING = "/v1/audio/transcriptions", "wyoming"
PROTOCOLS = (*START, REST, WYOMING)
AT_ONCE = 100
PATIENCE_S = 60.0
WARM_UP = damage.NUM_INPUTS // 2
"""Rounds until the libraries' allocators reach their size. Earlier growth is ignored."""
NUM_SAMPLES = 8_000
"""Enough samples for a last, shorter chunk and its second pass. More would add nothing to tests of messages."""
ODD_TEXTS = ("", "{", "[" * 5000, "null", "NaN", '"\\ud800"', "[]", "1e999", '{"type": 7}', '{"eof": {}}', "Done")
INTERNAL = 1011


def damaged(messages, random):
    found = list(messages)
    for _ in range(int(random.integers(1, 4))):
        if found:
            message = found[index := int(random.integers(len(found)))]
            is_text = isinstance(message, str)
            data = message.encode() if is_text else message
            changed = damage.damaged(data, random)
            odd = damage.one_of(ODD_TEXTS, random), random.bytes(int(random.integers(2000)))
            other = data if is_text else message.decode("latin-1")
            again = changed.decode(errors="replace") if is_text else changed
            choices = [[], [message, message], *([each] for each in (*odd, other, again))]
            found[index : index + 1] = damage.one_of(choices, random)
    return found


async def converse(server, path, messages, *, is_lost=False):
    settings = {"proxy": None, "ping_interval": None, "max_queue": None}
    try:
        async with asyncio.timeout(PATIENCE_S), connect(f"ws://127.0.0.1:{server.port}{path}", **settings) as websocket:
            with contextlib.suppress(ConnectionClosed):
                for message in messages:
                    await websocket.send(message)
            if is_lost:
                websocket.transport.abort()
            closed = asyncio.ensure_future(websocket.wait_closed())
            await asyncio.wait({closed}, timeout=0.2)  # abandoned if it is not over now
    except TimeoutError:
        return "no answer"
    except (OSError, WebSocketException) as error:
        return f"failed: {type(error).__name__}"
    return "error within the server" if websocket.close_code == INTERNAL else "answered or closed"


async def exchange(port, data):
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                writer.write_eof()
                answer = await reader.read()
            finally:
                writer.close()
    except TimeoutError:
        return "no answer"
    except OSError:
        return "answered or closed"
    is_internal = answer.startswith(b"HTTP/1.1 5") and not answer.startswith(b"HTTP/1.1 503")
    return "error within the server" if is_internal else "answered or closed"


async def try_one(server, wyoming_port, protocol, seed, samples):
    random = np.random.default_rng([seed, PROTOCOLS.index(protocol)])
    if protocol in START:
        return await converse(server, protocol, damaged(conversation(protocol, samples), random))
    wav = io.BytesIO()
    soundfile.write(wav, samples, 16_000, format="WAV")
    whole = wyoming_request(samples) if protocol == WYOMING else upload(wav.getvalue())
    pieces = damaged(whole.splitlines(keepends=True), random)
    body = b"".join(piece.encode(errors="replace") if isinstance(piece, str) else piece for piece in pieces)
    if protocol == WYOMING:
        return await exchange(wyoming_port, body)
    head = f"POST {REST} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return await exchange(server.port, f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n".encode() + body)


@pytest.fixture(scope="module")
def samples():
    clip = read_audio(DEMO_FOLDER / "clips" / "command.flac", 16_000)
    return (clip[:NUM_SAMPLES] * 32767).astype(np.int16)


@pytest.fixture
def apart():
    port = load.free_port()
    with load.our_server(DEMO_FOLDER, arguments=["--protocol", f"wyoming={port}", "--idle-timeout", "20"]) as server:
        yield server, port


@pytest.fixture
def inside(server):
    return RunningServer(port=server.ports["http"], path="/sherpa", pid=os.getpid())


async def conversations(server, wyoming_port, protocol, samples, seeds):
    tasks = (try_one(server, wyoming_port, protocol, seed, samples) for seed in seeds)
    return Counter(await asyncio.gather(*tasks))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_damaged_conversation_is_answered_or_closed(server, inside, protocol, samples):
    outcomes = asyncio.run(conversations(inside, server.ports["wyoming"], protocol, samples, range(3)))
    assert outcomes == {"answered or closed": 3}
    server.wait_until_empty()


@pytest.mark.endurance
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_thousands_of_damaged_conversations_leave_nothing_behind(apart, protocol, samples):
    with unchanged(apart[0]) as rounds:
        for begin in rounds:
            seeds = range(begin, begin + AT_ONCE)
            assert asyncio.run(conversations(*apart, protocol, samples, seeds)) == {"answered or closed": AT_ONCE}


@pytest.mark.endurance
@pytest.mark.timeout(7200)
def test_thousands_of_clients_come_and_go(apart, samples):
    random = np.random.default_rng(0)

    async def visit():
        messages = conversation(path := damage.one_of(list(START), random), samples)
        num_sent, is_lost = int(random.integers(len(messages) + 1)), random.random() < 0.5
        return await converse(apart[0], path, messages[:num_sent], is_lost=is_lost)

    async def visits():
        return Counter(await asyncio.gather(*(visit() for _ in range(16))))

    with unchanged(apart[0]) as rounds:
        for _ in rounds:
            for _ in range(AT_ONCE // 16):
                assert asyncio.run(visits()) == {"answered or closed": 16}


@contextlib.contextmanager
def unchanged(server):
    """Check after rounds of work that the server recognises as before, without more memory or open files."""
    if sys.platform != "linux":
        pytest.skip("only Linux reports the resources of a process")
    metrics, folder, before = f"http://127.0.0.1:{server.port}/metrics", Path(f"/proc/{server.pid}"), []

    def state():
        pages = int((folder / "statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len([*(folder / "fd").iterdir()])

    def rounds():
        for begin in range(0, damage.NUM_INPUTS, AT_ONCE):
            if begin >= WARM_UP and not before:
                before.extend(state())
            yield begin
            while not re.search(r"^u2moe_streams 0\.0$", httpx.get(metrics).text, re.MULTILINE):
                time.sleep(0.1)  # otherwise they would accumulate on a busy machine

    yield rounds()
    time.sleep(3)
    found = asyncio.run(first_buffers(server.url, speech_buffers(2.0)))
    assert any(is_final and text for _, is_final, text in found)
    memory_mb, num_files = state()
    assert memory_mb < 1.1 * before[0]
    assert num_files <= before[1] + 8


@pytest.mark.endurance
def test_speakers_hear_what_one_alone_hears(inside):
    buffers = speech_buffers(3.0)

    async def speak():
        first = await first_buffers(inside.url, buffers)
        return first, await speak_together(inside.url, buffers, 3, first)

    first, received = asyncio.run(speak())
    assert any(is_final for _, is_final, _ in first)
    assert sorted(first.values()) == list(first.values())
    assert received.num_expected == 3 * len(first)
    assert len(received.finals) == 3 * sum(is_final for _, is_final, _ in first)
    assert received.num_refused == 0
    assert not received.failures


def cell(count, p95, missing=0.0):
    latency = dict.fromkeys(("p50", "p95", "p99"), p95)
    found = {"streams": count, "partial": latency, "final": latency, "missing": missing, "num_failed": 0}
    return {**found, "cpu_per_audio_s": 0.01}


def test_how_many_are_held():
    cells = {
        "demo/u2moe/8": cell(8, 0.1),
        "demo/u2moe/64": cell(64, 0.1),
        "demo/u2moe/16": cell(16, 0.3),
        "demo/u2moe/32": cell(32, 0.31),
        "demo/sherpa-onnx/8": cell(8, 0.1),
        "demo/sherpa-onnx/16": cell(16, 0.1, missing=0.02),
        "demo/crowd": {"capacity": 8, "alone": cell(8, 0.1), "crowded": cell(32, 0.11)},
    }
    assert [target.found for target in serving.targets({"cells": cells})] == pytest.approx([2.0, 1.1])
    shown = serving.values({"cells": cells})
    assert (shown["demo.ours"], shown["demo.native"], shown["demo.theirs"]) == ("16", "0", "8")
    assert shown["table"].count("\n") == 2 + 7 - 1
    assert "| demo, u2moe | 64 |" not in shown["table"]  # beyond the first number that is not sustained
    assert not serving.is_held({**serving.summary(Received(num_expected=3)), "streams": 1})  # no results were received
    cells["demo/sherpa-onnx with a language model/4"] = cell(4, 0.1)  # the peer that does the same work
    assert [target.found for target in serving.targets({"cells": cells})] == pytest.approx([4.0, 1.1])
    assert serving.values({"cells": cells})["demo.theirs_with_model"] == "4"


def test_the_peer_searches_with_a_language_model_if_it_gets_one(tmp_path, monkeypatch):
    monkeypatch.setattr(serving.load, "sherpa_server", lambda *_, search_graph=None, **__: search_graph)
    given = argparse.Namespace(
        streams=[8], alone=False, bundle=tmp_path, folder=tmp_path, cores=None, search_graph=None
    )
    assert serving.starts(given)["sherpa-onnx"]() is None
    assert "sherpa-onnx with a language model" not in serving.starts(given)
    given.search_graph = tmp_path / "G.fst"
    assert serving.starts(given)["sherpa-onnx with a language model"]() == tmp_path / "G.fst"
    assert serving.starts(given)["sherpa-onnx"]() is None


def test_a_number_that_was_not_held_is_tried_once_more(tmp_path, monkeypatch):
    late, asked = {16: 1, 32: 2}, []  # how often each number of speakers is late

    def measured(_server, _blocks, count, _first, num_slots=None):
        asked.append(count)
        late[count] = late.get(count, 0) - 1
        return cell(count, 0.1 if num_slots or late[count] < 0 else 0.4)

    monkeypatch.setattr(serving, "measure", measured)
    monkeypatch.setattr(load, "results_alone", lambda *_: {})
    server = RunningServer(port=0, path="", pid=0, capacity=4)
    monkeypatch.setattr(serving, "starts", lambda _: {"u2moe": lambda: contextlib.nullcontext(server)})
    monkeypatch.setattr(serving, "ours", lambda *_: contextlib.nullcontext(server))
    file = tmp_path / "serving.json"
    serving.main([str(tmp_path), "--name", "demo", "--streams", "8", "16", "32", "64", "--results", str(file)])
    cells = read_json(file)["cells"]
    assert asked[:5] == [8, 16, 16, 32, 32]
    assert 64 not in asked
    assert serving.held(cells, "demo", "u2moe") == 16


def test_those_who_are_let_in_begin_when_they_would_without_a_crowd(monkeypatch):
    delays = []

    async def speak(_url, _blocks, delay, _first):
        delays.append(delay)
        return Received()

    monkeypatch.setattr(load, "speak", speak)
    for count in (3, 12):
        asyncio.run(speak_together("", [], count, {}, num_slots=3))
    assert delays[:3] == delays[3:6]
    assert all(delay >= 2 for delay in delays[6:])


WORK = "import time\nwhile time.process_time() < 0.2:\n    pass\nprint(flush=True)\ninput()"


def test_processor_time_of_all_processes_and_what_speakers_notice_of_attacks():
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORK!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert load.cpu_s(process.pid) >= 0.15  # the child's 0.2 s, whose parts the system rounds down to hundredths
        process.communicate(b"\n")
    part = {"partial": {"p95": 0.02}, "health": {"p95": 0.001}, "num_failed": 0, "num_refused": 0, "rss": 2e8}
    rounds = [{**part, "partial": {"p95": p95}} for p95 in (0.03, 0.05, 0.04)]
    found = {"cells": {"slower": {"speakers": 8, "before": part, "rounds": rounds}}}
    assert "| slower | 8 | 20 → 40 | 2.00 | 50 |" in hostile.values(found)["table"]
    assert [target.met for target in hostile.targets(found)] == [False]
