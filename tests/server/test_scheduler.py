"""Streams and the scheduler's thread, without a network."""

import asyncio
import contextlib
import functools

import numpy as np
import pytest
from dialects import PATIENCE_S
from feeding import CHUNKED, feed
from hypothesis import given, settings
from hypothesis import strategies as st
from tones import say, toy_recognizer

from u2moe.runtime import AudioError, DecodingOptions, EndpointConfig, ProviderError, StreamError
from u2moe.runtime.audio.arrays import as_samples
from u2moe.runtime.result import Result
from u2moe.runtime.server.errors import RecognitionError, TooLargeError
from u2moe.runtime.server.log import Metrics
from u2moe.runtime.server.options import Limits
from u2moe.runtime.server.scheduler import Round, Scheduler, ServedStream, rest_s

OPTIONS = DecodingOptions(chunk_size=16, num_left_chunks=4, endpoint=EndpointConfig())


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
            await until(lambda: sessions[1].is_over)
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
