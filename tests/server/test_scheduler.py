"""Streams and the scheduler's thread, without a network."""

import asyncio
import contextlib
import functools

import numpy as np
import pytest
from feeding import CHUNKED, feed
from hypothesis import given, settings
from hypothesis import strategies as st
from tones import say, toy_recognizer

from u2moe.runtime import AudioError, ProviderError, StreamError
from u2moe.runtime.audio.arrays import as_samples
from u2moe.runtime.result import Result
from u2moe.runtime.server.errors import RecognitionError, TooLargeError
from u2moe.runtime.server.log import Metrics
from u2moe.runtime.server.options import Limits
from u2moe.runtime.server.scheduler import Round, Scheduler, ServedStream, rest_s

PATIENCE_S = 120


def run(coroutine):
    async def within_reason():
        async with asyncio.timeout(PATIENCE_S):
            return await coroutine

    return asyncio.run(within_reason())


async def until(holds):
    while not holds():  # noqa: ASYNC110 - the condition changes in a thread
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def scheduling(recognizer, **limits):
    """Yield a scheduler. Fail, instead of waiting forever, if a round does not deliver results to a stream."""
    scheduler = Scheduler(Metrics(), Limits(**limits))
    scheduler.open = functools.partial(scheduler.open, recognizer)
    loop, task, serve, lost = asyncio.get_running_loop(), asyncio.current_task(), scheduler._serve, []

    def serve_and_check(queues):
        sessions = list(queues)
        serve(queues)
        # In the event loop, so that it runs after the delivery of the results.
        loop.call_soon_threadsafe(check, [(session, session.num_rounds) for session in sessions])

    def check(served):
        lost.extend(number for session, number in served if session._num_rounds_done < number)
        if lost:
            task.cancel()

    scheduler._serve = serve_and_check
    try:
        yield scheduler
    except asyncio.CancelledError:
        assert not lost, f"a session did not get the results of its round {lost[0]}"
        raise
    finally:
        scheduler.stop()


def served(recognizer, options):
    return ServedStream(recognizer, recognizer.create_stream(options), 16_000, Limits(), lambda: None)


@pytest.fixture(scope="module")
def options(server):
    return server.service.default.stream_options


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


def test_a_source_that_is_faster_than_recognition_is_slowed(held, speech, options):
    """While recognition stands still, only one queue is filled. Then all audio is recognised."""

    async def feed():
        async with scheduling(held, queue_s=1.0) as scheduler:
            session = scheduler.open(held.create_stream(options), 16_000)
            feeding = asyncio.create_task(session.feed(speech()))
            await until(lambda: session.queued_s >= 1.0)
            await asyncio.sleep(0.2)
            assert not feeding.done()
            assert session.queued_s < 1.2
            held.release()
            await feeding
            session.finish()
            return [result.text async for result in session if result.is_final]

    assert run(feed()) == [segment.text for segment in held.transcribe(speech(), options=options).segments]


def test_a_source_whose_results_nobody_reads_is_slowed(demo, options):
    session = served(demo, options)
    session._finals.extend([None] * 100)

    async def feed():
        feeding = asyncio.create_task(session.feed(np.zeros(100, np.int16)))
        await asyncio.sleep(0.05)
        assert not feeding.done()
        session.take_finals()
        await feeding

    run(feed())


def test_live_sources_come_first(demo, options):
    async def choose():
        async with scheduling(demo) as scheduler:
            queues = [served(demo, options) for _ in range(12)]
            for number, queue in enumerate(queues):
                queue.num_taken = 1_600_000 * (number % 3 > 0)  # two of three are ahead
                queue.last_round = -number
            chosen = scheduler._choose(queues)
            assert {queue for queue in queues if not queue.num_taken} == set(chosen[:4])
            assert [queues.index(queue) for queue in chosen[4:]] == [11, 10, 8, 7]  # the streams that waited longest

    run(choose())


def test_a_source_gets_one_chunk_in_a_round(held, speech, options):
    """Even if much audio waits, the next round starts soon: speakers do not wait for files."""
    fed = []

    async def feed():
        async with scheduling(held) as scheduler:
            session = scheduler.open(held.create_stream(options), 16_000)
            accept = session.stream.accept_waveform

            def record(rate, samples):
                fed.append(len(samples))
                accept(rate, samples)

            session.stream.accept_waveform = record
            window = session.wanted_s * 16_000
            await session.feed(speech()[:48_000])
            await until(held.is_held.is_set)
            assert window <= sum(fed) < window + 0.16 * 16_000
            held.release()
            await session.settle()
            assert sum(fed) > 48_000 - 0.96 * 16_000  # the rest is not a complete chunk
            session.finish()
            await session.settle()
            assert sum(fed) == 48_000

    run(feed())


