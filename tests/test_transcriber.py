"""Transcribers with callbacks and within `async with`: ordered events, errors, bounded queues, and closing."""

import asyncio
import dataclasses
import gc
import itertools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from feeding import LIMIT_S, OPTIONS, RATE, Gate, fail_at, feed_each, results_of

from u2moe.runtime import AudioError, AudioOverflowError, ProviderError, StreamError, Transcriber, transcriber_thread
from u2moe.runtime import transcriber as transcriber_module


@pytest.fixture(scope="module")
def results(recognizer, blocks):
    return results_of(recognizer, blocks)


@pytest.fixture(scope="module")
def segments(results):
    return results[1]


def test_every_change_is_told_and_every_segment_once(own, blocks, results):
    (partials, segments), told, finals, errors, threads = results, [], [], [], set()
    assert len(partials) > len(segments) >= 3
    buffer = np.empty_like(blocks[0])

    def on_final(result):
        finals.append(result)
        threads.add(threading.current_thread())

    with Transcriber(own, on_partial=told.append, on_final=on_final, on_error=errors.append) as transcriber:
        for block in blocks:
            buffer[:] = block  # the caller may reuse its buffer
            transcriber.feed(RATE, buffer)
        buffer[:] = 0
        assert transcriber.duration == pytest.approx(4.0)
    assert (finals, errors, threads) == (segments, [], {transcriber._thread.thread})
    assert [(result.segment, result.text) for result in told] == partials
    assert not any(result.is_final for result in told)
    assert not transcriber._thread.thread.is_alive()


def test_text_that_turns_out_to_be_nothing_is_taken_back(own, blocks):
    told, finals = [], []
    with Transcriber(own, on_partial=told.append, on_final=finals.append) as transcriber:
        source = transcriber._thread.live.stream.state
        conclude = source.conclude
        source.conclude = lambda result: conclude(dataclasses.replace(result, text=""))
        feed_each(transcriber, blocks[:11])
    assert finals == []
    assert told
    assert told[-1].text == ""


def test_what_is_too_much_is_refused_whole_and_can_be_fed_again(own, blocks, segments):
    gate, finals = Gate(), []
    with Transcriber(own, on_final=finals.append, on_error=gate, max_queue_s=1.0) as transcriber:
        transcriber.report(AudioError("stop here"))
        assert gate.reached.wait(LIMIT_S)
        feed_each(transcriber, blocks[:9])
        assert transcriber.queued_s == pytest.approx(0.9)
        transcriber.feed(RATE, blocks[9])
        with pytest.raises(AudioOverflowError, match=r"1\.00 s of audio is waiting.*limit of 1 s") as refusal:
            transcriber.feed(RATE, blocks[10])
        assert (refusal.value.duration, transcriber.duration) == (pytest.approx(0.1), pytest.approx(1.0))
        gate.open.set()
        for block in blocks[10:]:
            while transcriber.queued_s > 0.85:
                threading.Event().wait(0.01)
            transcriber.feed(RATE, block)
    assert finals == segments


def check_refused(transcriber, blocks, message):
    feeds = [partial(transcriber.feed, RATE, samples) for samples in (blocks[0], [])]
    for call in (*feeds, partial(transcriber.report, AudioError("late")), transcriber.input_finished):
        with pytest.raises(StreamError, match=message):
            call()


def test_a_forked_process_has_no_thread(own, blocks, monkeypatch):
    with Transcriber(own) as transcriber:
        monkeypatch.setattr("os.getpid", lambda: -1)
        check_refused(transcriber, blocks, "was created before the process forked: create a new one")
        with transcriber._thread.changed:  # as if a thread of the parent held it during the fork
            ending = threading.Thread(target=lambda: (transcriber._thread.finish(), transcriber._thread._abandon()))
            ending.start()
            ending.join(LIMIT_S)
            assert not ending.is_alive()
        monkeypatch.undo()


def test_failed_decoding_is_told_after_the_segments_before_it_and_ends_the_transcriber(own, blocks):
    stream, number, finals, errors = own.create_stream(OPTIONS), 0, [], []
    while not stream.is_endpoint():
        stream.accept_waveform(RATE, blocks[number])
        own.decode_streams([stream])
        number += 1
    fail_at(own, number, ProviderError("the device is gone"))
    transcriber = Transcriber(own, on_final=finals.append, on_error=errors.append)
    feed_each(transcriber, blocks[:number])
    transcriber._thread.thread.join(LIMIT_S)
    with pytest.raises(StreamError) as refusal:
        transcriber.feed(RATE, blocks[number])
    assert isinstance(refusal.value.__cause__, ProviderError)
    check_refused(transcriber, blocks, "ended by an error: the device is gone")
    transcriber.close()
    assert [str(error) for error in errors] == ["the device is gone"]
    assert finals == stream.take_segments()


