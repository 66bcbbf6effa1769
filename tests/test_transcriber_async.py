"""Transcribers within `async with`: iteration, back-pressure, errors."""

import asyncio
import itertools

import numpy as np
import pytest
from feeding import LIMIT_S, RATE
from transcribing import fail_at, feed_each, results_of

from u2moe.runtime import ProviderError, StreamError, Transcriber
from u2moe.runtime import transcriber as transcriber_module


async def feed_all(transcriber, blocks):
    for block in blocks:
        await transcriber.feed_async(RATE, block)
    transcriber.input_finished()


async def take_all(transcriber, events):
    async for event in transcriber:
        events.append(event)


def test_async_iteration_gives_every_segment_once(own, sound, blocks):
    async def run():
        events = []
        async with asyncio.timeout(LIMIT_S), Transcriber(own, max_queue_s=0.35) as transcriber:
            feeding = asyncio.create_task(feed_all(transcriber, [sound[:50_000], sound[50_000:]]))
            async for event in transcriber:
                assert transcriber.queued_s <= 0.35
                events.append(event)
            await feeding
        return events

    events = asyncio.run(run())
    assert [event for event in events if event.is_final] == results_of(own, blocks)[1]
    assert any(not event.is_final for event in events)
    assert all(a.is_final or b.is_final or a.text != b.text for a, b in itertools.pairwise(events))


def test_partial_results_that_wait_and_iterations_that_are_left(own, blocks):
    async def run():
        async with Transcriber(own) as transcriber:
            await feed_all(transcriber, blocks)
            await asyncio.to_thread(transcriber._thread.thread.join, LIMIT_S)
            return [event async for event in transcriber]

    assert asyncio.run(run()) == results_of(own, blocks)[1]

    async def run():
        async with asyncio.timeout(LIMIT_S), Transcriber(own) as transcriber:
            feed_each(transcriber, blocks)
            async for _ in transcriber:
                break
        return transcriber._thread.thread.is_alive()

    assert not asyncio.run(run())


def test_a_callback_takes_its_events_from_the_iteration(own, blocks):
    """A queued partial result is dropped when the segment is final."""

    async def run():
        finals = []
        async with Transcriber(own, on_final=finals.append) as transcriber:
            await transcriber.feed_async(RATE, np.concatenate(blocks)[:RATE])
            partial = await anext(transcriber)
            await feed_all(transcriber, [np.concatenate(blocks)[RATE:]])
            await asyncio.to_thread(transcriber._thread.thread.join)
            rest = [event async for event in transcriber]
        return finals, partial, rest

    finals, partial, rest = asyncio.run(run())
    assert finals == results_of(own, blocks)[1]
    assert not partial.is_final
    assert rest == []


def test_errors_are_raised_by_the_iteration(own, blocks):
    fail_at(own, 30, ProviderError("the device is gone"))

    async def run():
        events = []
        async with Transcriber(own) as transcriber:
            feed_each(transcriber, blocks)
            with pytest.raises(ProviderError, match="the device is gone"):
                await take_all(transcriber, events)
            with pytest.raises(StreamError, match="the device is gone"):
                await transcriber.feed_async(RATE, blocks[0])
        return events

    assert any(event.is_final for event in asyncio.run(run()))


def test_results_that_nobody_takes_are_an_error_not_a_leak(own, blocks, monkeypatch):
    monkeypatch.setattr(transcriber_module, "_MAX_KEPT", 2)

    async def run():
        events = []
        async with Transcriber(own) as transcriber:
            feed_each(transcriber, blocks)
            await asyncio.to_thread(transcriber._thread.thread.join, LIMIT_S)
            with pytest.raises(StreamError, match="2 results are waiting: iterate"):
                await take_all(transcriber, events)
        return events

    assert asyncio.run(run()) == results_of(own, blocks)[1][:2]


def test_what_needs_async_with_says_so(own, blocks):
    async def run():
        transcriber = Transcriber(own)
        with pytest.raises(StreamError, match="async with"):
            await transcriber.feed_async(RATE, blocks[0])
        with pytest.raises(StreamError, match="async with"):
            await anext(transcriber)
        transcriber.feed(RATE, blocks[0])
        with pytest.raises(StreamError, match="before feeding"):
            await transcriber.__aenter__()
        transcriber.close()

    asyncio.run(run())
