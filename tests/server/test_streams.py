"""Streams: rounds of the scheduler without a network, admission of clients, and a server that stops."""

import asyncio
import contextlib
import functools
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
from dialects import END, PATIENCE_S, REALTIME, START, audio_messages, wait_until
from feeding import CHUNKED, feed
from hypothesis import given, settings
from hypothesis import strategies as st
from tones import say, toy_recognizer

from u2moe.runtime import AudioError, DecodingOptions, EndpointConfig, ProviderError, StreamError
from u2moe.runtime.audio.arrays import as_samples
from u2moe.runtime.decoding.stream_state import SearchWords
from u2moe.runtime.result import Result
from u2moe.runtime.server.accounts import Admission, Lateness
from u2moe.runtime.server.errors import RecognitionError, TooLargeError, UnavailableError
from u2moe.runtime.server.log import Metrics
from u2moe.runtime.server.options import Limits
from u2moe.runtime.server.scheduler import Round, Scheduler, ServedStream, rest_s

OPTIONS = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, PATIENCE_S))


@contextlib.asynccontextmanager
async def scheduling(recognizer, **limits):
    scheduler = Scheduler(Metrics(), Limits(**limits))
    scheduler.open = functools.partial(scheduler.open, recognizer)
    try:
        yield scheduler
    finally:
        scheduler.stop()


def served(recognizer):
    return ServedStream(recognizer, recognizer.create_stream(OPTIONS), 16_000, Limits(), lambda: None)


async def finals(session):
    return [result.text async for result in session if result.is_final]


def test_audio_that_arrives_with_the_end_is_recognised(monkeypatch):
    """The client's thread may feed and finish while the scheduler's thread asks whether the stream has ended."""
    stream = served(toy_recognizer())
    ends = property(lambda self: self._put(np.zeros(160, np.float32)) is None)
    monkeypatch.setattr(ServedStream, "_ends", ends)
    assert not stream.take(1).is_over


@settings(max_examples=8)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40_000), min_size=1, max_size=8), min_size=1, max_size=4),
    start=st.integers(0, 60_000),
)
def test_sessions_that_run_together_give_what_each_gives_alone(lengths, start):
    """The toy model is used, since batches of a real model are rounded differently on different processors."""
    toy = toy_recognizer()
    tones = say("ABCD" * 3, [0.2, 1.0, 0.4] * 4)[0]
    sources = [np.roll(tones, start * number)[: sum(own)] for number, own in enumerate(lengths)]

    async def recognise(scheduler, source, own):
        session = scheduler.open(toy.create_stream(CHUNKED), 16_000)
        for block in np.split(source, np.cumsum(own)[:-1]):
            await session.feed(block)
        session.finish()
        return [result async for result in session if result.is_final]

    async def recognise_all():
        async with scheduling(toy) as scheduler:
            tasks = (recognise(scheduler, source, own) for source, own in zip(sources, lengths, strict=True))
            return await asyncio.gather(*tasks)

    for source, results in zip(sources, run(recognise_all()), strict=True):
        assert results == feed(toy, source)


def test_live_sources_come_first(demo):
    async def choose():
        async with scheduling(demo) as scheduler:
            queues = [served(demo) for _ in range(12)]
            for number, queue in enumerate(queues):
                queue.num_taken = 1_600_000 * (number % 3 > 0)  # two of three are ahead
                queue.last_round = -number
            chosen = scheduler._choose(queues)
            assert {queue for queue in queues if not queue.num_taken} == set(chosen[:4])
            assert [queues.index(queue) for queue in chosen[4:]] == [11, 10, 8, 7]  # the streams that waited longest

    run(choose())


def test_a_source_gets_one_chunk_in_a_round(held, speech):
    """Even if much audio waits, the next round starts soon: speakers do not wait for files."""
    fed = []

    async def feed():
        async with scheduling(held) as scheduler:
            session = scheduler.open(held.create_stream(OPTIONS), 16_000)
            accept = session.stream.accept_waveform

            def record(rate, samples):
                fed.append(len(samples))
                accept(rate, samples)

            session.stream.accept_waveform = record
            window = session.wanted_s * 16_000
            await session.feed(speech()[:48_000])
            assert await asyncio.to_thread(held.is_held.wait, PATIENCE_S)
            assert window <= sum(fed) < window + 0.16 * 16_000
            held.release()
            await session.settle()
            assert sum(fed) > 48_000 - 0.96 * 16_000  # the rest is not a complete chunk
            session.finish()
            await session.settle()
            assert sum(fed) == 48_000

    run(feed())