@pytest.mark.parametrize("on_error", ["tells", "raises", None])
def test_errors_in_callbacks_are_told_or_end_the_transcriber_and_are_raised_by_close(own, blocks, segments, on_error):
    finals, told = [], []

    def on_final(result):
        finals.append(result)
        raise KeyError(result.segment)

    def raised(error):
        raise error

    transcriber = Transcriber(own, on_final=on_final, on_error={"tells": told.append, "raises": raised}.get(on_error))
    feed_each(transcriber, blocks)
    if on_error == "tells":
        transcriber.close()
        assert finals == segments
        assert [error.args for error in told] == [(result.segment,) for result in finals]
        return
    with pytest.raises(KeyError, match="0"):
        transcriber.close()
    transcriber.close()
    assert finals == segments[:1]
    with pytest.raises(StreamError, match="0"):
        transcriber.feed(RATE, blocks[0])


def test_what_is_closed_or_was_never_open_neither_warns_nor_hides_an_error_of_the_block(own, blocks):
    """Warnings are errors here."""
    for name in ("on_partial", "on_final", "on_error"):
        with pytest.raises(ValueError, match=f"{name} must be a function, got 5"):
            Transcriber(own, **{name: 5})
    for limit in (0, float("inf")):
        with pytest.raises(ValueError, match="max_queue_s must be a number of seconds above 0"):
            Transcriber(own, max_queue_s=limit)
    Transcriber(own).close()
    gc.collect()
    fail_at(own, 1, ProviderError("the device is gone"))
    transcriber = Transcriber(own)
    transcriber.feed(RATE, blocks[0])
    with pytest.raises(ZeroDivisionError), transcriber:
        raise ZeroDivisionError
    fail_at(own, 1, ProviderError("the device is gone"))
    with pytest.raises(ProviderError, match="the device is gone"), Transcriber(own) as transcriber:
        transcriber.feed(RATE, blocks[0])


def test_reports_come_in_order_and_those_that_wait_are_bounded(own, blocks, monkeypatch):
    monkeypatch.setattr(transcriber_thread, "_MAX_REPORTS", 3)
    gate = Gate()
    told = gate.calls
    with Transcriber(own, on_final=told.append, on_error=gate) as transcriber:
        transcriber.report(AudioError("stop here"))
        assert gate.reached.wait(LIMIT_S)
        for number in range(9):
            transcriber.report(AudioError(str(number)))
        gate.open.set()
        while transcriber._thread._items:
            threading.Event().wait(0.01)
        feed_each(transcriber, blocks[:20])
        transcriber.report(AudioError("later"))
        feed_each(transcriber, blocks[20:])
    assert [str(event) for event in told if isinstance(event, AudioError)] == ["stop here", "0", "1", "2", "later"]
    assert 4 < [str(event) for event in told].index("later") < len(told) - 1


def test_use_after_the_end(own, blocks):
    transcriber = Transcriber(own)
    transcriber.feed(RATE, blocks[0])
    for end in (transcriber.input_finished, transcriber.close, transcriber.close):
        end()
        check_refused(transcriber, blocks, "input of this transcriber is finished")


def test_two_threads_may_feed_and_no_portion_is_torn(own, monkeypatch):
    taken = []
    transcriber = Transcriber(own)
    monkeypatch.setattr(transcriber._thread.live.stream, "accept_waveform", lambda rate, samples: taken.append(samples))

    def feed(sign):
        for number in range(1, 201):
            transcriber.feed(RATE, np.full(50, sign * number / 1000, np.float32))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(feed, (1, -1)))
    transcriber.close()
    assert all(len(samples) == 50 and len(set(samples.tolist())) == 1 for samples in taken)
    values = [round(1000 * samples[0].item()) for samples in taken]
    assert [value for value in values if value > 0] == list(range(1, 201))
    assert [-value for value in values if value < 0] == list(range(1, 201))


def test_close_from_a_callback_does_not_wait_for_itself(own, blocks, segments):
    finals = []

    def on_final(result):
        finals.append(result)
        transcriber.close()

    transcriber = Transcriber(own, on_final=on_final)
    transcriber.feed(RATE, np.concatenate(blocks))
    transcriber._thread.thread.join(LIMIT_S)
    assert not transcriber._thread.thread.is_alive()
    assert finals == segments


