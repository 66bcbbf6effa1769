"""The study of live speakers: their results, and how many a server sustains."""

import asyncio
import contextlib
import os
import subprocess
import sys

import pytest

from u2moe.benchmarks.results.files import read_json
from u2moe.benchmarks.studies import hostile, serving
from u2moe.benchmarks.studies.shared import load
from u2moe.benchmarks.studies.shared.load import Received, RunningServer, first_buffers, speak_together, speech_buffers


@pytest.mark.endurance
def test_speakers_hear_what_one_alone_hears(server):
    process = RunningServer(port=server.ports["http"], path="/sherpa", pid=os.getpid())
    buffers = speech_buffers(3.0)

    async def speak():
        first = await first_buffers(process.url, buffers)
        return first, await speak_together(process.url, buffers, 3, first)

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


WORK = """
import time
while time.process_time() < 0.2:
    pass
print(flush=True)
input()
"""


def test_processor_time_of_all_processes_and_what_speakers_notice_of_attacks():
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORK!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert load.cpu_s(process.pid) >= 0.15  # the child's 0.2 s, whose parts the system rounds down to hundredths
        process.communicate(b"\n")
    part = {"partial": {"p95": 0.02}, "health": {"p95": 0.001}, "num_failed": 0, "num_refused": 0, "rss": 2e8}
    rounds = [{**part, "partial": {"p95": p95}} for p95 in (0.03, 0.05, 0.04)]
    found = {"cells": {"slower": {"speakers": 8, "before": part, "rounds": rounds}}}
    assert "| slower | 8 | 3 | 20 → 40 | 2.00 | 50 |" in hostile.values(found)["table"]
    assert [target.met for target in hostile.targets(found)] == [False]