@given(st.floats(0, 1), st.integers(2, 300))
def test_chunks_wait_for_each_other_the_longer_the_more_there_is_to_do(round_s, num_streams):
    rest = rest_s(round_s, num_streams)
    assert 0 <= rest <= round_s
    assert round_s + rest <= max(0.1, round_s) + 1e-9  # rounding
    assert rest_s(0.05, num_streams) == 0.025
    assert rest_s(round_s, 1) == 0.0  # a single stream has nothing to wait for


def test_what_is_fed_late_wrong_or_before_results_are_read(demo):
    async def feed():
        async with scheduling(demo, duration_s=2.0) as scheduler:
            session = scheduler.open(demo.create_stream(OPTIONS), 16_000)
            with pytest.raises(AudioError, match="int64"):
                await session.feed(np.zeros(10, np.int64))
            with pytest.raises(TooLargeError, match="2 seconds"):
                await session.feed(np.zeros(40_000, np.int16))
            await session.feed(np.zeros(0, np.int16))
            assert not len(session._small)  # nothing accumulates
            session._finals.extend([None] * 100)
            feeding = asyncio.create_task(session.feed(np.zeros(100, np.int16)))
            await asyncio.sleep(0.05)
            assert not feeding.done()  # since nobody reads the results
            session.take_finals()
            await feeding
            session.finish()
            session.finish()
            await session.feed(np.zeros(1000, np.int16))  # dropped
            assert session.duration == 100 / 16_000
            await session.settle()
            assert session.is_over
            assert scheduler.streams == []

    run(feed())


def test_streams_that_fail_in_a_round_fail_alone(demo, speech, texts, monkeypatch):
    run_encoder, batches = demo.model.encoder.session.run, []

    def refuse_silence(feeds):
        batches.append(len(feeds["chunk"]))
        if ((feeds["chunk"] < -15).all(axis=(1, 2)) & (feeds["offset"] == 0)).any():
            raise ProviderError("it begins with digital silence")
        return run_encoder(feeds)

    monkeypatch.setattr(demo.model.encoder.session, "run", refuse_silence)

    async def feed():
        async with scheduling(demo) as scheduler:
            sessions = [scheduler.open(demo.create_stream(OPTIONS), 16_000) for _ in range(5)]
            sessions[4].stream.input_finished()  # further samples are refused
            sessions[3]._live = None  # a mistake in the server
            for number, session in enumerate(sessions):  # all in the same round
                session._put(as_samples(speech()[:24_000] * np.int16(number != 1)))
            scheduler._wake()
            await asyncio.to_thread(wait_until, lambda: sessions[1].is_over)
            with pytest.raises(RecognitionError):
                await sessions[1].settle()
            with pytest.raises(StreamError):
                await sessions[4].settle()
            with pytest.raises(AttributeError):
                await sessions[3].settle()
            for session in (sessions[0], sessions[2]):
                await session.feed(speech()[24_000:])
                session.finish()
            return [await finals(session) for session in (sessions[0], sessions[2])]

    assert run(feed()) == [texts, texts]
    assert batches[:5] == [4, 2, 1, 1, 2]


def test_results_of_another_session_are_not_told(demo):
    one, other = (served(demo) for _ in range(2))
    said = Result(text="A SECRET", is_final=True, segment=0)
    mine = {"num_samples": 0, "finals": [said], "partial": None, "is_over": True}

    one.deliver(Round(stream=other, number=1, **mine))
    other.deliver(Round(stream=other, number=2, **mine))  # the first was lost
    for session in (one, other):
        with pytest.raises(RecognitionError, match="lost or belongs to another"):
            run(finals(session))
    assert one.take_finals() == other.take_finals() == []


# -------------------- admission, and a stopping server


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
needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.call([*NEW_NAMESPACE, "true"], stderr=subprocess.DEVNULL) != 0,
    reason="needs process namespaces",
)


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
