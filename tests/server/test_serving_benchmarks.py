"""The benchmarks of the server, as short as they can be."""

import asyncio
import os
import subprocess
import sys

import numpy as np
import pytest

from u2moe.benchmarks.serving import churn, damaged, load, servers
from u2moe.benchmarks.serving.messages import WEBSOCKETS
from u2moe.benchmarks.serving.servers import RunningServer
from u2moe.benchmarks.serving.speakers import Heard, first_blocks, speak_together, speech_blocks
from u2moe.benchmarks.serving.state import State


@pytest.fixture
def process(server):
    return RunningServer(port=server.ports["http"], path="/sherpa", pid=os.getpid())


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("u2moe.benchmarks.serving.state._SETTLE_S", 0.0)


def test_speakers_hear_what_one_alone_hears(process):
    blocks = speech_blocks(3.0)

    async def speak():
        first = await first_blocks(process.url, blocks)
        return first, await speak_together(process.url, blocks, 3, first)

    first, heard = asyncio.run(speak())
    assert any(is_final for _, is_final, _ in first)
    assert sorted(first.values()) == list(first.values())
    assert heard.num_expected == 3 * len(first)
    assert len(heard.finals) == 3 * sum(is_final for _, is_final, _ in first)
    assert heard.num_other == heard.num_refused == 0
    assert not heard.failures


def test_speakers_who_are_refused_are_counted(running):
    with running(capacity=1) as server, server.connect() as inside:
        inside.start()
        url = f"{server.websocket_url}/sherpa"
        heard = asyncio.run(speak_together(url, speech_blocks(0.5), 2, {}))
    assert heard.num_refused == 2
    assert not heard.failures


def cell(count, p95, missing=0.0):
    latency = dict.fromkeys(("p50", "p95", "p99"), p95)
    return {"streams": count, "partial": latency, "final": latency, "missing": missing, "num_failed": 0}


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
    assert (load.held(cells, "demo", "u2moe"), load.held(cells, "demo", "sherpa-onnx")) == (16, 8)
    targets = load.targets({"cells": cells})
    assert [target.met for target in targets] == [True, True]
    assert [target.found for target in targets] == pytest.approx([2.0, 1.1])
    for found in cells.values():
        found["cpu_per_audio_s"] = 0.01
        for part in ("alone", "crowded"):
            if part in found:
                found[part]["cpu_per_audio_s"] = None
    shown = load.values({"cells": cells})
    assert (shown["demo.ours"], shown["demo.theirs"]) == ("16", "8")
    assert shown["table"].count("\n") == 2 + 8 - 1
    cells["demo/u2moe with native kernels/64"] = {**cell(64, 0.1), "cpu_per_audio_s": 0.01}
    assert load.values({"cells": cells})["demo.ours"] == "16, with native kernels 64,"
    assert {
        target.name.partition(" held, ")[2].partition(" / ")[0]: target.found
        for target in load.targets({"cells": cells})[:2]
    } == {"u2moe": 2.0, "u2moe with native kernels": 8.0}


def test_several_workers_are_measured_without_the_other_server(tmp_path):
    plan = {"bundle": tmp_path, "name": "x", "folder": tmp_path, "streams": [8, 16], "seconds": 1.0, "cores": None}
    one, alone, three = (
        set(load.Plan(**plan, workers=workers, has_peer=has_peer, again=False).starts())
        for workers, has_peer in ((1, True), (1, False), (3, True))
    )
    assert one - alone == {"sherpa-onnx"}
    assert three == {f"{name}, 3 workers" for name in alone}


WORK = """
import time
while time.process_time() < 0.2:
    pass
print(flush=True)
input()
"""


def test_processor_time_is_that_of_all_processes():
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORK!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert servers.cpu_s(process.pid) >= 0.15  # the child's 0.2 s, whose parts the system rounds down to hundredths
        process.communicate(b"\n")


def test_nobody_heard_is_not_held():
    summary = load.summary(Heard(num_expected=3))
    assert not load.is_held({**summary, "streams": 1})


def test_clients_come_and_go(process, server):
    found = asyncio.run(churn.churn(process, 16, 0.0))
    assert sum(found["outcomes"].values()) == 16
    assert found["outcomes"].keys() <= set(churn.ENDS)
    assert "| open files, likewise |" in churn.values(found)["table"]
    server.wait_until_empty()


@pytest.mark.parametrize("protocol", damaged.PROTOCOLS)
def test_damaged_conversations(process, server, protocol):
    found = asyncio.run(damaged.try_all(process, server.ports["wyoming"], protocol, 3))
    assert found["outcomes"] == {"answered or closed": 3}
    assert damaged.values({"protocols": {protocol: found}})["inputs"] == "3"
    server.wait_until_empty()


def test_damage_comes_from_its_seed():
    messages = WEBSOCKETS["/stream"](np.zeros(10_000, np.int16))
    made = [damaged.damaged(messages, np.random.default_rng(seed)) for seed in range(20)]
    assert made == [damaged.damaged(messages, np.random.default_rng(seed)) for seed in range(20)]
    assert sum(each != messages for each in made) > 15


def test_what_has_grown_is_named():
    before = State(resident_mb=100.0, num_files=10)
    assert State(resident_mb=109.0, num_files=18).grown_since(before) == []
    assert len(State(resident_mb=111.0, num_files=19).grown_since(before)) == 2
