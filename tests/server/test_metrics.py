"""Metrics for Prometheus."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from u2moe.runtime.server.log import LATENCY_BUCKETS, Metrics, shared_rows

LINE = re.compile(r'^[a-z0-9_]+(\{[a-z]+="[^"]*"\})? -?[0-9.e+-]+$')


def values(text):
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(LINE.match(line) for line in lines), lines
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_what_a_stream_leaves(running, speech, expected):
    with running(capacity=7) as server:
        assert values(server.get("/metrics").text)["u2moe_ready"] == 1
        with server.connect() as client:
            client.start()
            client.play(speech())
            events = client.finish()
            found = values(server.get("/metrics").text)
            assert found["u2moe_streams"] in (0, 1)
        server.wait_until_empty()
        found = values(server.get("/metrics").text)
    assert found["u2moe_capacity"] == 7
    assert found['u2moe_connections_total{protocol="stream"}'] == 1
    assert found['u2moe_audio_seconds_total{source="stream"}'] == pytest.approx(len(speech()) / 16_000)
    assert found["u2moe_real_time_factor"] > 0
    assert found["u2moe_queue_seconds"] == found["u2moe_streams"] == 0
    assert found['u2moe_results_total{kind="final"}'] == len(expected().segments)
    partials = sum(event["type"] == "partial" for event in events)
    assert found['u2moe_results_total{kind="partial"}'] >= partials > 0  # some may have been replaced by later ones
    for kind in ("partial", "final"):
        assert found[f"u2moe_{kind}_latency_seconds_count"] > 0
        assert found[f"u2moe_{kind}_latency_seconds_sum"] > 0
        assert (
            found[f'u2moe_{kind}_latency_seconds_bucket{{le="+Inf"}}'] == found[f"u2moe_{kind}_latency_seconds_count"]
        )


@given(st.lists(st.floats(0, 20), max_size=30))
def test_a_histogram_is_cumulative(latencies):
    metrics = Metrics()
    for latency in latencies:
        metrics.observe("final_latency_seconds", latency)
    found = values(metrics.text())
    for bound in LATENCY_BUCKETS:
        wanted = sum(latency <= bound for latency in latencies)
        assert found[f'u2moe_final_latency_seconds_bucket{{le="{bound}"}}'] == wanted
    assert found["u2moe_final_latency_seconds_count"] == len(latencies)
    assert found["u2moe_final_latency_seconds_sum"] == pytest.approx(np.sum(latencies), abs=1e-5)


def test_workers_are_summed():
    rows = shared_rows(3)
    workers = [Metrics((), rows, worker) for worker in range(3)]
    for number, metrics in enumerate(workers, start=1):
        metrics.count("audio_seconds", "file", number)
        metrics.set("capacity", 10)
    assert values(workers[0].text())['u2moe_audio_seconds_total{source="file"}'] == 6
    assert workers[2].total("capacity") == 30