@given(st.floats(0, 1))
def test_chunks_wait_for_each_other_the_longer_the_more_there_is_to_do(round_s):
    rest = rest_s(round_s)
    assert 0 <= rest <= round_s  # a single stream hardly waits
    assert round_s + rest <= max(0.1, round_s) + 1e-9  # rounding
    assert rest_s(0.05) == 0.025


def test_what_is_fed_late_or_wrong(demo, options):
    async def feed():
        async with scheduling(demo, duration_s=2.0) as scheduler:
            session = scheduler.open(demo.create_stream(options), 16_000)
            with pytest.raises(AudioError, match="int64"):
                await session.feed(np.zeros(10, np.int64))
            with pytest.raises(TooLargeError, match="2 seconds"):
                await session.feed(np.zeros(40_000, np.int16))
            await session.feed(np.zeros(0, np.int16))
            assert not len(session._small)  # nothing accumulates
            session.finish()
            session.finish()
            await session.feed(np.zeros(1000, np.int16))  # dropped
            assert session.duration == 0
            await session.settle()
            assert session.is_over
            assert scheduler.streams == []

    run(feed())


def test_a_stream_that_fails_alone(demo, speech, options):
    async def feed():
        async with scheduling(demo) as scheduler:
            broken, whole = (scheduler.open(demo.create_stream(options), 16_000) for _ in range(2))
            broken.stream.input_finished()  # further samples are refused
            await broken.feed(speech()[:17_000])
            with pytest.raises(StreamError):
                await broken.settle()
            await whole.feed(speech())
            whole.finish()
            return [result.text async for result in whole if result.is_final]

    assert run(feed()) == [segment.text for segment in demo.transcribe(speech(), options=options).segments]


def test_a_stream_that_fails_in_a_batch_fails_alone(demo, speech, options, monkeypatch):
    texts = [segment.text for segment in demo.transcribe(speech(), options=options).segments]
    run_encoder, batches = demo.model.encoder.session.run, []

    def refuse_silence(feeds):
        batches.append(len(feeds["chunk"]))
        if ((feeds["chunk"] < -15).all(axis=(1, 2)) & (feeds["offset"] == 0)).any():
            raise ProviderError("it begins with digital silence")
        return run_encoder(feeds)

    monkeypatch.setattr(demo.model.encoder.session, "run", refuse_silence)

    async def feed():
        async with scheduling(demo) as scheduler:
            sessions = [scheduler.open(demo.create_stream(options), 16_000) for _ in range(4)]
            for number, session in enumerate(sessions):  # all in the same round
                session._put(as_samples(speech()[:24_000] * np.int16(number != 1)))
            scheduler._wake()
            await until(lambda: sessions[1].is_over)
            with pytest.raises(RecognitionError):
                await sessions[1].settle()
            for session in (sessions[0], *sessions[2:]):
                await session.feed(speech()[24_000:])
                session.finish()
            return [[result.text async for result in session if result.is_final] for session in sessions[::2]]

    assert run(feed()) == [texts, texts]
    assert batches[:5] == [4, 2, 1, 1, 2]


def test_those_in_a_round_that_fails_are_told(held, speech, options):
    async def feed():
        async with scheduling(held) as scheduler:
            sessions = [scheduler.open(held.create_stream(options), 16_000) for _ in range(3)]
            held.failure = RuntimeError("a mistake")
            await sessions[0].feed(speech()[:17_000])
            held.release()
            with pytest.raises(RecognitionError):
                await sessions[0].settle()
            await sessions[1].feed(speech())
            await sessions[1].settle()
            return sessions

    first, second, third = run(feed())
    assert (first.is_over, second.is_over, third.is_over) == (True, False, False)


def test_results_of_another_session_are_not_told(demo, options):
    one, other = (served(demo, options) for _ in range(2))
    said = Result(text="A SECRET", is_final=True, segment=0)
    mine = {"num_samples": 0, "finals": [said], "partial": None, "is_over": True}

    async def read(session):
        return [result async for result in session]

    one.deliver(Round(stream=other, number=1, **mine))
    other.deliver(Round(stream=other, number=2, **mine))  # the first was lost
    for session in (one, other):
        with pytest.raises(RecognitionError, match="lost or belongs to another"):
            run(read(session))
    assert one.take_finals() == other.take_finals() == []


def test_a_session_that_is_closed_is_forgotten(demo, speech, options):
    async def feed():
        async with scheduling(demo) as scheduler:
            session = scheduler.open(demo.create_stream(options), 16_000)
            await session.feed(speech()[:20_000])
            session.close()
            assert [result async for result in session] == []
            await until(lambda: not scheduler.streams)

    run(feed())
