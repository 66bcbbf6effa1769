"""Streams: silence around cut sources, windows and pauses of long recordings, several threads, and failures."""

import dataclasses
import subprocess
import sys
import threading
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
from feeding import CHUNKED, RATE, RULES, TINY, check_segments, feed
from hypothesis import given
from hypothesis import strategies as st
from manifests import with_decoding
from tones import say, toy_recognizer

from u2moe.runtime import Bundle, DecodingOptions, EndpointConfig, EndpointRule, ProviderError, StreamError
from u2moe.runtime.audio.padding import Padding, padded
from u2moe.runtime.bundle.manifest import FeatureConfig
from u2moe.runtime.decoding.language_model_weights import EncodedRecordings
from u2moe.runtime.model.features import fbank
from u2moe.runtime.result import moved

PADDING_S = 0.3
FEATURES = FeatureConfig()
NUM = round(PADDING_S * RATE)
QUIET = np.full(RATE // 10, 0.25, np.float32)  # a constant offset
LOUD = np.resize(np.float32([0.25, 0.26]), RATE // 10)


def with_padding(options, padding_s=PADDING_S):
    return dataclasses.replace(options, padding_s=padding_s)


@pytest.mark.parametrize(("first", "num_before"), [(QUIET, 0), (LOUD, NUM)])
@pytest.mark.parametrize(("last", "num_after"), [(QUIET, 0), (LOUD, NUM)])
@given(st.lists(st.integers(0, 700), max_size=5))
def test_silence_comes_where_a_source_is_in_the_middle_of_a_sound(first, num_before, last, num_after, lengths):
    """Only the first and the last 25 ms count, however the samples are split."""
    samples = np.concatenate([first, LOUD, QUIET, LOUD, last])
    padding = Padding(PADDING_S, FEATURES.sample_rate, FEATURES.frame_len)
    parts = [padding.accept(part) for part in np.split(samples, np.cumsum(lengths))]
    heard = np.concatenate([*parts, padding.finish()])
    assert padding.num_before == num_before
    assert np.array_equal(heard, np.pad(samples, (num_before, num_after)))
    assert np.array_equal(padded(samples, PADDING_S, FEATURES.sample_rate, FEATURES.frame_len), heard)


@given(st.lists(st.integers(0, 9000), max_size=6), st.sampled_from(["ctc_prefix_beam", "ctc_greedy"]))
def test_a_source_is_heard_with_its_padding(lengths, search):
    """However the samples are split, the result is as if they had zeros around them; only the times differ."""
    toy, options = toy_recognizer(), dataclasses.replace(CHUNKED, search=search)
    samples, starts = say("AB", [0.4, 2.0])
    samples = samples[round((starts[0] + 0.1) * RATE) : round((starts[1] + 0.2) * RATE)]
    expected = feed(toy, np.pad(samples, NUM), [], options)
    found = feed(toy, samples, lengths, with_padding(options))
    assert [result.text for result in found] == ["A", "B"]
    assert found == [_without_padding(result, len(samples) * 1000 // RATE / 1000) for result in expected]


def _without_padding(result, end_s):
    def limit(time):
        return min(max(time, 0.0), end_s)

    own = moved(result, -PADDING_S, result.segment)
    return dataclasses.replace(
        own, start=limit(own.start), end=limit(own.end), committed_end=limit(own.committed_end),
        times=list(map(limit, own.times)),
        words=[dataclasses.replace(word, start=limit(word.start), end=limit(word.end)) for word in own.words],
        nbest=[dataclasses.replace(each, times=list(map(limit, each.times))) for each in own.nbest],
    )  # fmt: skip


def test_times_stay_within_the_source_and_weights_are_found_with_its_padding(recognizer, sound):
    """Even if random weights find words in the silence around it."""
    for options in (DecodingOptions(), DecodingOptions(chunk_size=4), DecodingOptions(search="attention")):
        transcript = recognizer.transcribe(sound[:24_000], options=with_padding(options, 1.0))
        assert transcript.duration == 1.5
        for segment in transcript.segments:
            assert all(0 <= word.start <= word.end <= transcript.duration for word in segment.words)
            assert all(0 <= time <= transcript.duration for time in segment.times)
    bundle, model = recognizer.bundle, recognizer.model
    manifest = with_decoding(bundle.manifest, padding_s=PADDING_S)
    encoded, samples = EncodedRecordings(Bundle(bundle.path, manifest, bundle.tokens), model), np.resize(LOUD, RATE)
    encoded.add("A", samples)
    expected = model.encode(fbank(np.pad(samples, NUM), manifest.features))
    assert np.array_equal(encoded.recordings[0].encoder_out, expected)


@pytest.mark.parametrize("padding_s", [0.0, 0.18, 0.6, 2.0])
@given(st.lists(st.integers(1, 3000), max_size=8), st.booleans())
def test_what_is_missing_is_never_too_much(padding_s, lengths, is_loud):
    """No window comes before that much more audio, but possibly later, so nothing waits too long."""
    stream = toy_recognizer().create_stream(with_padding(CHUNKED, padding_s))
    for length in [*lengths, *[160] * 150]:
        missing_s = stream.missing_s
        stream.accept_waveform(RATE, np.resize(LOUD if is_loud else QUIET, length))
        assert not stream.is_ready or length / RATE >= missing_s
        if stream.is_ready:
            return
    raise AssertionError("no window was found")


def test_a_result_has_the_times_of_its_own_source(toy, monkeypatch):
    """No other thread may reset the stream in between."""
    stream = toy.create_stream(with_padding(CHUNKED))
    source, locked = stream.state, []

    def presented(result):
        other = threading.Thread(target=lambda: locked.append(not source.lock.acquire(blocking=False)))
        other.start()
        other.join()
        return result

    monkeypatch.setattr(source, "presented", presented)
    stream.get_result()
    assert locked == [True]


def test_silence_comes_anew_after_a_reset(toy):
    samples, _ = say("AB", [0.4, 2.0])
    stream, results = toy.create_stream(with_padding(CHUNKED)), []
    for _ in range(2):
        stream.accept_waveform(RATE, samples)
        stream.input_finished()
        toy.decode_streams([stream])
        results.append(stream.take_segments())
        stream.reset()
    assert results[0] == results[1] == feed(toy, samples, [], with_padding(CHUNKED))


@pytest.fixture
def short_windows(monkeypatch):
    """Recordings of more than four seconds count as long."""
    monkeypatch.setattr("u2moe.runtime.decoding.stream_state.LONGEST_WINDOW_S", 4.0)


PAUSES = [0.3, 0.2, 0.6, 0.2, 1.1, 0.3]


def heard(toy, samples, **endpoint):
    return toy.transcribe(samples, options=DecodingOptions(endpoint=EndpointConfig(**endpoint)))


@pytest.mark.usefixtures("short_windows")
def test_silence_around_a_recording_makes_it_no_long_one(toy):
    """3.9 s that begin and end within a sound, with pauses at which a long recording would be cut."""
    samples, starts = say("ABC", [0.3, 1.0, 1.0], tone_s=0.7)
    samples = samples[round((starts[0] + 0.1) * RATE) : round((starts[-1] + 0.6) * RATE)]
    assert 3.8 < len(samples) / RATE < 4.0
    options = DecodingOptions(endpoint=EndpointConfig(), padding_s=1.0)
    assert toy.transcribe(samples, options=options).text == "A B C"
    assert toy.model.session.durations == pytest.approx([len(samples) / RATE + 2], abs=0.08)


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize(("pause", "num_segments"), [(0.4, 3), (0.9, 2)])
def test_full_context_ends_amid_pauses(toy, pause, num_segments):
    samples, starts = say("ABCDAB", PAUSES)
    late = EndpointRule(min_utterance_length=20.0)
    transcript = heard(toy, samples, rule1=None, rule2=None, rule3=late, pause=pause)
    assert transcript.text == "A B C D A B"
    check_segments(transcript.segments, transcript.duration)
    ends = [start - long / 2 for start, long in zip(starts, PAUSES, strict=True) if long > pause and start > 1]
    assert toy.model.session.durations == pytest.approx(np.diff([0.0, *ends, len(samples) / RATE]), abs=0.08)
    assert len(transcript.segments) == len(toy.model.session.durations) == num_segments


@pytest.mark.usefixtures("short_windows")
def test_windows_without_pause_are_full_and_what_they_end_amid_is_encoded_again(toy):
    assert heard(toy, say("ABCDAB", PAUSES)[0], pause=None).text == "A B C D A B"
    assert toy.model.session.durations[0] == pytest.approx(4.0, abs=0.1)
    # A word at the end of the window, in an utterance from its second half, is recognised once and in full
    samples, starts = say("ABCD", [0.9, 2.5, 0.2, 0.2], tone_s=0.4)
    assert starts[1] + 0.1 < 4.0 < starts[1] + 0.3
    transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=dataclasses.replace(RULES, pause=None)))
    assert [segment.text for segment in transcript.segments] == ["A", "B C D"]
    assert starts[1] <= transcript.segments[1].times[0] <= starts[1] + 0.4


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("pause", [0.4, None])
def test_a_pause_in_which_somebody_speaks_quietly_is_none(pause):
    """A loud speaker and one 50 dB below, whose words are longer than a pause: no word is cut."""
    loud, _ = say("ABC", [0.3, 0.3, 0.3])
    quiet, _ = say("DADAD", [0.05] * 5, tone_s=0.7)
    samples = np.concatenate([loud[: -RATE // 2], 10 ** (-50 / 20) * quiet[: -RATE // 2], loud])
    transcript = heard(toy_recognizer(threshold=7.0), samples, pause=pause)
    assert transcript.text == "A B C D A D A D A B C"
    check_segments(transcript.segments, transcript.duration)


def test_recordings_of_more_than_half_a_minute_are_cut(toy):
    assert heard(toy, say("AB" * 10, [0.3, 3.0] * 10)[0]).text == " ".join("AB" * 10)
    assert max(toy.model.session.durations) <= 30 < sum(toy.model.session.durations)


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

recognizer, has_begun = Recognizer.from_pretrained(), threading.Event()

def work():
    while True:
        recognizer.transcribe(DEMO_FOLDER / "clips" / "command.flac", on_progress=lambda _: has_begun.set())

for _ in range(3): threading.Thread(target=work, daemon=True).start()
has_begun.wait()
"""


@pytest.mark.slow
def test_the_interpreter_exits_while_daemon_threads_recognise():
    done = subprocess.run([sys.executable, "-c", DAEMONS], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
