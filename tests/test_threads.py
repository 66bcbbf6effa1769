"""Streams and recognisers in several threads, and after a failure."""

import subprocess
import sys
import threading
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
from feeding import CHUNKED, RATE, TINY, feed
from tones import say

from u2moe.runtime import ProviderError, StreamError


def in_threads(functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_one_thread_feeds_while_another_decodes(toy):
    samples, _ = say("ABCD" * 5, [0.3] * 20)
    stream = toy.create_stream(CHUNKED)

    def feed_portions():
        for start in range(0, len(samples), 999):
            stream.accept_waveform(RATE, samples[start : start + 999])
        stream.input_finished()

    feeder, segments = threading.Thread(target=feed_portions), []
    feeder.start()
    while not stream.get_result().is_final:
        toy.decode_streams([stream])
        segments += stream.take_segments()
    feeder.join()
    assert segments == feed(toy, samples)


def test_two_threads_feed_and_nothing_is_torn(toy):
    stream = toy.create_stream(CHUNKED)
    in_threads([lambda: [stream.accept_waveform(RATE, np.zeros(160, np.float32)) for _ in range(300)]] * 2)
    stream.input_finished()
    toy.decode_streams([stream])
    assert stream.duration == 6.0
    assert stream.state.utterance.end == ((600 * 160 - 400) // 160 + 1 - 7) // 4 + 1


def test_many_threads_share_a_recogniser(recognizer, sound):
    sounds = [np.roll(sound, 4000 * i) for i in range(4)]
    expected = [recognizer.transcribe(samples, options=TINY) for samples in sounds]
    found = [None] * 4

    def transcribe(i):
        found[i] = recognizer.transcribe(sounds[i], options=TINY)

    in_threads([partial(transcribe, i) for i in range(4)])
    assert found == expected


def test_a_second_thread_may_not_decode_the_same_stream(toy):
    stream = toy.create_stream(CHUNKED)
    with stream.state.claim(), pytest.raises(StreamError, match="decoded by another thread"):
        toy.decode_streams([stream])
    toy.decode_streams([stream])


def test_after_a_failure_a_stream_must_be_reset(toy):
    samples, _ = say("AB", [0.3, 0.3])
    stream, other = toy.create_stream(CHUNKED), toy.create_stream(CHUNKED)
    for each in (stream, other):
        each.accept_waveform(RATE, samples)
    toy.model.session.fails = True
    with pytest.raises(ProviderError, match="gone"):
        toy.decode_streams([stream])
    toy.model.session.fails = False
    for use in (
        stream.input_finished,
        lambda: stream.accept_waveform(RATE, samples),
        lambda: toy.decode_streams([stream]),
    ):
        with pytest.raises(StreamError, match="has failed"):
            use()
    toy.decode_streams([other])
    assert other.get_result().text == "A B"
    stream.reset()
    stream.accept_waveform(RATE, samples)
    toy.decode_streams([stream])
    assert stream.get_result().text == "A B"


def test_a_stream_fails_alone_at_every_step(toy, monkeypatch):
    samples, _ = say("AB", [0.3, 0.3])
    for step in ("advance", "conclude"):
        streams = [toy.create_stream(CHUNKED) for _ in range(5)]
        for stream in streams:
            stream.accept_waveform(RATE, samples)
            stream.input_finished()
        monkeypatch.setattr(streams[3].state, step, Mock(side_effect=ValueError(step)))
        with pytest.raises(ValueError, match=step):
            toy.decode_streams(streams)
        assert [stream.failure is None for stream in streams] == [True, True, True, False, True]
        assert {stream.get_result().text for stream in streams if stream.failure is None} == {"A B"}
        streams[3].reset()
        assert streams[3].failure is None


DAEMONS = """
import threading
from u2moe.runtime import Recognizer
from u2moe.runtime.bundle_location import DEMO_FOLDER

recognizer = Recognizer.from_pretrained()
has_begun = threading.Event()

def work():
    while True:
        recognizer.transcribe(DEMO_FOLDER / "clips" / "command.flac", on_progress=lambda _: has_begun.set())

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
has_begun.wait()
"""


@pytest.mark.slow
def test_the_interpreter_exits_while_daemon_threads_recognise():
    done = subprocess.run([sys.executable, "-c", DAEMONS], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
