"""Admission of clients, and refusals."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import soundfile
from dialects import START

from u2moe.runtime.decoding.stream_state import SearchWords
from u2moe.runtime.server.accounts import Admission, Lateness
from u2moe.runtime.server.errors import StoppingError, UnavailableError
from u2moe.runtime.server.log import Metrics
from u2moe.runtime.server.models import ServedModel
from u2moe.runtime.server.options import ServerOptions

FULL = "the server is full"


def test_a_place_is_free_again_when_its_client_leaves(running):
    with running(capacity=2) as small:
        with small.connect() as first, small.connect("/sherpa"):
            first.start()
            with small.connect() as third:
                error = third.receive()
                assert (error["type"], error["code"]) == ("error", 1013)
                assert FULL in error["message"]
                assert third.close_code() == 1013
            assert small.metric("refusals", "full") == 1
            assert small.metric("streams") == 2
        small.wait_until_empty()
        with small.connect() as again:
            again.start()


def test_a_language_model_is_measured_with_all_else(demo, monkeypatch):
    """Streams with a language model are the plain ones: their cost is 1, and the capacity counts them."""
    model, fusion, found = ServedModel("demo", demo, ServerOptions()), SearchWords.fusion, []
    monkeypatch.setattr(SearchWords, "fusion", lambda *given: found.append(fusion(*given)) or found[-1])
    model.prepare(1)
    model.measure_capacity()
    assert found
    assert None not in found


def test_each_protocol_says_that_it_is_full_and_those_inside_are_recognised(running, speech, expected):
    with running(capacity=1) as small, small.connect() as first:
        first.start()
        for path in START:
            with small.connect(path) as refused:
                assert refused.close_code() == 1013, path
                assert FULL in refused.websocket.close_reason
    texts = [segment.text for segment in expected().segments]
    with running(capacity=1) as small, small.connect() as inside:
        inside.start(partials=False)
        samples = speech()
        for start in range(0, len(samples), 40_000):
            with small.connect() as refused:
                assert refused.close_code() == 1013
            inside.play(samples[start : start + 40_000])
        assert [event["text"] for event in inside.finish()[:-1]] == texts


def test_files_have_places_of_their_own(running, held, speech, tmp_path):
    soundfile.write(tmp_path / "talk.wav", speech(), 16_000)
    files = {"file": (tmp_path / "talk.wav").read_bytes()}
    with running(held, max_files=1) as small, ThreadPoolExecutor() as pool:
        first = pool.submit(small.post, files=files)
        assert held.is_held.wait(120)
        refused = small.post(files=files)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
        assert refused.json()["error"]["type"] == "server_error"
        held.release()
        assert first.result().status_code == 200
        assert small.post(files=files).status_code == 200


def test_capacity_can_be_measured_and_admission_counts(demo, running):
    assert ServedModel("demo", demo, ServerOptions()).measure_capacity() >= 1
    with running(capacity=None) as server:
        assert server.service.admission.num_slots >= 1
        assert server.metric("capacity") == server.service.admission.num_slots
    metrics = Metrics()
    admission = Admission(1, metrics, "files")
    with admission.slot():
        assert (admission.num_taken, metrics.total("files")) == (1, 1)
        with pytest.raises(UnavailableError, match="1 files"), admission.slot():
            pass
    assert (admission.num_taken, metrics.total("files")) == (0, 0)
    admission.is_stopping = True
    with pytest.raises(StoppingError), admission.slot():
        pass
    assert (metrics.total("refusals", "full"), metrics.total("refusals", "stopping")) == (1, 1)


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
        observe(0.5)
        assert not is_open()
        observe(0.2)
        assert is_open()
        observe(0.5)
        assert is_open()
        observe(2.0)
        assert not is_open()
        now[0] += 3
        assert is_open()
    assert metrics.total("refusals", "late") == 3
