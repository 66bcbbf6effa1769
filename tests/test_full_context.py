"""Full context: windows of long recordings, the pauses where they end, and the frames that are encoded again."""

import dataclasses

import numpy as np
import pytest
from feeding import RATE, RULES, check_segments
from tones import say, toy_recognizer

from u2moe.runtime import DecodingOptions, EndpointConfig, EndpointRule


@pytest.fixture
def short_windows(monkeypatch):
    """Recordings of more than four seconds count as long."""
    monkeypatch.setattr("u2moe.runtime.decoding.stream_state.LONGEST_WINDOW_S", 4.0)


def test_a_recording_that_fits_one_window_is_encoded_whole(toy):
    samples, _ = say("ABCDAB", [0.3, 0.2, 0.6, 0.2, 1.1, 0.3])
    transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=EndpointConfig()))
    assert transcript.text == "A B C D A B"
    assert len(transcript.segments) == 1
    assert toy.model.session.durations == pytest.approx([len(samples) / RATE], abs=0.08)


@pytest.mark.usefixtures("short_windows")
def test_silence_around_a_recording_makes_it_no_long_one(toy):
    """3.9 s that begin and end within a sound, with pauses at which a long recording would be cut."""
    samples, starts = say("ABC", [0.3, 1.0, 1.0], tone_s=0.7)
    samples = samples[round((starts[0] + 0.1) * RATE) : round((starts[-1] + 0.6) * RATE)]
    options = DecodingOptions(endpoint=EndpointConfig(), padding_s=1.0)
    assert 3.8 < len(samples) / RATE < 4.0
    assert toy.transcribe(samples, options=options).text == "A B C"
    assert toy.model.session.durations == pytest.approx([len(samples) / RATE + 2], abs=0.08)


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("pause", [0.4, 0.9])
def test_full_context_ends_amid_pauses(toy, pause):
    """In a long recording, words after a pause are encoded without the words before it."""
    pauses = [0.3, 0.2, 0.6, 0.2, 1.1, 0.3]
    samples, starts = say("ABCDAB", pauses)
    late = EndpointRule(min_utterance_length=20.0)
    endpoint = EndpointConfig(rule1=None, rule2=None, rule3=late, pause=pause)
    transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=endpoint))
    assert transcript.text == "A B C D A B"
    check_segments(transcript.segments, transcript.duration)
    ends = [start - long / 2 for start, long in zip(starts, pauses, strict=True) if long > pause and start > 1]
    assert toy.model.session.durations == pytest.approx(np.diff([0.0, *ends, len(samples) / RATE]), abs=0.08)
    assert len(transcript.segments) == len(toy.model.session.durations) == {0.4: 3, 0.9: 2}[pause]


@pytest.mark.usefixtures("short_windows")
def test_windows_without_pause_are_full_and_what_they_end_amid_is_encoded_again(toy):
    samples, _ = say("ABCDAB", [0.3, 0.2, 0.6, 0.2, 1.1, 0.3])
    transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=EndpointConfig(pause=None)))
    assert transcript.text == "A B C D A B"
    assert toy.model.session.durations[0] == pytest.approx(4.0, abs=0.1)
    # A word at the end of the window, in an utterance from its second half, is recognised once and in full
    samples, starts = say("ABCD", [0.9, 2.5, 0.2, 0.2], tone_s=0.4)
    assert starts[1] + 0.1 < 4.0 < starts[1] + 0.3
    transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=dataclasses.replace(RULES, pause=None)))
    assert [segment.text for segment in transcript.segments] == ["A", "B C D"]
    assert starts[1] <= transcript.segments[1].times[0] <= starts[1] + 0.4


@pytest.mark.usefixtures("short_windows")
def test_a_pause_in_which_somebody_speaks_quietly_is_none():
    """A loud speaker and one 50 dB below, whose words are longer than a pause: no word is cut."""
    loud, _ = say("ABC", [0.3, 0.3, 0.3])
    quiet, _ = say("DADAD", [0.05] * 5, tone_s=0.7)
    samples = np.concatenate([loud[: -RATE // 2], 10 ** (-50 / 20) * quiet[: -RATE // 2], loud])
    toy = toy_recognizer(threshold=7.0)
    for pause in (0.4, None):
        toy.model.session.durations.clear()
        transcript = toy.transcribe(samples, options=DecodingOptions(endpoint=EndpointConfig(pause=pause)))
        assert transcript.text == "A B C D A D A D A B C"
        check_segments(transcript.segments, transcript.duration)


@pytest.mark.slow
def test_a_long_recording_is_cut_at_pauses_alike_in_any_portions(toy):
    samples, _ = say("ABCD" * 20, [0.3, 0.7, 0.2, 3.0] * 20)
    options = DecodingOptions(search="ctc_prefix_beam", endpoint=EndpointConfig())
    expected = toy.transcribe(samples, options=options).segments
    assert " ".join(segment.text for segment in expected) == " ".join("ABCD" * 20)
    assert len(expected) == 41  # A, BC, DA, BC, ..., D
    for size in (1000, 77_777):
        stream = toy._stream(options, None, None)
        for start in range(0, len(samples), size):
            stream.accept_waveform(RATE, samples[start : start + size])
            toy.decode_streams([stream])
        stream.input_finished()
        toy.decode_streams([stream])
        assert stream.take_segments() == expected