@pytest.mark.slow
def test_an_interpreter_that_forgets_to_close_ends(bundle):
    program = f"""
import numpy as np
from u2moe.runtime import Recognizer, Transcriber
recognizer = Recognizer.from_pretrained({str(bundle.path)!r})
transcribers = [Transcriber(recognizer, on_final=print) for _ in range(3)]
for transcriber in transcribers:
    for _ in range(3):
        transcriber.feed(16000, np.random.default_rng(0).normal(0, 0.1, 16000))
raise SystemExit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=LIMIT_S, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_an_unclosed_transcriber_warns_and_recognises_what_it_was_fed(own, blocks, segments):
    finals = []
    transcriber = Transcriber(own, on_final=finals.append)
    feed_each(transcriber, blocks)
    thread = transcriber._thread.thread
    with pytest.warns(ResourceWarning, match="unclosed transcriber"):
        del transcriber
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert finals == segments


def test_what_is_refused_changes_nothing(own, blocks, segments):
    """Refused samples do not set the sample rate either."""
    finals, bad = [], (np.full(5, np.nan, np.float32), np.zeros((5, 2), np.float32), np.zeros(5, np.int32))
    with Transcriber(own, on_final=finals.append) as transcriber:
        with pytest.raises(AudioOverflowError):
            transcriber.feed(8000, np.zeros(88_000, np.float32))
        with pytest.raises(AudioError, match=r"sample_rate must be the first argument: \(sample_rate, samples\)"):
            transcriber.feed(blocks[0], RATE)
        for block in blocks:
            transcriber.feed(RATE, block)
            for samples in bad:
                with pytest.raises(AudioError):
                    transcriber.feed(RATE, samples)
        with pytest.raises(AudioError, match="sample rate changed from 16000 to 8000 Hz"):
            transcriber.feed(8000, blocks[0])
    assert finals == segments


async def feed_all(transcriber, blocks):
    for block in blocks:
        await transcriber.feed_async(RATE, block)
    transcriber.input_finished()


def test_async_iteration_gives_every_segment_once(own, sound, segments):
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
    assert [event for event in events if event.is_final] == segments
    assert any(not event.is_final for event in events)
    assert all(a.is_final or b.is_final or a.text != b.text for a, b in itertools.pairwise(events))


@pytest.mark.parametrize("has_callback", [False, True])
def test_partial_results_that_wait_are_dropped_and_a_callback_takes_its_events(own, blocks, segments, has_callback):
    async def run():
        finals = []
        async with Transcriber(own, on_final=finals.append if has_callback else None) as transcriber:
            await transcriber.feed_async(RATE, np.concatenate(blocks)[:RATE])
            first = await anext(transcriber)
            await feed_all(transcriber, [np.concatenate(blocks)[RATE:]])
            await asyncio.to_thread(transcriber._thread.thread.join, LIMIT_S)
            return finals, first, [event async for event in transcriber]

    finals, first, rest = asyncio.run(run())
    assert not first.is_final
    assert (finals, rest) == ((segments, []) if has_callback else ([], segments))


def test_an_iteration_may_be_left(own, blocks):
    async def run():
        async with asyncio.timeout(LIMIT_S), Transcriber(own) as transcriber:
            feed_each(transcriber, blocks)
            async for _ in transcriber:
                break
        return transcriber._thread.thread.is_alive()

    assert not asyncio.run(run())


@pytest.mark.parametrize("limit", [None, 2])
def test_the_iteration_raises_errors_and_results_that_nobody_takes_are_one(own, blocks, segments, monkeypatch, limit):
    if limit is None:
        fail_at(own, 30, ProviderError("the device is gone"))
    else:
        monkeypatch.setattr(transcriber_module, "_MAX_KEPT", limit)
    kind, message = (ProviderError, "the device is gone") if limit is None else (StreamError, "2 results are waiting")
    events = []

    async def take_all(transcriber, events):
        async for event in transcriber:
            events += [event]

    async def run():
        async with Transcriber(own) as transcriber:
            feed_each(transcriber, blocks)
            await asyncio.to_thread(transcriber._thread.thread.join, LIMIT_S)
            with pytest.raises(kind, match=message):
                await take_all(transcriber, events)
            with pytest.raises(StreamError, match=message):
                await transcriber.feed_async(RATE, blocks[0])

    asyncio.run(run())
    finals = [event for event in events if event.is_final]
    assert finals == segments[: limit or len(finals)] != []


def test_what_needs_async_with_says_so(own, blocks):
    async def run():
        transcriber = Transcriber(own)
        for call in (transcriber.feed_async(RATE, blocks[0]), anext(transcriber)):
            with pytest.raises(StreamError, match="async with"):
                await call
        transcriber.feed(RATE, blocks[0])
        with pytest.raises(StreamError, match="before feeding"):
            await transcriber.__aenter__()
        transcriber.close()

    asyncio.run(run())
